"""Tiny random models and prompts for the engine's tests, and patching written from the definition."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from mechdiff_mlflow.engine import VariantGroup
from mechdiff_mlflow.spec.sites import Hook
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

VOCABULARY = 97


def build(
    config: Any, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start at ones and zeros, which hide mistakes
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def llama(n_layers: int = 4, **kwargs: Any) -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,  # large enough for a patch to matter
    )
    return build(config, **kwargs)


def alive(*kinds: type) -> set[int]:
    """Which objects of these kinds exist, by address: a report of a failure must not print what they hold."""
    return {id(x) for x in gc.get_objects() if issubclass(type(x), kinds)}


def prompts(*lengths: int, from_end: int = 1, seed: int = 0) -> TokenizedPrompts:
    """Random prompts whose position is `from_end` tokens before the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths)
    return TokenizedPrompts(ids, tuple(n - from_end for n in lengths))


def patched_logits(
    model: nn.Module,
    ids: tuple[int, ...],
    position: int,
    module: nn.Module,
    vector: Tensor,
    *,
    is_input: bool = False,
) -> Tensor:
    """Next-token logits of one unpadded prompt with one activation replaced, one plain hook, batch of one."""

    def replace_output(_: nn.Module, args: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden.view(1, len(ids), -1)[:, position] = vector
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def replace_input(_: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, position] = vector
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    if is_input:
        handle = module.register_forward_pre_hook(replace_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(replace_output)
    try:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    finally:
        handle.remove()


def patched_by_definition(
    model: nn.Module, prompts: TokenizedPrompts, module: nn.Module, group: VariantGroup
) -> Tensor:
    """Logits [N, v, vocabulary], one forward each."""
    assert isinstance(group.replacements, Tensor)
    is_input = group.site.hook is Hook.RESID_PRE
    rows = [
        torch.stack([patched_logits(model, ids, position, module, x, is_input=is_input) for x in vectors])
        for ids, position, vectors in zip(prompts.ids, prompts.positions, group.replacements, strict=True)
    ]
    return torch.stack(rows)
