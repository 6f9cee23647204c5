"""A planted change: a tuned model that differs from its base at one site, by an operator that is known.

What a sublayer adds to the residual stream is z·Wᵀ for the weight W of its last projection. With
W ← α·Mᵀ·W and M = I + gain·U·Vᵀ (U and V orthonormal, [d, r]) the tuned activation at that site is exactly
y = α·x·M on every prompt, x being the base's, and nothing below the site differs.

A map ŷ = a·((x − μ_b)·W + m) fixes a·W = α·M alone. With W the identity but for few directions a = α, since
no other multiple of α·M has an update of rank r < d/2; so fit with `--alpha-fit inside`, which fits y/α.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import Weight
from mechdiff_mlflow.spec.plant import Plant
from mechdiff_mlflow.spec.sites import Hook

_LAST_PROJECTION = {Hook.ATTN_OUT: "o_proj", Hook.MLP_OUT: "down_proj"}


def operator(plant: Plant, weight: Tensor) -> Weight:
    """M = I + gain·U·Vᵀ for a projection of weight [d, width of its input], float64 [d, d].

    U is a random rotation of the directions that the projection writes most to, so that each of the r
    directions carries something; V is uniformly random.

    Raises:
        MechdiffError: The rank is too high.
    """
    d = len(weight)
    plant.check_width(d)
    generator = torch.Generator().manual_seed(plant.seed)
    n_written = min(2 * plant.rank, *weight.shape)
    written = torch.linalg.svd(weight.double().cpu(), full_matrices=False).U[:, :n_written]
    u = written @ _frame(n_written, plant.rank, generator)
    v = _frame(d, plant.rank, generator)
    return Weight.low_rank(plant.gain * u, v.mT, 1.0)


def plant_in(plant: Plant, sublayer: nn.Module) -> Weight:
    """Edit the last projection of a sublayer, in place, so that it adds α·x·M where it added x; returns M.

    Raises:
        MechdiffError: It does not end in a projection that we know, or the rank is too high.
    """
    name = _LAST_PROJECTION[plant.site.hook]
    projection = getattr(sublayer, name, None)
    if not isinstance(projection, nn.Linear):
        raise MechdiffError(
            f"Nothing can be planted at {plant.site}: {type(sublayer).__name__} does not end in a linear "
            f"{name}; plant in a Llama-like base."
        )
    m = operator(plant, projection.weight)
    with torch.no_grad():
        weight, bias = projection.weight, projection.bias
        weight.copy_((plant.alpha * m(weight.double().cpu().mT)).mT)
        if bias is not None:
            bias.copy_(plant.alpha * m(bias.double().cpu()))
    return m


def _frame(d: int, r: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns, uniformly random, [d, r]."""
    q, upper = torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=generator))
    frame: Tensor = q * upper.diagonal().sign()
    return frame
