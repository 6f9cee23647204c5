"""The table of solvers and their settings, which the command line, the docs and the tests walk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import JSON, Family
from mechdiff_mlflow.solvers.factors import Factors
from mechdiff_mlflow.solvers.procrustes import procrustes, procrustes_scaled
from mechdiff_mlflow.solvers.regression import logit_subspace, reduced_rank, ridge
from mechdiff_mlflow.solvers.solution import OffSpan, Solution, check_rank
from mechdiff_mlflow.solvers.spectrum import PairedSpectrum
from mechdiff_mlflow.spec.options import Kind, Option, number, one_of


@dataclass(frozen=True, slots=True)
class Setting:
    """What a user can set of a fit: a number in [low, high], a whole one where the default is, or a word."""

    name: str  # of the param of a run, of a map's meta and of the argument in Python
    default: Any  # in the type that the setting has in Python
    help: str  # one line
    low: float = 0.0
    high: float = math.inf
    choices: tuple[Any, ...] = ()  # the words allowed, where it is no number
    none: str = ""  # the word that a user types for None; empty where None is not allowed

    @property
    def kind(self) -> Kind:
        """How it is typed and read."""
        whole = "whole number" if isinstance(self.default, int) else "number"
        return Kind("|".join(self.words) or whole, self._parse, self.none)

    @property
    def field(self) -> Any:
        """The field of a dataclass that has the setting; requests make an option of it."""
        option = Option(self.kind, self.help, self.default)
        return dataclasses.field(default=self.default, metadata={"option": option})

    @property
    def words(self) -> tuple[str, ...]:
        """What a user may type, where it is no number."""
        return tuple(word for word in (self.none, *map(str, self.choices)) if word)

    def _parse(self, text: str) -> Any:
        option = "--" + self.name.replace("_", "-")
        if self.choices:
            return self.checked(one_of(option, *self.words).parse(text))
        value = number(option, self.default).parse(text)
        return self.checked(int(value) if isinstance(self.default, int) and value % 1 == 0 else value)

    def checked(self, value: Any) -> Any:
        """`value` in the type that the setting has, if it is allowed; else an error."""
        if value is None and self.none:
            return None
        if self.choices:
            if value not in self.choices:
                raise MechdiffError(f"{self.name} is {value!r}; use one of {', '.join(self.words)}.")
            return self.choices[self.choices.index(value)]
        whole = isinstance(self.default, int)
        is_number = isinstance(value, int if whole else (int, float)) and value != math.inf
        if not is_number or not self.low <= value <= self.high:
            title = "a whole number" if whole else "a number"
            high = f"to {self.high:.12g}" if self.high < math.inf else "up"
            raise MechdiffError(f"{self.name} is {value!r}; give {title} from {self.low:.12g} {high}.")
        return value if whole else float(value)


@dataclass(frozen=True, slots=True)
class Solver:
    """One row of the table."""

    name: str  # what users type
    help: str  # one line
    solve: Callable[..., Factors]  # `(spectrum, family, **settings, **tensors) -> Factors`
    families: tuple[Family, ...] = tuple(Family)  # those it supports; `update` always needs d_in = d_out
    settings: tuple[Setting, ...] = ()  # its hyperparameters, which `solve` takes
    tensors: tuple[str, ...] = ()  # further inputs, with rows as wide as y; optional in the signature
    tensor_settings: tuple[Setting, ...] = ()  # what whoever makes these from the models reads of the user
    ranked: bool = True  # whether rank k means anything
    centred: bool = True  # whether the means of x and y take part; they are 0 otherwise


def _no_update(p: PairedSpectrum, family: Family) -> Factors:
    """W = I."""
    return Factors(p.vx[:, :0], p.vy.mT[:0], (0,))


SHRINK = Setting("shrink", 0.05, "Covariance shrinkage, 0 to 1.", high=1.0)
RIDGE = Setting("ridge", 0.01, "Penalty as a fraction of the mean variance, at least 0.")
OUTPUT_METRIC = Setting(
    "output_metric",
    "identity",
    "How reduced_rank counts errors: as they are, in deviations, or as they move the output.",
    choices=("identity", "tuned_covariance", "fisher"),
)
DIRECTIONS = Setting(
    "directions", 16, "Output directions that logit_subspace is restricted to.", low=1, high=100_000
)
UNEMBEDDING = Setting(
    "unembedding",
    "tuned",
    "Whose top directions those are: tuned, or joint of base and tuned.",
    choices=("tuned", "joint"),
)
OFF_SPAN = Setting(
    "off_span",
    None,
    "Outside the span of the training rows: zero, nearest_identity, or auto (val chooses).",
    choices=tuple(OffSpan),
    none="auto",
)
ALPHA_FIT = Setting(
    "alpha_fit",
    "after",
    "Where alpha enters: after a fit to y, or inside: a fit to y/alpha, then times alpha.",
    choices=("after", "inside"),
)

SOLVERS: Mapping[str, Solver] = {
    row.name: row
    for row in (
        Solver(
            "procrustes_scaled",
            "whiten with shrunk covariances, rotate, stretch, colour again",
            procrustes_scaled,
            settings=(SHRINK,),
        ),
        Solver(
            "reduced_rank",
            "least squares of rank k: the optimal map of each rank",
            reduced_rank,
            settings=(RIDGE, OUTPUT_METRIC, SHRINK),
            tensors=("fisher",),
        ),
        Solver(
            "ridge",
            "least squares pulled to 0 (content) or to the identity (update)",
            ridge,
            settings=(RIDGE,),
        ),
        Solver("procrustes", "the rotation nearest to the rows", procrustes),
        Solver(
            "logit_subspace",
            "reduced rank towards the part of y in given output directions",
            logit_subspace,
            settings=(RIDGE,),
            tensors=("basis",),
            tensor_settings=(DIRECTIONS, UNEMBEDDING),
        ),
        Solver("mean_shift", "add the difference of the means", _no_update, (Family.UPDATE,), ranked=False),
        Solver(
            "identity",
            "the base activation as it is",
            _no_update,
            (Family.UPDATE,),
            ranked=False,
            centred=False,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user can set of a fit: requests and protocols inherit these fields."""

    shrink: float = SHRINK.field
    ridge: float = RIDGE.field
    output_metric: str = OUTPUT_METRIC.field
    directions: int = DIRECTIONS.field
    unembedding: str = UNEMBEDDING.field
    alpha_fit: str = ALPHA_FIT.field
    off_span: OffSpan | None = OFF_SPAN.field


