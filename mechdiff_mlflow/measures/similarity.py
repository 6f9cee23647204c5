"""How alike activations are: of base and tuned, and of mapped and tuned. No model is run for these.

Rows that are not paired or not finite are a `MechdiffError`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError


def debiased_cka(x: Tensor, y: Tensor) -> float | None:
    """Linear centred kernel alignment with the unbiased HSIC: near 0 for unrelated rows even when n < d.

    1 for rows that differ by a rotation, a stretch and a shift; may be a little below 0. None when x or y
    does not vary, or its unbiased HSIC with itself is not above 0: there is nothing to compare with.

    Raises:
        MechdiffError: The rows x [n, d_in], y [n, d_out] are not paired, not finite or fewer than 4.

    Reference: Song et al. (2012), Feature selection via dependence maximization, eq. 5; Nguyen, Raghu &
        Kornblith (2021), Do wide and deep networks learn the same things?
    """
    x, y = paired_rows(x, y)
    if len(x) < 4:
        raise MechdiffError(f"Debiased CKA needs at least 4 prompts, not {len(x)}; give more.")
    xc, yc = _centred(x), _centred(y)  # HSIC ignores the mean; this keeps the rounding small
    if xc is None or yc is None:
        return None
    k = (xc @ xc.mT).fill_diagonal_(0.0)
    l = (yc @ yc.mT).fill_diagonal_(0.0)  # noqa: E741  (as in the paper)
    own_k, own_l = _hsic(k, k), _hsic(l, l)
    if own_k <= 0 or own_l <= 0:
        return None
    return _hsic(k, l) / math.sqrt(own_k * own_l)


def rho(x: Tensor, y: Tensor, mapped: Tensor) -> float | None:
    """‖Y − Ŷ‖ / ‖Y − X‖: the part of the change that the map leaves; no unit. None where nothing changed.

    X are base, Y tuned and Ŷ mapped base activations of the same prompts, [n, d] each.
    """
    x, y = paired_rows(x, y)
    mapped, _ = paired_rows(mapped, y)
    if x.shape != y.shape or mapped.shape != y.shape:
        raise MechdiffError(
            f"ρ compares activations of one width, not {x.shape[1]}, {y.shape[1]} and {mapped.shape[1]}; it "
            "has no meaning for this pair."
        )
    change = float((y - x).norm())
    return float((y - mapped).norm()) / change if change > 0 else None


def centred_cosines(y: Tensor, mapped: Tensor, mean: Tensor) -> Tensor:
    """cos(ŷ − μ_t, y − μ_t) of each prompt, float64 [n]; NaN where either has no length.

    μ_t is the tuned `mean` [d] over the training prompts; tuned y and mapped ŷ are [n, d].
    """
    y, mapped = paired_rows(y, mapped)
    a, b = y - mean.to(y), mapped - mean.to(y)
    lengths: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / lengths


def explained_variance(y: Tensor, mapped: Tensor) -> float | None:
    """1 − ‖Y − Ŷ‖² / ‖Y − ȳ‖² of [n, d] each: 1 is perfect, 0 what the mean gives; None if y is constant."""
    y, mapped = paired_rows(y, mapped)
    centred = _centred(y)
    return None if centred is None else 1.0 - float(((y - mapped) ** 2).sum() / (centred**2).sum())


def paired_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both [n, ·] in float64, if they are matrices of as many finite rows, at least one; else an error."""
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


def _centred(rows: Tensor) -> Tensor | None:
    """Rows [n, d] without their mean, or None when what is left is rounding."""
    centred = rows - rows.mean(0)
    return centred if float(centred.norm()) > 1e-14 * float(rows.norm()) else None


def _hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """n(n−3) times the unbiased HSIC of Gram matrices [n, n] whose diagonals are 0."""
    n = len(k)
    rows_k, rows_l = k.sum(0), l.sum(0)
    both = rows_k.sum() * rows_l.sum() / ((n - 1) * (n - 2))
    return float((k * l).sum() + both - 2.0 / (n - 2) * (rows_k @ rows_l))
