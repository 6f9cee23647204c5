"""Solvers: from paired activations of a site to maps of every rank. Pure mathematics."""

from mechdiff_mlflow.solvers.regression import identity_scale, unembedding_directions
from mechdiff_mlflow.solvers.solution import OffSpan, Solution
from mechdiff_mlflow.solvers.spectrum import PairedSpectrum
from mechdiff_mlflow.solvers.table import (
    SETTINGS,
    SOLVERS,
    Setting,
    Settings,
    Solver,
    check_possible,
    fit_spectrum,
    solver_named,
)

__all__ = ["SETTINGS", "SOLVERS", "OffSpan", "PairedSpectrum", "Setting", "Settings", "Solution", "Solver"]
__all__ += ["check_possible", "fit_spectrum", "identity_scale", "solver_named", "unembedding_directions"]
