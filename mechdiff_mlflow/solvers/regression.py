"""Least-squares maps: ridge to 0 or to the identity, and their reduced-rank forms.

Notation, here and in the code: T = Yc − Xc·W₀ is what is left to explain, W₀ = 0 for content and I for
update; p = λ·tr(XcᵀXc)/d the penalty, where λ is called `ridge`; D = (XcᵀXc + p·I)⁻¹·XcᵀT and W = W₀ + D.
With Xc = U·diag(s)·Vᵀ, D = V·diag(1/√(s²+p))·F for F = diag(s/√(s²+p))·UᵀT, zero off the span of Xc.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import Family
from mechdiff_mlflow.solvers.factors import Directions, Factors, best_ranks, left_directions
from mechdiff_mlflow.solvers.procrustes import ShrunkCovariance
from mechdiff_mlflow.solvers.spectrum import PairedSpectrum


def ridge(p: PairedSpectrum, family: Family, *, ridge: float) -> Factors:
    """Least squares with the penalty p·‖W − W₀‖²; of rank k, the best approximation of D in Frobenius norm.

    Reference: Hoerl & Kennard (1970), Ridge regression: biased estimation for nonorthogonal problems.
    """
    h, f = _penalised(p, family, ridge)
    return best_ranks(p.vx, h[:, None] * f)


def reduced_rank(
    p: PairedSpectrum,
    family: Family,
    *,
    ridge: float,
    output_metric: str,
    shrink: float,
    fisher: Tensor | None = None,
) -> Factors:
    """The W₀ + D of rank(D) ≤ k with the least ‖(T − Xc·D)·G^½‖² + p·‖D·G^½‖², for every k.

    D_k = V·diag(1/√(s²+p))·L_k·L_kᵀ·F with L the left singular vectors of F·G^½. G is I, the inverse of the
    shrunk covariance of y (errors count in standard deviations), or the Fisher information (errors count
    as they move the output): G = gᵀg for the gradients g = `fisher` [m, d_out] of sampled log-probabilities
    in y. Directions in which G sees nothing come last, by falling size in F.

    Raises:
        MechdiffError: The metric needs a shrunk covariance.

    Reference: Mukherjee & Zhu (2011), Reduced rank ridge regression and its kernel extensions; Izenman
        (1975), Reduced-rank regression for the multivariate linear model.
    """
    h, f = _penalised(p, family, ridge)
    if output_metric == "identity":
        top = left_directions(f)
    elif output_metric == "tuned_covariance":
        top = left_directions(_over_deviation(p, f, family, shrink))
    else:
        assert fisher is not None
        top = _completed(left_directions(f @ fisher.mT), f)
    return Factors(p.vx @ (h[:, None] * top.vectors), top.vectors.mT @ f, top.cuts)


def logit_subspace(p: PairedSpectrum, family: Family, *, ridge: float, basis: Tensor) -> Factors:
    """Reduced rank towards the target's part within some output directions: T·B·Bᵀ in place of T.

    B is an orthonormal basis of the independent rows of `basis` [q, d_out], see `unembedding_directions`.
    """
    b = torch.linalg.qr(basis.mT).Q  # [d_out, q]
    h, f = _penalised(p, family, ridge)
    seen = f @ b  # [r, q]
    top = left_directions(seen)
    return Factors(p.vx @ (h[:, None] * top.vectors), (top.vectors.mT @ seen) @ b.mT, top.cuts)


def unembedding_directions(unembedding: Tensor, q: int, *others: Tensor) -> Tensor:
    """The q ≤ d directions of the residual stream that move logits most, of unembeddings [vocabulary, d]."""
    d = unembedding.shape[1]
    if not 1 <= q <= d:
        raise MechdiffError(f"q is {q}; give a number of directions from 1 to the width {d}.")
    gram = torch.zeros(d, d, dtype=torch.float64, device=unembedding.device)
    for e in (unembedding, *others):
        gram += e.double().mT @ e.double()
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -q:].flip(1).mT


def identity_scale(p: PairedSpectrum) -> float:
    """The α for which W is α·I in most directions: the scale of a change that is low rank but for it.

    W = α·(I + low rank) has α as the eigenvalue of every direction that the update leaves alone, so α is the
    median eigenvalue of the symmetric part of W, within the span of Xc. It is exact while the update has
    less than a quarter of the span's rank. Then `fit_spectrum(solver, p.scaled(1 / α)).map(k).with_alpha(α)`
    has an update of the rank that was planted; with alpha 1 its update would be full.

    Raises:
        MechdiffError: The widths differ.
    """
    if p.d_in != p.d_out:
        raise MechdiffError(
            f"A multiple of the identity needs equal widths, not {p.d_in} -> {p.d_out}; leave alpha as it is."
        )
    h, f = _penalised(p, Family.CONTENT, 1e-9)
    within = h[:, None] * (f @ p.vx)  # VᵀWV
    return float(torch.linalg.eigvalsh((within + within.mT) / 2).quantile(0.5))


def _penalised(p: PairedSpectrum, family: Family, ridge: float) -> tuple[Tensor, Tensor]:
    """1/√(s²+p), [r_x], and F, [r_x, d_out]."""
    target = (p.cross * p.sy) @ p.vy.mT  # UᵀT
    if family is Family.UPDATE:
        target -= p.sx[:, None] * p.vx.mT
    squares = p.sx**2
    h: Tensor = (squares + ridge * float(squares.sum()) / p.d_in).rsqrt()
    return h, (p.sx * h)[:, None] * target


def _over_deviation(p: PairedSpectrum, f: Tensor, family: Family, shrink: float) -> Tensor:
    """f·C_t^−½, with the covariance of y shrunk."""
    cov = ShrunkCovariance.of(p.n, p.sy, p.vy, shrink)
    along = f @ p.vy
    scaled: Tensor = (along * cov.on_axes.rsqrt()) @ p.vy.mT
    # For content, and when y spans every direction, f has no part off the axes.
    if family is Family.CONTENT or p.vy.shape[1] == p.d_out:
        return scaled
    if cov.off_axes == 0:
        raise MechdiffError(
            f"The covariance of the tuned activations has rank {p.vy.shape[1]} in {p.d_out} dimensions, so "
            "the output metric tuned_covariance needs a shrink above 0."
        )
    return scaled + (f - along @ p.vy.mT) / math.sqrt(cov.off_axes)


def _completed(top: Directions, f: Tensor) -> Directions:
    """`top`, then the directions of f [r, d] that it leaves, by falling size."""
    left = f - top.vectors @ (top.vectors.mT @ f)
    rest = left_directions(left, size=torch.linalg.matrix_norm(f))
    return Directions(
        torch.cat([top.vectors, rest.vectors], dim=1),
        top.cuts + tuple(top.vectors.shape[1] + k for k in rest.cuts[1:]),
    )
