"""Means and centred second moments of paired rows, in one pass and float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError


@dataclass(frozen=True, slots=True, eq=False)
class PairedMoments:
    """What n paired rows x [n, d_in], y [n, d_out] leave behind when the rows are gone.

    Moments of disjoint batches add: `a + b` are the moments of the batches together, in whatever way the
    rows were cut.

    Reference: Chan, Golub & LeVeque (1983), Algorithms for computing the sample variance.
    """

    n: int  # number of rows
    mean_x: Tensor  # [d_in]
    mean_y: Tensor  # [d_out]
    sxx: Tensor  # Σ (x−x̄)ᵀ(x−x̄), [d_in, d_in]; not divided by n
    syy: Tensor  # the same of y, [d_out, d_out]
    sxy: Tensor  # Σ (x−x̄)ᵀ(y−ȳ), [d_in, d_out]

    @classmethod
    def from_rows(cls, x: Tensor, y: Tensor) -> PairedMoments:
        """The moments of one batch, of any dtype; a batch of one row is allowed.

        Raises:
            MechdiffError: The rows are not paired or some are not finite.
        """
        x, y = paired_rows(x, y)
        mean_x, mean_y = x.mean(0), y.mean(0)
        xc, yc = x - mean_x, y - mean_y
        return cls(len(x), mean_x, mean_y, xc.mT @ xc, yc.mT @ yc, xc.mT @ yc)

    def __add__(self, other: PairedMoments) -> PairedMoments:
        if (self.d_in, self.d_out) != (other.d_in, other.d_out):
            raise MechdiffError(
                f"Moments of {self.d_in} -> {self.d_out} dimensions cannot be added to those of "
                f"{other.d_in} -> {other.d_out}; keep sites apart."
            )
        n = self.n + other.n
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        share = self.n * other.n / n
        return PairedMoments(
            n,
            self.mean_x + dx * (other.n / n),
            self.mean_y + dy * (other.n / n),
            self.sxx + other.sxx + share * torch.outer(dx, dx),
            self.syy + other.syy + share * torch.outer(dy, dy),
            self.sxy + other.sxy + share * torch.outer(dx, dy),
        )

    @property
    def d_in(self) -> int:
        """Width of x."""
        return len(self.mean_x)

    @property
    def d_out(self) -> int:
        """Width of y."""
        return len(self.mean_y)


def paired_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both [n, ·] in float64, once it is sure that they can be fitted.

    Raises:
        MechdiffError: They are not two matrices of the same number (at least one) of finite rows.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) == 0:
        raise MechdiffError(
            f"Base and tuned activations are paired row by row, and their shapes are {list(x.shape)} and "
            f"{list(y.shape)}; give [n, d] of both over the same prompts."
        )
    x, y = x.double(), y.double()
    for name, rows in (("base", x), ("tuned", y)):
        n_bad = int((~torch.isfinite(rows).all(1)).sum())
        if n_bad:
            raise MechdiffError(
                f"{n_bad} of {len(rows)} rows of {name} activations have NaN or infinite entries; "
                "record them in a wider dtype or leave those prompts out."
            )
    return x, y
