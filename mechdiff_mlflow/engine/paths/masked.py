"""Variants as tokens side by side behind a cached prefix, kept apart by a mask, in public interfaces alone.

For models whose attention cannot be routed. Variants go through all blocks, also below their sites.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache

from mechdiff_mlflow.engine.kernels.attention import Prefix
from mechdiff_mlflow.engine.memory.oom_retry import ChunkLimits
from mechdiff_mlflow.engine.model.architecture import text_config
from mechdiff_mlflow.engine.model.attention_routing import UnsupportedError
from mechdiff_mlflow.engine.model.chunks import Chunk
from mechdiff_mlflow.engine.model.forward import PromptForward, Recording
from mechdiff_mlflow.engine.model.hooks import activation_hook
from mechdiff_mlflow.engine.paths.variants import Rows, Variants, in_parts, moved
from mechdiff_mlflow.spec.sites import Site


@dataclass(frozen=True, slots=True)
class CachedRecording(Recording):
    """A recording with the keys and values of each prompt's prefix, block by block."""

    prefixes: list[tuple[Tensor, Tensor]]


class MaskedPath:
    """One forward that fills a cache, then one of all variants behind it, whose logits are held together.

    Models of which some blocks see a window are not supported: one mask for all cannot say that.
    """

    name = "masked"

    def __init__(self, forward: PromptForward) -> None:
        config = text_config(forward.decoder.model)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"} or getattr(config, "sliding_window", None) is not None:
            raise UnsupportedError("Some blocks of the model see a window of the prompt only.")
        self._forward = forward

    def record(self, chunk: Chunk, sites: Sequence[Site]) -> CachedRecording:
        """The clean run of a chunk, with its cache."""
        # Without the configuration, which would have sliding layers forget what left their window.
        cache = DynamicCache()
        recording = self._forward.record(chunk, sites, past_key_values=cache, use_cache=True)
        n_prefix = chunk.ids.shape[1] - chunk.suffix
        prefixes = [(layer.keys[:, :, :n_prefix], layer.values[:, :, :n_prefix]) for layer in cache.layers]
        return CachedRecording(chunk, recording.clean, recording.logits, prefixes)

    def run(self, recording: Recording, variants: Sequence[Variants], limits: ChunkLimits) -> Iterator[Rows]:
        """Logits of every prompt under every variant."""
        assert isinstance(recording, CachedRecording)
        chunk = recording.chunk
        n_rows = min(limits.max_rows, limits.head_rows) // chunk.suffix
        for prompts, part in in_parts(len(chunk), variants, n_rows):
            columns = [column for group in part for column in group.columns]
            logits = self._forward_rows(recording, prompts, part, len(columns))
            read = torch.arange(prompts.start * chunk.steps, prompts.stop * chunk.steps)
            owner = read.repeat_interleave(len(columns))
            yield Rows(owner, torch.tensor(columns).repeat(len(read)), logits)

    def _forward_rows(
        self, recording: CachedRecording, prompts: slice, part: Sequence[Variants], n_variants: int
    ) -> Tensor:
        chunk, decoder = recording.chunk, self._forward.decoder
        suffix, b = chunk.suffix, prompts.stop - prompts.start
        cache = DynamicCache()  # afresh: a forward appends to it
        for i, (keys, values) in enumerate(recording.prefixes):
            cache.update(keys[prompts], values[prompts], i)
        keys, values = recording.prefixes[0]
        prefix = Prefix(keys[prompts], values[prompts], _seen(chunk.mask[prompts], suffix))
        tree = _tree_mask(prefix, suffix=suffix, variants=n_variants, dtype=keys.dtype)
        with ExitStack() as stack, torch.no_grad():
            first = 0
            for group in part:
                replace = partial(
                    _replace,
                    first=first,
                    values=group.values[prompts],
                    clean=recording.clean[group.site][prompts],
                    chunk=chunk,
                )
                stack.enter_context(activation_hook(decoder, group.site, replace, b))
                first += len(group.columns)
            out = decoder.model(
                input_ids=chunk.ids[prompts, -suffix:].repeat(1, n_variants),
                position_ids=chunk.positions[prompts, -suffix:].repeat(1, n_variants),
                attention_mask=tree,
                past_key_values=cache,
                use_cache=True,
            )
        logits: Tensor = out.logits
        read = logits.view(b, n_variants, suffix, -1)[:, :, -chunk.steps :]
        return read.transpose(1, 2).flatten(0, 2)


def _tree_mask(prefix: Prefix, *, suffix: int, variants: int, dtype: torch.dtype) -> Tensor:
    """A tree of variants on the prefix: [n or 1, 1, V * suffix, prefix + V * suffix], added to scores."""
    one = prefix.added_mask(suffix, dtype)
    n_prefix, tokens = prefix.keys.shape[2], variants * suffix
    hidden = torch.finfo(dtype).min / 2
    own = torch.full(
        (one.shape[0], 1, variants, suffix, variants, suffix), hidden, dtype=dtype, device=one.device
    )
    each = torch.arange(variants, device=one.device)
    own[:, :, each, :, each] = one[..., n_prefix:].unsqueeze(0)
    before = one[..., :n_prefix].repeat(1, 1, variants, 1)
    return torch.cat([before, own.view(one.shape[0], 1, tokens, tokens)], -1)


def _seen(mask: Tensor, suffix: int) -> Tensor:
    """What the last `suffix` of n left-padded prompts [n, length] see: [n, 1, suffix, length]."""
    length = mask.shape[1]
    causal = torch.ones(suffix, length, dtype=torch.bool, device=mask.device).tril(length - suffix)
    return mask[:, None, None] & causal


def _replace(hidden: Tensor, first: int, values: Tensor, clean: Tensor, chunk: Chunk) -> Tensor:
    n, tokens, width = hidden.shape
    hidden = hidden.clone()
    variants = hidden.view(n, tokens // chunk.suffix, chunk.suffix, width)
    span = variants[:, first : first + values.shape[1], : chunk.span]  # [n, v, span, width]
    span.copy_(moved(span, values, clean.unsqueeze(1)))
    return hidden
