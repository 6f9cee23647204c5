"""A known change that is planted in a base to make its tuned model."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.text import text_of

HOOKS = (Hook.ATTN_OUT, Hook.MLP_OUT)  # what a sublayer adds
_FORM = "<hook>:L<layer>:r<rank>[:alpha<α>][:gain<gain>][:seed<seed>]"


@dataclass(frozen=True, slots=True)
class Plant:
    """A planted change, written `attn_out:L14:r4:alpha0.7:gain100:seed0`; the last three have defaults.

    Raises:
        MechdiffError: A value is out of range, or no weight makes the change at that hook exact.
    """

    site: Site
    rank: int  # r of M − I
    alpha: float = 1.0  # multiplies everything, the mean included
    gain: float = 100.0  # all r singular values of M − I; late sublayers add little to the residual stream
    seed: int = 0  # of U and V

    def __post_init__(self) -> None:
        if self.site.hook not in HOOKS:
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
        """Refuse a rank above d/4 in d dimensions, where a scaled change could not be told from others."""
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
        """Read `attn_out:L14:r4:alpha0.7`, with or without the optional parts; raises `MechdiffError`."""
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
