"""The reference: a full forward of every prompt for every variant, with one hook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.chunks import Chunk
from mechdiff_mlflow.engine.model.forward import PromptForward, Recording
from mechdiff_mlflow.engine.model.hooks import activation_hook
from mechdiff_mlflow.engine.paths.variants import Rows, Variants, moved
from mechdiff_mlflow.spec.sites import Site


class NaivePath:
    """Slow, obvious, and right for any model whose sites can be hooked."""

    name = "naive"

    def __init__(self, forward: PromptForward) -> None:
        self._forward = forward

    def record(self, chunk: Chunk, sites: Sequence[Site]) -> Recording:
        """The clean run of a chunk."""
        return self._forward.record(chunk, sites)

    def run(self, recording: Recording, variants: Sequence[Variants]) -> Iterator[Rows]:
        """Logits of every prompt under every variant, one variant at a time."""
        chunk = recording.chunk
        owner = torch.arange(len(chunk))
        for group in variants:
            clean = recording.clean[group.site].unsqueeze(1)
            for i, column in enumerate(group.columns):
                edit = partial(_replace, chunk, group.values[:, i].unsqueeze(1), clean)
                with activation_hook(self._forward.decoder, group.site, edit, len(chunk)):
                    yield Rows(owner, torch.full_like(owner, column), self._forward(chunk))


def _replace(chunk: Chunk, value: Tensor, clean: Tensor, hidden: Tensor) -> Tensor:
    hidden = hidden.clone()
    span = chunk.spanned(hidden)
    span.copy_(moved(span, value, clean))
    return hidden
