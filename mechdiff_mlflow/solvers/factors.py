"""What a solver returns: factors of every rank at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TIE = 1e-8
"""Singular values closer than this, as a fraction of the largest, count as equal."""


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """The leading directions of a matrix, by falling singular value."""

    vectors: Tensor  # orthonormal columns, [·, r], those of singular values above rounding
    # For k = 0 … r the most directions that k has room for without splitting equal singular values: which of
    # two equal ones LAPACK puts first is not a finding. (A rotation minus the identity has them in pairs.)
    cuts: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """W_k = W₀ + scales[k] · left[:, :k] @ right[:k], W₀ = I or 0 with the family; only for k in `cuts`."""

    left: Tensor  # [d_in, r], within the axes that x spans
    right: Tensor  # [r, d_out]
    cuts: tuple[int, ...]  # for each rank 0 … r the k to take, as in `Directions`
    scales: Tensor | None = None  # [r + 1], or None for 1


def leading(u: Tensor, s: Tensor, longest: int, size: Tensor | None = None) -> Directions:
    """The directions u whose falling singular values s are not rounding, see `n_above_rounding`."""
    r = n_above_rounding(s, longest, size)
    values, cuts = s[:r].tolist(), [0]
    for k in range(1, r + 1):
        split = k < r and values[k - 1] - values[k] <= TIE * values[0]
        cuts.append(cuts[-1] if split else k)
    return Directions(u[:, :r], tuple(cuts))


def n_above_rounding(s: Tensor, longest: int, size: Tensor | None = None) -> int:
    """How many falling singular values s of a matrix, `longest` on its longer side, are not rounding.

    Rounding is measured against `size`, s[0] unless given.
    """
    if len(s) == 0:
        return 0
    return int((s > (s[0] if size is None else size) * longest * torch.finfo(s.dtype).eps).sum())


def left_directions(f: Tensor, size: Tensor | None = None) -> Directions:
    """The left singular vectors of f [r, d]."""
    # Through fᵀ = Q·R, whose Q is not formed: f has the left singular vectors of Rᵀ.
    triangle = torch.linalg.qr(f.mT, mode="r").R
    u, s, _ = torch.linalg.svd(triangle.mT, full_matrices=False)
    return leading(u, s, max(f.shape), size)


def best_ranks(axes: Tensor, f: Tensor) -> Factors:
    """The best approximations of axes @ f of every rank in Frobenius norm, for orthonormal axes [d, r].

    Reference: Eckart & Young (1936), The approximation of one matrix by another of lower rank.
    """
    top = left_directions(f)
    return Factors(axes @ top.vectors, top.vectors.mT @ f, top.cuts)