SETTINGS: tuple[Setting, ...] = (
    *dict.fromkeys(s for row in SOLVERS.values() for s in (*row.settings, *row.tensor_settings)),
    OFF_SPAN,
    ALPHA_FIT,
)
"""The same once each, the ones of some solvers first."""


def solver_named(name: str) -> Solver:
    """The row called `name`, or an error that lists them."""
    if name not in SOLVERS:
        raise MechdiffError(f"Solver {name!r} is unknown; use one of {', '.join(SOLVERS)}.")
    return SOLVERS[name]


def check_possible(
    solver: str, family: Family | str, d_in: int, d_out: int, rank: int | None = None
) -> tuple[Solver, Family]:
    """The row and the family, if they go with these widths, and with maps of a rank; else an error."""
    row, family = solver_named(solver), Family.parse(family)
    if family not in row.families:
        raise MechdiffError(
            f"The solver {solver} has no {family} family; use {' or '.join(map(str, row.families))}."
        )
    if family is Family.UPDATE and d_in != d_out:
        others = [row.name for row in SOLVERS.values() if Family.CONTENT in row.families]
        raise MechdiffError(
            f"The update family compares the map with the identity and needs equal widths, not {d_in} -> "
            f"{d_out}; use family content with one of {', '.join(others)}."
        )
    check_rank(solver, row.ranked, rank, min(d_in, d_out))
    return row, family


def fit_spectrum(
    solver: str, p: PairedSpectrum, family: Family | str = Family.UPDATE, **settings: Any
) -> Solution:
    """Solve one site, for every rank at once, with settings and tensors (rows of width d_out) of the solver.

    Raises:
        MechdiffError: The solver, the family, a setting or the widths are not allowed.
    """
    row, family = check_possible(solver, family, p.d_in, p.d_out)
    used = {s.name: s.checked(settings.get(s.name, s.default)) for s in row.settings}
    tensors = {name: settings[name].to(p.mean_y) for name in row.tensors if name in settings}
    factors = row.solve(p, family, **used, **tensors)
    meta: dict[str, JSON] = {"solver": solver, "family": str(family), "n_rows": p.n, **used}
    meta.update({f"{name}_rows": len(rows) for name, rows in tensors.items()})
    mean_x, mean_y = (p.mean_x, p.mean_y) if row.centred else (0 * p.mean_x, 0 * p.mean_y)
    return Solution(mean_x, mean_y, p.vx, factors, family, row.ranked, meta)
