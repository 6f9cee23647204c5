"""Every solver written from its definition: d×d matrices, one rank at a time, no tricks.

What the fast solvers are tested against, and the dense route that `benchmarks/fits.py` times.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_weight(
    solver: str, x: Tensor, y: Tensor, family: str, rank: int | None, off_span: str, **settings: object
) -> Tensor:
    """W [d_in, d_out] of paired rows; `off_span` is "zero" or "nearest_identity"."""
    xc, yc = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return DENSE[solver](xc, yc, family, rank, off_span, **settings)


def procrustes_scaled(
    xc: Tensor, yc: Tensor, family: str, rank: int | None, off_span: str, *, shrink: float = 0.05
) -> Tensor:
    whiten, colour = power(shrunk_covariance(xc, shrink), -0.5), power(shrunk_covariance(yc, shrink), 0.5)
    return rotation(xc, yc, whiten, colour, power(colour, -1), family, rank, off_span, stretch=True)


def procrustes(xc: Tensor, yc: Tensor, family: str, rank: int | None, off_span: str) -> Tensor:
    eye_in, eye_out = eye(xc.shape[1]), eye(yc.shape[1])
    return rotation(xc, yc, eye_in, eye_out, eye_out, family, rank, off_span, stretch=False)


def rotation(
    xc: Tensor,
    yc: Tensor,
    whiten_x: Tensor,
    colour_y: Tensor,
    whiten_y: Tensor,
    family: str,
    rank: int | None,
    off_span: str,
    *,
    stretch: bool,
) -> Tensor:
    xw, yw = xc @ whiten_x, yc @ whiten_y
    u, s, vh = torch.linalg.svd(xw.mT @ yw)
    k = int((s > s[0] * max(xw.shape[1], yw.shape[1]) * torch.finfo(s.dtype).eps).sum())
    if family == "content" and rank is not None:
        k = min(rank, k)
    scale = s[:k].sum() / ((xw @ u[:, :k]) ** 2).sum() if stretch and k else 1.0
    weight = whiten_x @ (scale * u[:, :k] @ vh[:k]) @ colour_y
    if family == "content":
        return weight if rank is not None else off_the_span(weight, xc, off_span)
    weight = off_the_span(weight, xc, off_span)
    return weight if rank is None else eye(len(weight)) + truncated(weight - eye(len(weight)), rank)


def ridge(
    xc: Tensor, yc: Tensor, family: str, rank: int | None, off_span: str, *, ridge: float = 1e-2
) -> Tensor:
    start = prior(xc, yc, family)
    update = least_squares(xc, yc - xc @ start, ridge)
    if rank is not None:
        return start + truncated(update, rank)
    return off_the_span(start + update, xc, off_span)


def reduced_rank(
    xc: Tensor,
    yc: Tensor,
    family: str,
    rank: int | None,
    off_span: str,
    *,
    ridge: float = 1e-2,
    output_metric: str = "identity",
    shrink: float = 0.05,
    fisher: Tensor | None = None,
) -> Tensor:
    start, d = prior(xc, yc, family), yc.shape[1]
    update = least_squares(xc, yc - xc @ start, ridge)
    if rank is None:
        return off_the_span(start + update, xc, off_span)
    if output_metric == "identity":
        root = eye(d)
    elif output_metric == "tuned_covariance":
        root = power(shrunk_covariance(yc, shrink), -0.5)
    else:
        assert fisher is not None
        root = power(fisher.mT @ fisher, 0.5)
    # Mukherjee & Zhu: the ridge as extra rows, and the fitted values of these cut to rank k.
    penalty = ridge * (xc**2).sum() / xc.shape[1]
    rows = torch.cat([xc, penalty.sqrt() * eye(xc.shape[1])])
    top = torch.linalg.svd(rows @ update @ root, full_matrices=False).Vh[:rank]
    return start + update @ root @ top.mT @ top @ torch.linalg.inv(root)


def logit_subspace(
    xc: Tensor,
    yc: Tensor,
    family: str,
    rank: int | None,
    off_span: str,
    *,
    basis: Tensor,
    ridge: float = 1e-2,
) -> Tensor:
    start = prior(xc, yc, family)
    projector = torch.linalg.pinv(basis) @ basis
    seen = xc @ start + (yc - xc @ start) @ projector
    return reduced_rank(xc, seen, family, rank, off_span, ridge=ridge)


def no_update(xc: Tensor, yc: Tensor, family: str, rank: int | None, off_span: str) -> Tensor:
    return off_the_span(eye(xc.shape[1]), xc, off_span)


DENSE = {
    "procrustes_scaled": procrustes_scaled,
    "procrustes": procrustes,
    "ridge": ridge,
    "reduced_rank": reduced_rank,
    "logit_subspace": logit_subspace,
    "mean_shift": no_update,
    "identity": no_update,
}


def shrunk_covariance(rows: Tensor, shrink: float) -> Tensor:
    cov = rows.mT @ rows / (len(rows) - 1)
    return (1 - shrink) * cov + shrink * cov.trace() / len(cov) * eye(len(cov))


def least_squares(xc: Tensor, target: Tensor, ridge: float) -> Tensor:
    """(XᵀX + p·I)⁻¹XᵀT, or the least-norm solution for p = 0."""
    gram = xc.mT @ xc
    if ridge == 0:
        return torch.linalg.pinv(xc) @ target
    return torch.linalg.solve(gram + ridge * gram.trace() / len(gram) * eye(len(gram)), xc.mT @ target)


def prior(xc: Tensor, yc: Tensor, family: str) -> Tensor:
    return eye(xc.shape[1]) if family == "update" else xc.new_zeros(xc.shape[1], yc.shape[1])


def off_the_span(weight: Tensor, xc: Tensor, off_span: str) -> Tensor:
    """The map that agrees with `weight` on the span of the rows and follows the rule off it."""
    projector = torch.linalg.pinv(xc) @ xc
    on_span = projector @ weight
    return on_span if off_span == "zero" else on_span + eye(len(projector)) - projector


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    # Of two equal singular values neither comes first: take both or none.
    while 0 < rank < len(s) and s[rank - 1] - s[rank] <= 1e-8 * s[0]:
        rank -= 1
    return u[:, :rank] * s[:rank] @ vh[:rank]


def power(symmetric: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values**exponent @ vectors.mT


def eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)  # on the default device
