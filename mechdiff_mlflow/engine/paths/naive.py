"""The reference: a full forward of every prompt for every variant, with one hook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.chunks import Chunk
from mechdiff_mlflow.engine.model.forward import PromptForward, Recording
from mechdiff_mlflow.engine.model.hooks import tapped
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
            for i, column in enumerate(group.columns):
                value = group.values[:, i]
                clean = recording.clean[group.site]

                def replace(hidden: Tensor, value: Tensor = value, clean: Tensor = clean) -> Tensor:
                    hidden = hidden.clone()
                    span = chunk.spanned(hidden)
                    span.copy_(moved(span, value.unsqueeze(1), clean.unsqueeze(1)))
                    return hidden

                with tapped(self._forward.decoder, group.site, replace, len(chunk)):
                    yield Rows(owner, torch.full_like(owner, column), self._forward(chunk))
