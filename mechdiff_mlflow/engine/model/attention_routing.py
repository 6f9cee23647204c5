"""Whose attention function the model calls: while a path runs, ours.

transformers looks attention up by a name in the configuration; ours calls what is put on the module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechdiff_mlflow.engine.model.architecture import Decoder, text_config
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
    """The function behind an implementation, if the module uses transformers' attention interface."""
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
