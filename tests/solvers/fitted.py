"""A solver on rows, in one call."""

from __future__ import annotations

from torch import Tensor

from mechdiff_mlflow.maps.affine import Family
from mechdiff_mlflow.solvers import PairedSpectrum, Solution, fit_spectrum


def fit(
    solver: str, x: Tensor, y: Tensor, family: Family | str = Family.UPDATE, **settings: object
) -> Solution:
    return fit_spectrum(solver, PairedSpectrum.from_rows(x, y), family, **settings)
