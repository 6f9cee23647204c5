"""The one factorisation of a site: everything that the solvers need to know of its rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.similarity import paired_rows
from mechdiff_mlflow.solvers.factors import n_above_rounding


@dataclass(frozen=True, slots=True, eq=False)
class PairedSpectrum:
    """Centred rows in their own axes: Xc = Ux·diag(sx)·Vxᵀ, Yc = Uy·diag(sy)·Vyᵀ, and how these meet.

    Only the axes that the rows span are kept: r_x ≤ min(n−1, d_in) of x and r_y of y. Every solver, rank,
    shrinkage and ridge of a site follows from this, and from nothing wider than r when n < d.
    """

    n: int  # number of rows
    mean_x: Tensor  # [d_in]
    mean_y: Tensor  # [d_out]
    sx: Tensor  # singular values of Xc, falling, [r_x]
    vx: Tensor  # orthonormal axes of x, [d_in, r_x]
    sy: Tensor  # singular values of Yc, [r_y]
    vy: Tensor  # orthonormal axes of y, [d_out, r_y]
    cross: Tensor  # UxᵀUy, the correlations between the axes, [r_x, r_y]
    ux: Tensor  # [n, r_x]
    uy: Tensor  # [n, r_y]

    @classmethod
    def from_rows(cls, x: Tensor, y: Tensor) -> PairedSpectrum:
        """The spectrum of paired rows x [n, d_in], y [n, d_out] of any dtype.

        Up to n = d_in + d_out, where base and tuned rows must share axes, and n < 1.5·d by thin SVDs (no
        d×d matrix is formed), otherwise by way of the covariances, which square what rounding costs.

        Raises:
            MechdiffError: The rows are not paired, not finite, fewer than two, or do not vary.
        """
        x, y = paired_rows(x, y)
        d_in, d_out = x.shape[1], y.shape[1]
        mean_x, mean_y = x.mean(0), y.mean(0)
        xc, yc = x - mean_x, y - mean_y
        by_covariances = len(x) > d_in + d_out and len(x) >= 1.5 * max(d_in, d_out)
        if by_covariances:
            sx, vx = _principal_axes(xc.mT @ xc)
            sy, vy = _principal_axes(yc.mT @ yc)
        else:
            ux, sx, vx = _thin_svd(xc)
            uy, sy, vy = _thin_svd(yc)
        _check_variation(len(x), "base", mean_x, sx)
        _check_variation(len(x), "tuned", mean_y, sy)
        if by_covariances:
            cross = (vx.mT @ (xc.mT @ yc) @ vy) / (sx[:, None] * sy)
            ux, uy = xc @ vx / sx, yc @ vy / sy
        else:
            cross = ux.mT @ uy
        return cls(len(x), mean_x, mean_y, sx, vx, sy, vy, cross, ux, uy)

    @property
    def d_in(self) -> int:
        """Width of x."""
        return len(self.mean_x)

    @property
    def d_out(self) -> int:
        """Width of y."""
        return len(self.mean_y)

    def permuted(self, order: Tensor) -> PairedSpectrum:
        """The spectrum of x paired with y[order], at the cost of one product."""
        uy = self.uy[order]
        return replace(self, uy=uy, cross=self.ux.mT @ uy)

    def scaled(self, factor: float) -> PairedSpectrum:
        """The spectrum of x paired with factor·y, for a finite factor above 0."""
        if not 0 < factor < math.inf:
            raise MechdiffError(f"Activations cannot be scaled by {factor}; give a finite factor above 0.")
        return replace(self, mean_y=factor * self.mean_y, sy=factor * self.sy)


def _thin_svd(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [n, r], s [r], V [d, r] over the r singular values that stand out of rounding."""
    u, s, vh = torch.linalg.svd(rows, full_matrices=False)
    r = n_above_rounding(s, max(rows.shape))
    return u[:, :r], s[:r], vh[:r].mT


def _principal_axes(scatter: Tensor) -> tuple[Tensor, Tensor]:
    """The s [r], falling, and V [d, r] of the rows whose centred scatter this is."""
    values, vectors = torch.linalg.eigh(scatter)
    values, vectors = values.flip(0), vectors.flip(1)
    r = n_above_rounding(values, len(values))
    return values[:r].sqrt(), vectors[:, :r]


def _check_variation(n: int, name: str, mean: Tensor, s: Tensor) -> None:
    if n < 2:
        raise MechdiffError(f"A map cannot be fitted on {n} prompt; give at least 2.")
    # Equal rows leave a rounding error of their mean; no singular value of theirs means anything.
    rounding = n**0.5 * float(mean.norm()) * torch.finfo(mean.dtype).eps
    if len(s) == 0 or float(s[0]) <= 4 * rounding:
        raise MechdiffError(
            f"The {name} activations are the same on all {n} prompts; check the site, the position and "
            "that the prompts differ."
        )
