"""Places in the residual stream, a layer and a hook each, and positions: the tokens that are read there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.choices import Choice
from mechdiff_mlflow.text import cut


class Hook(Choice):
    """Where in a decoder block an activation is read or replaced (TransformerLens' names)."""

    RESID_PRE = "resid_pre"
    """Enters the block."""
    ATTN_OUT = "attn_out"
    """What the attention sublayer adds to the residual stream."""
    MLP_OUT = "mlp_out"
    """What the MLP sublayer adds to the residual stream."""
    RESID_POST = "resid_post"
    """Leaves the block."""


SUBLAYERS = (Hook.ATTN_OUT, Hook.MLP_OUT)
"""Hooks where one place acts by itself; what enters or leaves a block is the sum of all before it."""


class Position(Choice):
    """The token, or mean of tokens, that is read and replaced; KL is always read at the last token."""

    DECISION = "decision"
    """The last token of the templated prompt, whose next token is the first of the answer (K=1)."""
    LAST_CONTENT = "last_content"
    """The last non-special token of the user's text."""
    CONTENT_MEAN = "content_mean"
    """All tokens of the user's text: their mean is read, and all are moved by the same vector."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One place in the residual stream, written `L12/resid_post`; layers are counted from 0."""

    layer: int
    hook: Hook

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise MechdiffError(f"Layer {self.layer} is negative; layers are counted from 0.")

    def __str__(self) -> str:
        return f"L{self.layer}/{self.hook}"

    @property
    def slug(self) -> str:
        """The site where `/` is refused, as in registered model names: `L12-resid_post`."""
        return f"L{self.layer}-{self.hook}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read `L12/resid_post` (or the slug `L12-resid_post`); raises `MechdiffError` for anything else."""
        match = re.fullmatch(r"L(\d{1,6})[/-](\w+)", text)
        if match is None:
            raise MechdiffError(
                f"Site {cut(text)!r} is not of the form L<layer>/<hook>; write e.g. L26/attn_out."
            )
        return cls(int(match[1]), Hook.parse(match[2]))
