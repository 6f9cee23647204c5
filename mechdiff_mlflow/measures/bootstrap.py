"""Drawing prompts again and again: intervals and p-values of means and of ratios of means."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mechdiff_mlflow.errors import MechdiffError

Floats: TypeAlias = NDArray[np.float64]

_ROUNDING = 1e-12
"""A difference this small a part of what it is the difference of is rounding, and counts as 0."""
_NO_ERROR = 1e-6
"""A resample of one unit alone has a standard error of 0, which cancellation leaves this far from it."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its interval, in the unit of the quantity; None is undefined."""

    estimate: float | None
    low: float | None
    high: float | None
    level: float


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Paired bootstrap over prompts, or over groups of prompts where they have groups.

    Intervals of ratios and means are studentised: KL is skewed, and an interval that is as skewed as the data
    covers more often than a percentile interval does. `benchmarks/coverage.py` measures how often.

    Reference: Efron & Tibshirani (1993), An introduction to the bootstrap, chapters 12 and 13; of groups
    Field & Welsh (2007), Bootstrapping clustered data.
    """

    n_resamples: int = 9999  # how many times the prompts are drawn
    level: float = 0.95  # coverage aimed at, between 0 and 1
    seed: int = 0  # equal seeds draw equal prompts, for every quantity over as many prompts
    groups: tuple[int, ...] = ()  # of each prompt, drawn as a whole; empty draws each prompt by itself

    def __post_init__(self) -> None:
        if self.n_resamples < 1 or not 0 < self.level < 1:
            raise MechdiffError(
                f"A bootstrap of {self.n_resamples} resamples at level {self.level} is not possible; give at "
                "least 1 resample and a level between 0 and 1."
            )

    @property
    def tail(self) -> float:
        """How often an interval is to miss on either side."""
        return (1 - self.level) / 2

    def means(self, *per_prompt: Floats) -> list[Floats]:
        """For each array [n] its mean over every resample, [n_resamples]."""
        counts = self.counts(len(per_prompt[0]))
        n_drawn = counts.sum(1)
        return [counts @ values / n_drawn for values in per_prompt]

    def counts(self, n: int) -> Floats:
        """How often each resample draws each of n prompts, [n_resamples, n]."""
        if not self.groups:
            return _draws(n, self.n_resamples, self.seed)
        names, group = np.unique(self.groups, return_inverse=True)
        return _draws(len(names), self.n_resamples, self.seed)[:, group]

    def of(self, some: NDArray[np.bool_]) -> Bootstrap:
        """The same of only some of the prompts, [n]."""
        return replace(self, groups=tuple(np.asarray(self.groups)[some].tolist()) if self.groups else ())

    def ratio(self, numerator: Floats, denominator: Floats) -> Resampled:
        """Σ numerator / Σ denominator, of one value for each prompt, [n] each; the denominator is above 0."""
        a, b = (self._summed(values) for values in (numerator, denominator))
        estimate = float(a.sum() / b.sum())
        rest = a - estimate * b
        rest[np.abs(rest) <= _ROUNDING * np.abs(a)] = 0
        draws = _draws(len(a), self.n_resamples, self.seed)
        with np.errstate(all="ignore"):  # what is not finite is undefined, below
            total = draws @ b
            shifts = draws @ rest / total
            squares = draws @ rest**2 - 2 * shifts * (draws @ (rest * b)) + shifts**2 * (draws @ b**2)
            errors = np.sqrt(np.maximum(squares, 0)) / total
        return Resampled(estimate, float(np.sqrt((rest**2).sum()) / b.sum()), shifts, errors, len(a))

    def percentile(self, estimate: float | None, resampled: Floats) -> Interval:
        """The percentile interval of `resampled` [n_resamples]; of NaN or one group it is undefined."""
        if estimate is None or bool(np.isnan(resampled).any()) or len({*self.groups}) == 1:
            return Interval(estimate, None, None, self.level)
        low, high = np.quantile(resampled, [self.tail, 1 - self.tail])
        return Interval(estimate, float(low), float(high), self.level)

    def _summed(self, values: Floats) -> Floats:
        """The sum of each group, or the values of the prompts where there are no groups."""
        if not self.groups:
            return values
        group = np.unique(self.groups, return_inverse=True)[1]
        return np.bincount(group, values).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Resampled:
    """A quantity, its standard error, and both in every resample."""

    estimate: float
    error: float
    shifts: Floats  # of the resample's estimate from the whole sample's, [n_resamples]
    errors: Floats  # [n_resamples]
    n: int  # prompts, or groups of prompts

    def __sub__(self, other: Resampled) -> Resampled:
        """The difference of two independent quantities."""
        return Resampled(
            self.estimate - other.estimate,
            math.hypot(self.error, other.error),
            self.shifts - other.shifts,
            np.hypot(self.errors, other.errors),
            min(self.n, other.n),
        )

    def scaled(self, factor: float, offset: float = 0.0) -> Resampled:
        """The quantity times `factor`, plus `offset`."""
        return replace(
            self,
            estimate=factor * self.estimate + offset,
            error=abs(factor) * self.error,
            shifts=factor * self.shifts,
            errors=abs(factor) * self.errors,
        )

    def interval(self, level: float, *, unseen: float = 0.0, most: float = math.inf) -> Interval:
        """The studentised interval, stretched towards 0 by what a kind of prompt that none is of may hide.

        A share p of prompts is missed by n of them with the probability of one tail where (1 − p)^n is that
        tail; on those the quantity may be 0, which moves it by p · `unseen`. No quantity is above `most`.
        """
        tail = (1 - level) / 2
        if self.n < 2 or not np.isfinite(self.shifts).all():
            return Interval(self.estimate, None, None, level)
        with np.errstate(invalid="ignore"):
            first, last = np.quantile(self._studentised(), [tail, 1 - tail])
        room = may_be_unseen(self.n, tail) * unseen
        low = self.estimate - last * self.error - (room if self.estimate > 0 else 0)
        high = min(most, self.estimate - first * self.error + (room if self.estimate < 0 else 0))
        if not np.isfinite([low, high]).all():
            return Interval(self.estimate, None, None, level)
        return Interval(self.estimate, float(low), float(high), level)

    def p_above_0(self, *, unseen_level: float = 0.05) -> float:
        """The one-sided p-value of a quantity above 0, from the studentised bootstrap.

        A quantity of 0 on the prompts that n may have missed is allowed for, as in `interval`. Below 2^−n it
        is never: so often do n signs agree by chance.
        """
        if self.estimate <= 0 or self.n < 2 or not np.isfinite(self.shifts).all():
            return 1.0
        seen = 1 - may_be_unseen(self.n, unseen_level)
        observed = math.inf if self.error == 0 else seen * self.estimate / self.error
        t = self._studentised()
        return max((1 + int((t >= observed).sum())) / (len(t) + 1), 0.5**self.n)

    def _studentised(self) -> Floats:
        """Shifts in standard errors of their own resample; infinite where that has none, [n_resamples]."""
        is_error = self.errors > _NO_ERROR * self.error
        infinite = np.copysign(np.inf, self.shifts)
        t: Floats = np.divide(self.shifts, self.errors, out=infinite, where=is_error)
        t[self.shifts == 0] = 0
        return t


def may_be_unseen(n: int, tail: float) -> float:
    """The largest share of prompts that n of them miss with a probability of `tail`."""
    return float(1 - tail ** (1 / n))


@lru_cache(maxsize=2)
def _draws(n: int, n_resamples: int, seed: int) -> Floats:
    """How often each resample draws each of n, [n_resamples, n]."""
    drawn = np.random.default_rng(seed).integers(0, n, (n_resamples, n))
    cells = drawn + np.arange(n_resamples)[:, None] * n
    return np.bincount(cells.ravel(), minlength=n_resamples * n).reshape(-1, n).astype(np.float64)
