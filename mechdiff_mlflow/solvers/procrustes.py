"""Maps that turn, and may stretch, the base activations onto the tuned ones.

Notation, here and in the code: Xc = Ux·diag(sx)·Vxᵀ and Yc = Uy·diag(sy)·Vyᵀ are the centred rows, n−1 their
degrees of freedom, and M = UxᵀUy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mechdiff_mlflow.maps.affine import Family
from mechdiff_mlflow.solvers.factors import TIE, Factors, best_ranks, leading
from mechdiff_mlflow.solvers.spectrum import PairedSpectrum


@dataclass(frozen=True, slots=True, eq=False)
class ShrunkCovariance:
    """C_γ = (1−γ)·C + γ·tr(C)/d·I: `on_axes` along the axes v, `off_axes` in every other direction.

    Shrinking keeps the trace, and leaves a multiple of the identity as it is.

    Reference: Ledoit & Wolf (2004), A well-conditioned estimator for large-dimensional covariance matrices.
    """

    v: Tensor
    on_axes: Tensor
    off_axes: float

    @classmethod
    def of(cls, n: int, s: Tensor, v: Tensor, shrink: float) -> ShrunkCovariance:
        """From the singular values s [r] and axes v [d, r] of n centred rows."""
        variances = s**2 / (n - 1)
        floor = shrink * float(variances.sum()) / len(v)
        return cls(v, (1 - shrink) * variances + floor, floor)


def procrustes_scaled(p: PairedSpectrum, family: Family, *, shrink: float) -> Factors:
    """Whiten, rotate, stretch and colour again.

    With C_b, C_t the covariances shrunk by γ = `shrink`, Xw = Xc·C_b^−½, Yw = Yc·C_t^−½ and XwᵀYw =
    U·diag(S)·Vᵀ over the singular values that are not zero, W = s·C_b^−½·UVᵀ·C_t^½, where s = ΣSᵢ/‖Xw·U‖²
    is the best scale (‖Xw·U‖ = ‖Xw‖ when U spans all of Xw).

    Ranks: content W_k = s_k·C_b^−½·U_kV_kᵀ·C_t^½ with s_k = Σ_{i≤k}Sᵢ/‖Xw·U_k‖²; update W_k = I + the best
    rank-k approximation of W − I, where W is the identity off the span of Xc.
    """
    cov_x = ShrunkCovariance.of(p.n, p.sx, p.vx, shrink)
    cov_y = ShrunkCovariance.of(p.n, p.sy, p.vy, shrink)
    return _turn(p, family, cov_x.on_axes.sqrt(), cov_y.on_axes.sqrt(), rescale=True)


def procrustes(p: PairedSpectrum, family: Family) -> Factors:
    """The rotation nearest to the rows: XcᵀYc = U·diag(S)·Vᵀ, W = UVᵀ over the S that are not zero.

    Ranks as in `procrustes_scaled`, which with a shrinkage of 1 also stretches it: U_kV_kᵀ for content, and
    the best rank-k approximation of W − I for update.

    Reference: Schönemann (1966), A generalized solution of the orthogonal Procrustes problem.
    """
    return _turn(p, family, torch.ones_like(p.sx), torch.ones_like(p.sy), rescale=False)


def _turn(p: PairedSpectrum, family: Family, std_x: Tensor, std_y: Tensor, *, rescale: bool) -> Factors:
    """Procrustes between rows divided by std_x [r_x], std_y [r_y] along their axes, and multiplied back."""
    xw, yw = p.sx / std_x, p.sy / std_y  # the singular values of Xw and Yw
    u, s, vh = torch.linalg.svd(xw[:, None] * p.cross * yw, full_matrices=False)
    if (shared := len(xw) + len(yw) - (p.n - 1)) > 1 and _constant(xw) and _constant(yw):
        # Both sides span so many of the n−1 dimensions that they share some: there S is equal in exact
        # arithmetic, and which of them LAPACK puts first depends on the order of the rows.
        s[:shared] = s[:shared].mean()
    # Axes that do not covary are turned in no particular way, and not in LAPACK's: they are left out.
    top = leading(u, s, max(p.cross.shape))
    r = top.vectors.shape[1]
    u, s, vh = top.vectors, s[:r], vh[:r]
    scales = s.new_ones(r + 1)
    if rescale:
        explained = ((xw[:, None] * u) ** 2).sum(0).cumsum(0)  # ‖Xw·U_k‖²
        scales[1:] = s.cumsum(0) / explained
    core = (vh * std_y) @ p.vy.mT  # [r, d_out]
    if family is Family.CONTENT:
        return Factors(p.vx @ (u / std_x[:, None]), core, top.cuts, scales)
    return best_ranks(p.vx, scales[-1] * (u / std_x[:, None]) @ core - p.vx.mT)


def _constant(values: Tensor) -> bool:
    return bool(values.max() - values.min() <= TIE * values.max())
