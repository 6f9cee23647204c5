"""Greedy continuations of prompts, through the cache, with or without a map at work in the model."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.chunks import in_chunks
from mechdiff_mlflow.models.sides import Side
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

_BATCH = 32

Tokens = tuple[int, ...]


@torch.no_grad()
def continued(
    side: Side,
    prompts: TokenizedPrompts,
    max_new_tokens: int,
    *,
    attachment: Callable[[Tensor], AbstractContextManager[object]] = lambda index: nullcontext(),
    ends: Collection[int] = (),
) -> tuple[list[Tokens], Tensor]:
    """The most probable next tokens one after another, and the logits of the first [n, vocabulary].

    Each continuation stops with the first token of `ends`, or of those that the checkpoint says end a text,
    which it still has. `attachment` is entered around each batch, given its prompts [b].
    """
    found: dict[int, tuple[Tokens, Tensor]] = {}
    with side.switch():
        model: Any = side.model
        stops = {*ends, *_own_ends(model)}
        pad = side.tokenizer.pad_token_id
        options = {
            "max_new_tokens": max_new_tokens,
            "pad_token_id": min(stops, default=0) if pad is None else pad,
            "eos_token_id": sorted(stops) or None,
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,  # of the checkpoint, it would count tokens of the prompt
            **dict.fromkeys(("temperature", "top_p", "top_k")),  # likewise these would warn
        }
        for chunk in in_chunks(prompts, _BATCH, model.get_input_embeddings().weight.device):
            with attachment(chunk.index):
                out = model.generate(
                    input_ids=chunk.ids,
                    attention_mask=chunk.mask.long(),
                    output_logits=True,
                    return_dict_in_generate=True,
                    **options,
                )
            said = out.sequences[:, chunk.ids.shape[1] :].tolist()
            for i, tokens, logits in zip(chunk.index.tolist(), said, out.logits[0], strict=True):
                found[i] = until_end(tokens, stops), logits
    rows = [found[i] for i in range(len(prompts))]
    return [tokens for tokens, _ in rows], torch.stack([logits for _, logits in rows])


def until_end(tokens: Collection[int], ends: Collection[int]) -> Tokens:
    """The tokens up to the first that ends a turn, which is among them."""
    kept: list[int] = []
    for token in tokens:
        kept.append(token)
        if token in ends:
            break
    return tuple(kept)


def _own_ends(model: Any) -> list[int]:
    """Tokens with which the checkpoint says that a text ends."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if own is None else [own] if isinstance(own, int) else list(own)
