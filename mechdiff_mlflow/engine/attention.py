"""Attention of patched tokens: every variant of a prompt sees the prompt's prefix and itself, nothing else.

transformers calls attention by a name in the configuration. While a path runs, that name is one of ours, and
ours calls whatever function the path has put on the attention module. So no global state says which engine is
at work, and two engines on two models can take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechdiff_mlflow.engine.architecture import Decoder, text_config
from mechdiff_mlflow.errors import MechdiffError

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""transformers' attention interface: (module, query, key, value, mask, **kwargs) -> (output, weights)."""

_SLOT = "_mechdiff_attend"
_ROUTED = "mechdiff_"
_IMPLEMENTATIONS = ("sdpa", "eager")


class UnsupportedError(MechdiffError):
    """This way of computing patched runs cannot do this model; another can."""


def _routed(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    attend: Attend = getattr(module, _SLOT)
    return attend(module, *args, **kwargs)


for _name in _IMPLEMENTATIONS:
    ALL_ATTENTION_FUNCTIONS.register(_ROUTED + _name, _routed)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ROUTED + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def implementation(decoder: Decoder) -> str:
    """What the engine computes attention with: the model's own implementation if "eager", else "sdpa"."""
    own = text_config(decoder.model)._attn_implementation or "eager"
    return "eager" if own.removeprefix(_ROUTED) == "eager" else "sdpa"


def plain_attention(decoder: Decoder) -> AbstractContextManager[None]:
    """Run a model that was loaded with some other kernel, such as flash attention, with "sdpa"."""
    own = text_config(decoder.model)._attn_implementation or "eager"
    if own.removeprefix(_ROUTED) in _IMPLEMENTATIONS:
        return nullcontext()
    return attention_implementation(decoder, "sdpa")


@contextmanager
def attention_implementation(decoder: Decoder, name: str) -> Iterator[None]:
    """Have the model compute attention with the implementation called `name`."""
    attentions = [block.attention for block in decoder.blocks]
    owners = [decoder.model, *attentions]
    configs = {id(c): c for c in (getattr(owner, "config", None) for owner in owners) if c is not None}
    text = text_config(decoder.model)
    configs[id(text)] = text
    # The public setter also writes to sub-configurations, which may differ from their parent.
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation_internal = own


@contextmanager
def routed(decoder: Decoder, attends: Sequence[Attend]) -> Iterator[None]:
    """Have block i, which has an attention, compute it with `attends[i]`."""
    with ExitStack() as stack:
        for block, attend in zip(decoder.blocks, attends, strict=True):
            assert block.attention is not None
            setattr(block.attention, _SLOT, attend)
            stack.callback(delattr, block.attention, _SLOT)
        stack.enter_context(attention_implementation(decoder, _ROUTED + implementation(decoder)))
        yield


def own_attention(attention: nn.Module | None, name: str) -> Attend:
    """The function behind an implementation: "eager" is defined beside the model, and others may be.

    Raises:
        UnsupportedError: There is no attention, or it does not use transformers' attention interface.
    """
    if attention is None:
        raise UnsupportedError("Some blocks of the model have no attention that was recognised.")
    for cls in type(attention).__mro__:
        module = sys.modules[cls.__module__]
        if name == "eager" and hasattr(module, "eager_attention_forward"):
            eager: Attend = module.eager_attention_forward
            return eager
        if name != "eager" and hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
            fused: Attend = module.ALL_ATTENTION_FUNCTIONS[name]
            return fused
    raise UnsupportedError(f"{type(attention).__name__} does not use transformers' attention interface.")


@dataclass(frozen=True, slots=True)
class Prefix:
    """What patched tokens of one block can see of n prompts.

    Args:
        keys: [n, key heads, prefix, head width], rotated.
        values: [n, key heads, prefix, value width].
        mask: What each of the S suffix positions sees of prefix and suffix [n or 1, 1, S, prefix + S],
            boolean or added to the scores; None when that is the prefix and the suffix up to itself.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def of(self, prompts: slice) -> Prefix:
        """For some of the prompts."""
        mask = self.mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[prompts]
        return Prefix(self.keys[prompts], self.values[prompts], mask)

    def first(self) -> Prefix:
        """For the first suffix position alone."""
        mask = None if self.mask is None else self.mask[:, :, :1, : self.keys.shape[2] + 1]
        return Prefix(self.keys, self.values, mask)

    def added_mask(self, suffix: int, dtype: torch.dtype) -> Tensor:
        """The mask [n or 1, 1, S, prefix + S] as numbers added to scores, large and negative where hidden."""
        # Half the smallest number: finite, so that a row with all of its prefix hidden is no NaN.
        hidden = torch.finfo(dtype).min / 2
        if self.mask is None:
            device, n_prefix = self.keys.device, self.keys.shape[2]
            mask = torch.zeros(1, 1, suffix, n_prefix + suffix, dtype=dtype, device=device)
            later = torch.ones(suffix, suffix, dtype=torch.bool, device=device).triu(1)
            mask[..., n_prefix:].masked_fill_(later, hidden)
            return mask
        if self.mask.dtype == torch.bool:
            return torch.zeros_like(self.mask, dtype=dtype).masked_fill_(~self.mask, hidden)
        return self.mask.to(dtype).clamp(min=hidden)


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    *,
    suffix: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of V variants of `suffix` tokens each, as if each variant followed the prefix alone.

    Softmax over the prefix and softmax over a variant's own tokens are merged by their log-sum-exp, so no
    score between two variants is computed.

    Args:
        query: [n, heads, V * suffix, head width], variant by variant.
        key: [n, key heads, V * suffix, head width].
        value: [n, key heads, V * suffix, value width].
        prefix: Of the same n prompts.
        suffix: Tokens of each variant.
        scale: Multiplies the scores.
        softcap: Scores become softcap * tanh(score / softcap).
        sinks: Per head a score that takes its share of the softmax and adds nothing [heads].

    Returns:
        [n, V * suffix, heads, value width]
    """
    n, heads, tokens, _ = query.shape
    key_heads, n_prefix = key.shape[1], prefix.keys.shape[2]
    groups, variants = heads // key_heads, tokens // suffix
    accumulate = torch.promote_types(query.dtype, torch.float32)
    mask = None if prefix.mask is None and suffix == 1 else prefix.added_mask(suffix, accumulate)

    def capped(scores: Tensor) -> Tensor:
        scores = scores.to(accumulate) * scale
        return scores if softcap is None else softcap * torch.tanh(scores / softcap)

    # Scores are [n, key heads, groups * V, suffix, keys].
    rows = query.reshape(n, key_heads, groups * tokens, -1)
    before = capped(rows @ prefix.keys.transpose(-1, -2)).view(n, key_heads, -1, suffix, n_prefix)
    by_variant = query.reshape(n, key_heads, groups, variants, suffix, -1)
    own_keys = key.reshape(n, key_heads, 1, variants, suffix, -1)
    own_values = value.reshape(n, key_heads, 1, variants, suffix, -1)
    if suffix == 1:
        own = (by_variant * own_keys).sum(-1, dtype=accumulate, keepdim=True)
    else:
        own = by_variant @ own_keys.transpose(-1, -2)
    own = capped(own).view(n, key_heads, -1, suffix, suffix)
    if mask is not None:
        before = before + mask[..., :n_prefix].unsqueeze(2)
        own = own + mask[..., n_prefix:].unsqueeze(2)

    scores = torch.cat([before, own], -1)
    if sinks is not None:
        sink = sinks.to(accumulate).view(1, key_heads, groups, 1, 1, 1)
        sink = sink.expand(n, -1, -1, variants, suffix, 1).reshape(n, key_heads, -1, suffix, 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1).to(value.dtype)
    out = weights[..., :n_prefix].reshape(n, key_heads, groups * tokens, n_prefix) @ prefix.values
    own_weights = weights[..., n_prefix : n_prefix + suffix].reshape(
        n, key_heads, groups, variants, suffix, suffix
    )
    mixed = own_weights * own_values if suffix == 1 else own_weights @ own_values
    out = out.view(mixed.shape) + mixed
    return out.reshape(n, heads, tokens, -1).transpose(1, 2)


def concat_mask(prefix: Prefix, *, suffix: int, variants: int, dtype: torch.dtype) -> Tensor:
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
