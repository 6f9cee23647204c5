"""The table of solvers, which the command line, the docs and the tests walk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import JSON, Family
from mechdiff_mlflow.solvers.factors import Factors
from mechdiff_mlflow.solvers.procrustes import procrustes, procrustes_scaled
from mechdiff_mlflow.solvers.regression import logit_subspace, reduced_rank, ridge
from mechdiff_mlflow.solvers.settings import Setting
from mechdiff_mlflow.solvers.solution import OffSpan, Solution, check_rank
from mechdiff_mlflow.solvers.spectrum import PairedSpectrum


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
    return Factors(p.vx.new_zeros(p.d_in, 0), p.vx.new_zeros(0, p.d_out), (0,))


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

_ROWS = (
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
        "ridge", "least squares pulled to 0 (content) or to the identity (update)", ridge, settings=(RIDGE,)
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
    Solver(
        "mean_shift", "add the difference of the means", _no_update, families=(Family.UPDATE,), ranked=False
    ),
    Solver(
        "identity",
        "the base activation as it is",
        _no_update,
        families=(Family.UPDATE,),
        ranked=False,
        centred=False,
    ),
)
SOLVERS: Mapping[str, Solver] = MappingProxyType({row.name: row for row in _ROWS})


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
    """The row called `name`.

    Raises:
        MechdiffError: There is none.
    """
    if name not in SOLVERS:
        raise MechdiffError(f"Solver {name!r} is unknown; use one of {', '.join(SOLVERS)}.")
    return SOLVERS[name]


def check_possible(
    solver: str, family: Family | str, d_in: int, d_out: int, rank: int | None = None
) -> tuple[Solver, Family]:
    """The row and the family, once it is sure that they go with these widths, and with maps of a rank.

    Raises:
        MechdiffError: They do not.
    """
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
    solver: str, p: PairedSpectrum, family: Family | str = Family.UPDATE, **settings: object
) -> Solution:
    """Solve one site, for every rank at once, with settings and tensors of the solver.

    Raises:
        MechdiffError: The solver, the family, a setting or the widths are not allowed.
    """
    row, family = check_possible(solver, family, p.d_in, p.d_out)
    unknown = settings.keys() - {setting.name for setting in row.settings} - set(row.tensors)
    if unknown:
        known = ", ".join([*(setting.name for setting in row.settings), *row.tensors]) or "none"
        raise MechdiffError(
            f"The solver {solver} does not take {', '.join(sorted(unknown))}; it takes {known}."
        )
    used = {s.name: s.checked(settings.get(s.name, s.default)) for s in row.settings}
    tensors = {name: _as_rows(name, settings[name], p) for name in row.tensors if name in settings}
    factors = row.solve(p, family, **used, **tensors)
    meta: dict[str, JSON] = {"solver": solver, "family": str(family), "n_rows": p.n, **used}
    meta.update({f"{name}_rows": len(rows) for name, rows in tensors.items()})
    mean_x, mean_y = (p.mean_x, p.mean_y) if row.centred else (0 * p.mean_x, 0 * p.mean_y)
    return Solution(mean_x, mean_y, p.vx, factors, family, row.ranked, meta)


def _as_rows(name: str, rows: object, p: PairedSpectrum) -> Tensor:
    """`rows` in the dtype and on the device of the fit, once it is sure that they are [m, d_out]."""
    shape = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
    if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != p.d_out or len(rows) == 0:
        raise MechdiffError(f"{name} is {shape}; give a matrix of rows of width {p.d_out}.")
    if not bool(torch.isfinite(rows).all()):
        raise MechdiffError(f"{name} {shape} has NaN or infinite entries; give finite rows.")
    return rows.to(p.mean_y)
