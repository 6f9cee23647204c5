"""A planted change: a tuned model that differs from its base at one site, by an operator that is known.

What a sublayer adds to the residual stream is z·Wᵀ for the weight W of its last projection. With
W ← α·Mᵀ·W and M = I + gain·U·Vᵀ (U and V orthonormal, [d, r]) the tuned activation at that site is exactly
y = α·x·M on every prompt, x being the base's, and nothing below the site differs.

What can be found again. A map gives ŷ = a·((x − μ_b)·W + m), so data fix the products a·W = α·M and
a·m = α·μ_b·M, and never a and W by themselves: α multiplies the mean too. α gets a meaning by asking that W
be the identity but for few directions. Then a = α, since no other multiple of α·M has an update of rank r
(for r < d/2), and rank(W − I) = r. A fit to y itself has a = 1 and W = α·M, whose update
(α − 1)·I + α·gain·U·Vᵀ is of full rank unless α = 1. So fit with `--alpha-fit inside`, which fits y/α.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.exact import text_of
from mechdiff_mlflow.maps import Weight
from mechdiff_mlflow.sites import Hook, Site

_LAST_PROJECTION = {Hook.ATTN_OUT: "o_proj", Hook.MLP_OUT: "down_proj"}
_FORM = "<hook>:L<layer>:r<rank>[:alpha<α>][:gain<gain>][:seed<seed>]"


@dataclass(frozen=True, slots=True)
class Plant:
    """What is planted, written `attn_out:L14:r4:alpha0.7:gain100:seed0`; the last three have defaults.

    Args:
        site: Where; `attn_out` or `mlp_out`.
        rank: r of M − I, at least 1.
        alpha: α above 0, multiplies everything, the mean included.
        gain: All r singular values of M − I, above 0. Sublayers late in a model add little to the residual
            stream, so a change that moves the output is large beside what they add.
        seed: Of U and V.

    Raises:
        MechdiffError: A value is out of range, or no weight makes the change at that hook exact.
    """

    site: Site
    rank: int
    alpha: float = 1.0
    gain: float = 100.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.site.hook not in _LAST_PROJECTION:
            raise MechdiffError(
                f"Nothing can be planted at {self.site}: what is there also passes around the sublayers, so "
                "no edit of weights multiplies it; plant at attn_out or mlp_out."
            )
        if self.rank < 1:
            raise MechdiffError(f"The planted rank is {self.rank}; give at least 1.")
        for name, value in (("alpha", self.alpha), ("gain", self.gain)):
            if not 0 < value < math.inf:
                raise MechdiffError(f"The planted {name} is {text_of(value)}; give a finite number above 0.")

    def __str__(self) -> str:
        return (
            f"{self.site.hook}:L{self.site.layer}:r{self.rank}:alpha{text_of(self.alpha)}:gain{text_of(self.gain)}"
            f":seed{self.seed}"
        )

    def check_width(self, d: int) -> None:
        """Make sure that the change can be planted in d dimensions.

        Raises:
            MechdiffError: The rank is above d/4, where a scaled change could not be told from others.
        """
        if self.rank > d // 4:
            raise MechdiffError(
                f"Rank {self.rank} is too much to plant in {d} dimensions, where α would be lost; give at "
                f"most {d // 4}."
            )

    @property
    def slug(self) -> str:
        """For the pair's name, without defaults: `attn_out-L14-r4-alpha0_7`."""
        parts = [str(self.site.hook), f"L{self.site.layer}", f"r{self.rank}", f"alpha{text_of(self.alpha)}"]
        parts += [f"gain{text_of(self.gain)}"] if self.gain != 100.0 else []
        parts += [f"seed{self.seed}"] if self.seed else []
        return re.sub(r"[^\w-]", "_", "-".join(parts))

    @classmethod
    def parse(cls, text: str) -> Plant:
        """Read `attn_out:L14:r4:alpha0.7`, with or without the optional parts.

        Raises:
            MechdiffError: The text is not of that form, or a value is out of range.
        """
        number = r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)"
        found = re.fullmatch(
            rf"(\w+):L(\d{{1,6}}):r(\d{{1,6}})(?::alpha{number})?(?::gain{number})?(?::seed(\d{{1,9}}))?",
            text,
        )
        if found is None:
            raise MechdiffError(f"Plant {text!r} is not of the form {_FORM}; write attn_out:L14:r4:alpha0.7.")
        hook, layer, rank, alpha, gain, seed = found.groups()
        site = Site(int(layer), Hook.parse(hook))
        return cls(site, int(rank), float(alpha or 1.0), float(gain or 100.0), int(seed or 0))


def operator(plant: Plant, weight: Tensor) -> Weight:
    """M = I + gain·U·Vᵀ for a projection, float64 [d, d].

    U is a random rotation of the directions that the projection writes most to, so that every one of the r
    directions carries something; V is uniformly random.

    Args:
        plant: What is planted.
        weight: Of the projection, [d, width of its input].

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
    """Edit the last projection of a sublayer so that it adds α·x·M where it added x; M.

    Exact up to the rounding of the edited weight to the model's dtype.

    Args:
        plant: What is planted.
        sublayer: The module whose output is the activation at the plant's site; changed in place.

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
