"""How sure the numbers are: bootstrap intervals, the smallest sufficient rank, tests.

Prompts are resampled, or whole groups of prompts. What the data leave undefined is None: a ratio whose
denominator is not above its floor, a correlation with a constant, the bounds of an interval for which prompts
are too few. Arrays that are not paired, finite and of two prompts are a `MechdiffError`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.bootstrap import Bootstrap, Floats, Interval

FLOORS = 10.0
"""A ratio over a mean KL below this many noise floors is undefined."""


def drop_pct(
    kl_reference: ArrayLike,
    kl_mapped: ArrayLike,
    *,
    noise_floor: float = 0.0,
    bootstrap: Bootstrap = Bootstrap(),
) -> Interval:
    """100·(1 − ΣKL_mapped/ΣKL_reference), a ratio of means.

    With the raw cross-patch as reference this is drop_pct, with the best control it is skill_pct. KL is in
    nats, of the same prompts, [n]; a reference below 10 noise floors (nats), or of 0, leaves it undefined.
    The interval makes room for prompts of a kind that these are not, on which the map does as its reference.
    """
    reference, mapped = _paired(kl_reference=kl_reference, kl_mapped=kl_mapped)
    if not is_defined(reference, mapped, noise_floor):
        return Interval(None, None, None, bootstrap.level)
    drop = bootstrap.ratio(mapped, reference).scaled(-100, 100)
    return drop.interval(bootstrap.level, unseen=abs(drop.estimate), most=100.0)  # for KL is not below 0


def is_defined(kl_reference: Floats, kl_mapped: Floats, noise_floor: float) -> bool:
    """Whether there is a drop: the reference is large enough to divide by, and `FLOORS` noise floors."""
    is_number = not math.isnan(_drop(kl_mapped, kl_reference))
    return is_number and above_floor(float(kl_reference.mean()), noise_floor)


def above_floor(kl_nats: float, noise_floor: float) -> bool:
    """The one rule of when a mean KL is told from noise: above 0, and at least `FLOORS` noise floors."""
    return kl_nats > 0 and kl_nats >= FLOORS * noise_floor


def below_floor(what: str, kl_nats: float, noise_floor: float) -> str:
    """Why a ratio over such a mean KL has no value."""
    return (
        f"below noise floor: {what} is {kl_nats:.2g} nats, under {FLOORS:g} times the floor of "
        f"{noise_floor:.2g}"
    )


def drop_difference(
    first: tuple[ArrayLike, ArrayLike],
    second: tuple[ArrayLike, ArrayLike],
    *,
    bootstrap: Bootstrap = Bootstrap(),
    groups: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> Interval:
    """drop_pct of `first` minus that of `second`, in percentage points, of two independent sets of prompts.

    Each is KL_reference and KL_mapped in nats, [n] and [m], and has its groups as in `Bootstrap`; the second
    set is drawn with the next seed.
    """
    drops = []
    for (kl_reference, kl_mapped), seed, of in zip(
        (first, second), (bootstrap.seed, bootstrap.seed + 1), groups, strict=True
    ):
        reference, mapped = _paired(kl_reference=kl_reference, kl_mapped=kl_mapped)
        if not is_defined(reference, mapped, 0):
            return Interval(None, None, None, bootstrap.level)
        drops.append(replace(bootstrap, seed=seed, groups=of).ratio(mapped, reference).scaled(-100, 100))
    gap = drops[0] - drops[1]
    return gap.interval(bootstrap.level, unseen=abs(drops[0].estimate) + abs(drops[1].estimate))


def recovered_pct(
    raw: ArrayLike, mapped: ArrayLike, tuned: ArrayLike, *, bootstrap: Bootstrap = Bootstrap()
) -> Interval:
    """100·(mapped − raw)/(tuned − raw), means of a measure of the same prompts, [n] each.

    Undefined where the interval of tuned − raw holds 0: then there is nothing to recover.
    """
    of_raw, of_mapped, of_tuned = _paired(raw=raw, mapped=mapped, tuned=tuned)
    gain, gap = of_mapped - of_raw, of_tuned - of_raw
    whole = mean(gap, bootstrap=bootstrap)
    if whole.low is None or whole.high is None or whole.low <= 0 <= whole.high:
        return Interval(None, None, None, bootstrap.level)
    sign = 1.0 if whole.low > 0 else -1.0
    return bootstrap.ratio(sign * gain, sign * gap).scaled(100).interval(bootstrap.level)


def kl_difference(kl_raw: ArrayLike, kl_mapped: ArrayLike, *, bootstrap: Bootstrap = Bootstrap()) -> Interval:
    """The mean of KL_raw − KL_mapped, in nats; arguments and interval as in `drop_pct`."""
    raw, mapped = _paired(kl_raw=kl_raw, kl_mapped=kl_mapped)
    gain = bootstrap.ratio(raw - mapped, np.ones(len(raw)))
    return gain.interval(bootstrap.level, unseen=abs(gain.estimate))


def mean(values: ArrayLike, *, bootstrap: Bootstrap = Bootstrap()) -> Interval:
    """The mean of one value for each prompt, [n]."""
    (each,) = _paired(values=values)
    return bootstrap.ratio(each, np.ones(len(each))).interval(bootstrap.level)


@dataclass(frozen=True, slots=True)
class MinK:
    """The smallest rank that reaches a target, and how sure that is."""

    target_pct: float  # the drop to reach, in percent
    k: int | None  # smallest tested rank such that it and all larger ones reach the target, if one does
    low: int | None  # percentile bound of k over resamples, one of the tested ranks; None if not reached
    high: int | None  # the upper bound, likewise
    level: float  # coverage aimed at
    p_reached: float  # fraction of resamples in which some tested rank reaches the target in that sense
    conservative_k: int | None  # smallest from which on whole intervals of the drop reach the target
    drops: tuple[Interval, ...]  # the drop of each tested rank with its interval, by rising rank


def min_k(
    ks: Sequence[int],
    kl_raw: ArrayLike,
    kl_mapped: ArrayLike,
    *,
    target_pct: float,
    noise_floor: float = 0.0,
    bootstrap: Bootstrap = Bootstrap(),
) -> MinK | None:
    """The smallest of the tested ranks that reaches the target drop; None where the drop is undefined.

    A rank counts only if all larger tested ranks reach the target too: one lucky rank is not low-rank
    control. The full map counts as its width. KL is in nats: `kl_raw` [n], `kl_mapped` [len(ks), n], the
    noise floor as in `drop_pct`. Ranks are distinct, and share the resamples.
    """
    order = np.argsort(ks)
    ranks, rows = [int(ks[i]) for i in order], np.asarray(kl_mapped, dtype=np.float64)[order]
    drops = tuple(drop_pct(kl_raw, row, noise_floor=noise_floor, bootstrap=bootstrap) for row in rows)
    estimates = [drop.estimate for drop in drops]
    if any(estimate is None for estimate in estimates):
        return None
    raw, *_ = _paired(kl_raw=kl_raw, kl_mapped=rows[0])
    resampled_raw, *resampled = bootstrap.means(raw, *rows)
    reached = np.stack([_drops(mapped, resampled_raw) for mapped in resampled], axis=1) >= target_pct
    # NaN (no KL at all in the resample) compares false: not reached.
    firsts = _first_of_the_reached(reached)
    low, high = np.quantile(firsts, [bootstrap.tail, 1 - bootstrap.tail], method="inverted_cdf")
    plain = [estimate is not None and estimate >= target_pct for estimate in estimates]
    sure = [drop.low is not None and drop.low >= target_pct for drop in drops]
    named: list[int | None] = [*ranks, None]
    k, conservative_k, low_k, high_k = (
        named[int(i)] for i in (*_first_of_the_reached(np.array([plain, sure])), low, high)
    )
    p_reached = float((firsts < len(ranks)).mean())
    return MinK(float(target_pct), k, low_k, high_k, bootstrap.level, p_reached, conservative_k, drops)


def _first_of_the_reached(reached: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For rows of flags [m, n_k] where the unbroken run of True at the end begins; n_k if there is none."""
    run = np.logical_and.accumulate(reached[:, ::-1], axis=1).sum(axis=1)
    return np.asarray(reached.shape[1] - run, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Correlation:
    """Pearson's and Spearman's correlation over n prompts; no unit."""

    pearson: Interval
    spearman: Interval
    n: int


def correlation(
    cosine: ArrayLike, kl_decrease: ArrayLike, *, bootstrap: Bootstrap = Bootstrap()
) -> Correlation:
    """Do the prompts whose mapped activation points right profit most?

    Of cos(ŷ − μ_t, y − μ_t) and KL_raw − KL_mapped in nats, [n] each; every resample is ranked anew.
    """
    a, b = _paired(cosine=cosine, kl_decrease=kl_decrease)
    once, counts = np.ones((1, len(a))), bootstrap.counts(len(a))

    def interval(of: Callable[[Floats, Floats], Floats]) -> Interval:
        estimate = float(_pearson(of(a, once), of(b, once), once)[0])
        resampled = _pearson(of(a, counts), of(b, counts), counts)
        return bootstrap.percentile(None if math.isnan(estimate) else estimate, resampled)

    return Correlation(interval(lambda v, counts: np.broadcast_to(v, counts.shape)), interval(_ranks), len(a))


def _pearson(a: Floats, b: Floats, counts: Floats) -> Floats:
    """Of rows [m, n] of which each value stands `counts` [m, n] times, [m]; NaN where a row is constant."""
    n = counts.sum(-1, keepdims=True)
    ac, bc = (v - (counts * v).sum(-1, keepdims=True) / n for v in (a, b))
    spread = np.sqrt((counts * ac**2).sum(-1) * (counts * bc**2).sum(-1))
    there = counts > 0
    varies = spread > 0
    for v in (a, b):
        varies &= v.max(-1, where=there, initial=-np.inf) > v.min(-1, where=there, initial=np.inf)
    found: Floats = np.divide((counts * ac * bc).sum(-1), spread, out=np.full(len(n), np.nan), where=varies)
    return found


def _ranks(values: Floats, counts: Floats) -> Floats:
    """The mean rank of each value [n] in every sample that has it `counts` [m, n] times, [m, n]."""
    places = np.unique(values, return_inverse=True)[1]
    order = np.argsort(places, kind="stable")
    starts = np.flatnonzero(np.diff(places[order], prepend=-1))
    of_value = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks: Floats = (np.cumsum(of_value, axis=1) - of_value / 2 + 0.5)[:, places]
    return ranks


def p_less_kl(kl_reference: ArrayLike, kl_mapped: ArrayLike, *, bootstrap: Bootstrap = Bootstrap()) -> float:
    """The one-sided p-value of a mean of KL_reference − KL_mapped above 0; arguments as in `drop_pct`.

    It tests the mean, and so does not take a skewed difference for one that is above 0, as a test of
    symmetry (sign flips, signed ranks) does.
    """
    reference, mapped = _paired(kl_reference=kl_reference, kl_mapped=kl_mapped)
    return bootstrap.ratio(reference - mapped, np.ones(len(mapped))).p_above_0()


def permutation_p(observed: float, permuted: ArrayLike, *, atol: float = 0.0) -> float:
    """(1 + #{permuted ≤ observed}) / (B + 1), for a quantity where smaller is better, such as KL_mapped.

    Values of B ≥ 1 shuffled pairs that are within `atol` count as equal, against rounding.

    Reference: Phipson & Smyth (2010), Permutation p-values should never be zero.
    """
    values = np.asarray(permuted, dtype=np.float64)
    return (1 + int((values <= observed + atol).sum())) / (len(values) + 1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values, in the order given; None (not tested) stays None and counts for nothing.

    Reference: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for place, (p, i) in enumerate(tested):
        if not 0 <= p <= 1:
            raise MechdiffError(f"{p} is not a p-value; give numbers from 0 to 1, or None.")
        largest = max(largest, min(1.0, (len(tested) - place) * p))
        adjusted[i] = largest
    return adjusted


def _drop(mapped: Floats, reference: Floats) -> float:
    """The drop of the means of values of each prompt, in percent; NaN as in `_drops`."""
    return float(_drops(mapped.mean(keepdims=True), reference.mean(keepdims=True))[0])


def _drops(mapped: Floats, reference: Floats) -> Floats:
    """100·(1 − mapped/reference), [m]; NaN where the reference is not above 0 or too small to divide by."""
    with np.errstate(over="ignore"):
        ratio = np.divide(mapped, reference, out=np.full(len(mapped), np.nan), where=reference > 0)
        percent: Floats = 100.0 * (1.0 - ratio)
    percent[~np.isfinite(percent)] = np.nan
    return percent


def _paired(**arrays: ArrayLike) -> list[Floats]:
    """The named arrays as float64 [n] each, once it is sure that they are values of the same prompts."""
    values = {name: np.asarray(array, dtype=np.float64) for name, array in arrays.items()}
    shapes = {v.shape for v in values.values()}
    if len(shapes) > 1 or any(v.ndim != 1 or len(v) < 2 for v in values.values()):
        found = ", ".join(f"{name} {list(v.shape)}" for name, v in values.items())
        raise MechdiffError(f"Statistics need one value for each of at least 2 prompts, not {found}.")
    for name, v in values.items():
        if not np.isfinite(v).all():
            raise MechdiffError(
                f"{int((~np.isfinite(v)).sum())} of {len(v)} values of {name} are NaN or infinite; look at "
                "those prompts."
            )
    return list(values.values())
