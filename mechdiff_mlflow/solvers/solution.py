"""A solved site: the maps of every rank, each at the cost of a slice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import JSON, AffineMap, Family, Weight
from mechdiff_mlflow.solvers.factors import Factors
from mechdiff_mlflow.spec.choices import Choice


class OffSpan(Choice):
    """Which of the maps that agree on the span of the base training rows is taken, when they span < d_in."""

    ZERO = "zero"
    """The one nearest to 0 (Frobenius): what was not seen in training is dropped."""
    NEAREST_IDENTITY = "nearest_identity"
    """The one nearest to I: what was not seen in training passes unchanged."""

    @classmethod
    def title(cls) -> str:
        """What the word chooses, for errors."""
        return "Off-span rule"

    @classmethod
    def natural(cls, family: Family) -> OffSpan:
        """The rule that leaves rank k what it is: zero for content, the identity for update."""
        return cls.NEAREST_IDENTITY if family is Family.UPDATE else cls.ZERO


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """What one call of a solver found at a site."""

    mean_in: Tensor  # [d_in]
    mean_out: Tensor  # [d_out]
    span: Tensor  # orthonormal axes of the base training rows, [d_in, r_x]
    factors: Factors  # of the weight (content) or of its update W − I (update), zero off the span
    family: Family  # what a rank counts
    ranked: bool  # whether the solver has maps of rank k at all
    meta: Mapping[str, JSON]  # solver, settings and number of rows, for the maps

    @property
    def max_rank(self) -> int:
        """The rank of the full fit; higher ranks give the same map."""
        return len(self.factors.right)

    @property
    def spans_all(self) -> bool:
        """Whether the base training rows span every dimension, so that no off-span rule is needed."""
        return self.span.shape[1] == len(self.span)

    def map(self, rank: int | None = None, off_span: OffSpan | str | None = None) -> AffineMap:
        """The map of rank at most `rank` (less where that would split equal singular values), with alpha 1.

        Without a rank it is the full fit. Without a rule for directions that the training rows do not span
        it follows the family's own, the only one that a map of rank k can follow.

        Raises:
            MechdiffError: The rank is out of range or the solver has none, or the rule does not go with it.
        """
        natural = OffSpan.natural(self.family)
        rule = natural if off_span is None else OffSpan.parse(off_span)
        d_in, d_out = len(self.mean_in), len(self.mean_out)
        check_rank(str(self.meta.get("solver")), self.ranked, rank, min(d_in, d_out))
        if rule is not natural and not self.spans_all and rank is not None:
            raise MechdiffError(
                f"A rank-{rank} map of the {self.family} family cannot treat the "
                f"{d_in - self.span.shape[1]} directions that its training rows do not span as "
                f"{rule}; use {natural}, or the full map."
            )
        if rule is OffSpan.NEAREST_IDENTITY and d_in != d_out:
            raise MechdiffError(
                f"The off-span rule nearest_identity needs equal widths, not {d_in} -> {d_out}; use zero."
            )
        k = self.factors.cuts[self.max_rank if rank is None else min(rank, self.max_rank)]
        left, right = self.factors.left[:, :k], self.factors.right[:k]
        if self.factors.scales is not None:
            right = self.factors.scales[k] * right
        identity = float(self.family is Family.UPDATE)
        if rule is not natural and not self.spans_all:
            # W + (c−c')·(I − VVᵀ) has c' off the span for c in the place of W's own.
            other = float(rule is OffSpan.NEAREST_IDENTITY)
            right = (self.span.mT @ left) @ right + (identity - other) * self.span.mT
            left, identity = self.span, other
        meta = {**self.meta, "rank": rank, "off_span": str(rule), "span_rank": self.span.shape[1]}
        return AffineMap(self.mean_in, self.mean_out, _weight(left, right, identity), meta=meta)


def check_rank(solver: str, ranked: bool, rank: int | None, width: int) -> None:
    """Refuse a rank above the width, and any rank of a solver that has no maps of rank k."""
    if rank is None:
        return
    if not ranked:
        raise MechdiffError(f"The solver {solver} has no maps of rank {rank}; leave the rank out.")
    if not 0 <= rank <= width:
        raise MechdiffError(
            f"Rank {rank} is out of range at a site of width {width}; give 0 to {width}, or full."
        )


def _weight(left: Tensor, right: Tensor, identity: float) -> Weight:
    """identity·I + left @ right, as factors where they are smaller than the product."""
    r, d_in, d_out = len(right), len(left), right.shape[1]
    if r * (d_in + d_out) < d_in * d_out:
        return Weight.low_rank(left, right, identity)
    return Weight(torch.as_tensor(identity, dtype=left.dtype, device=left.device), left @ right)
