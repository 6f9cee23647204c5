"""Where the blocks, attentions and MLPs of a decoder live, and which module's output is a site.

`attn_out` and `mlp_out` are what a sublayer adds to the residual stream: its own output, that of a norm after
it (Gemma 2, OLMo 2), or of its last projection where it adds the stream itself (Bloom, MPT). OPT has no MLP
module, and its block adds the output of `fc2`. Granite's outputs are added times a constant.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Hook, Site

_ATTENTION = [
    "self_attn",
    "attn",
    "attention",
    "self_attention",
    "linear_attn",
    "temporal_block",
    "norm_attn_norm.attn",
]
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp", "mlp_block", "fc2")
_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
"""Norms of (attention output, MLP output). Only together: Llama's post_attention_layernorm feeds its MLP."""


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """Module names of a model that is not recognised; None means found automatically."""

    layers: str | None = None  # path of the list of decoder blocks, e.g. `model.layers`
    attention: str | None = None  # attention sublayer in a block, e.g. `self_attn`
    mlp: str | None = None  # MLP sublayer in a block, e.g. `mlp`
    attn_out: str | None = None  # what gives attn_out, if not `attention`, e.g. `post_attention_layernorm`
    mlp_out: str | None = None  # the same for the MLP sublayer


@dataclass(frozen=True, slots=True)
class Block:
    """One decoder block; a sublayer that the block does not have is None."""

    module: nn.Module
    attention: nn.Module | None
    mlp: nn.Module | None
    attn_out: nn.Module | None
    mlp_out: nn.Module | None


@dataclass(frozen=True, slots=True)
class Decoder:
    """A causal language model whose blocks have been found."""

    model: nn.Module  # what is called: a transformers causal LM, or a PEFT wrapper of one
    layers: nn.ModuleList  # the list of decoder blocks in it
    blocks: tuple[Block, ...]  # the same, resolved, first to last
    width: int  # dimensions of the residual stream
    unlike: str = ""  # why `attn_out` and `mlp_out` are no sites of it; empty if nothing speaks against them

    @classmethod
    def of(cls, model: nn.Module, names: ModuleNames | None = None) -> Decoder:
        """Find the blocks of `model`; where names do not tell, the error says which override to set."""
        names = names or ModuleNames()
        config = text_config(model)
        layers = _find_layers(model, int(config.num_hidden_layers), names)
        return cls(model, layers, tuple(_resolve(layer, names) for layer in layers), int(config.hidden_size))

    def check(self, site: Site) -> None:
        """Refuse a site whose layer is beyond the last, or whose block lacks the sublayer."""
        n = len(self.blocks)
        if site.layer >= n:
            raise MechdiffError(f"Layer {site.layer} does not exist: the model has {n} layers, 0 to {n - 1}.")
        self.module(site)

    def has(self, site: Site) -> bool:
        """Whether `site` exists and was recognised."""
        return site.layer < len(self.blocks) and self._found(site) is not None

    def module(self, site: Site) -> nn.Module:
        """The module whose output (for `resid_pre`, whose input) is the activation at `site`."""
        block, module = self.blocks[site.layer], self._found(site)
        if module is None:
            name = "attention" if site.hook is Hook.ATTN_OUT else "mlp"
            others = [str(i) for i, b in enumerate(self.blocks) if getattr(b, str(site.hook)) is not None]
            remedy = f"take one of layers {', '.join(others)}, or " if others else "take "
            why = self.unlike or (
                f"was not found in {type(block.module).__name__}, which has "
                f"{', '.join(n for n, _ in block.module.named_children())}"
            )
            raise MechdiffError(
                f"Site {site} {why}; {remedy}hook resid_pre or resid_post, or set modules.{name} in the "
                "pair's spec to the right one."
            )
        return module

    def _found(self, site: Site) -> nn.Module | None:
        block = self.blocks[site.layer]
        return {Hook.ATTN_OUT: block.attn_out, Hook.MLP_OUT: block.mlp_out}.get(site.hook, block.module)


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model in `model`, which must be one of transformers."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise MechdiffError(
            f"{type(model).__name__} is not a transformers causal language model; load it with "
            "AutoModelForCausalLM.from_pretrained."
        )
    return config.get_text_config()


def _find_layers(model: nn.Module, n_layers: int, names: ModuleNames) -> nn.ModuleList:
    if names.layers is not None:
        layers = _submodule(model, names.layers)
        if not isinstance(layers, nn.ModuleList):
            raise MechdiffError(
                f"modules.layers is {names.layers!r}, which is no list of blocks in {type(model).__name__}; "
                f"its lists are {_module_lists(model) or 'none'}."
            )
        return layers
    attention = (names.attention,) if names.attention else _ATTENTION
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = {path: module for path, module in lists.items() if len(module) == n_layers}
    found = {
        path: module
        for path, module in fitting.items()
        if any(_submodule(layer, name) is not None for layer in module for name in attention)
    } or fitting  # blocks of a state space have no attention
    if len(found) > 1:  # of a multimodal model, the blocks beside the embeddings of tokens are meant
        paths = {module: path for path, module in model.named_modules()}
        home = paths.get(model.get_input_embeddings(), "").rpartition(".")[0]  # type: ignore[operator]
        found = {path: found[path] for path in found if path.rpartition(".")[0] == home} or found
    if len(found) != 1:
        none = f"none of {_module_lists(model) or 'none'} fits"
        what = f"several could be ({', '.join(found)})" if found else none
        raise MechdiffError(
            f"The {n_layers} decoder blocks of {type(model).__name__} were not recognised: {what}; "
            "set modules.layers in the pair's spec, and modules.attention if its name is unusual."
        )
    return next(iter(found.values()))


def _module_lists(model: nn.Module) -> str:
    lists = ((path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList))
    return ", ".join(f"{path} ({len(m)})" for path, m in lists)


def _resolve(layer: nn.Module, names: ModuleNames) -> Block:
    attention = _override(layer, names, "attention") or _first(layer, _ATTENTION)
    mlp = _override(layer, names, "mlp") or _first(layer, _MLP)
    attn_out = _takes_residual(attention, "dense")
    mlp_out = _takes_residual(mlp, "dense_4h_to_h", "down_proj")
    for norms in _POST_NORMS:
        if all(_submodule(layer, name) is not None for name in norms):
            attn_out, mlp_out = (_submodule(layer, name) for name in norms)
    attn_out = _override(layer, names, "attn_out") or attn_out
    mlp_out = _override(layer, names, "mlp_out") or mlp_out
    return Block(layer, attention, mlp, attn_out, mlp_out)


def _takes_residual(sublayer: nn.Module | None, *projections: str) -> nn.Module | None:
    """The projection that ends a sublayer which adds the residual stream itself, else the sublayer."""
    if sublayer is not None and "residual" in inspect.signature(type(sublayer).forward).parameters:
        return _first(sublayer, projections)
    return sublayer


def _override(layer: nn.Module, names: ModuleNames, key: str) -> nn.Module | None:
    """The module that the user names, if any."""
    name = getattr(names, key)
    module = None if name is None else _submodule(layer, name)
    if name is not None and module is None:
        raise MechdiffError(
            f"modules.{key} is {name!r}, which {type(layer).__name__} does not have; its modules are "
            f"{', '.join(n for n, _ in layer.named_modules() if n)}."
        )
    return module


def _first(layer: nn.Module, names: Sequence[str]) -> nn.Module | None:
    return next((m for m in (_submodule(layer, name) for name in names) if m is not None), None)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
