"""A map as an adapter that makes a base model act as tuned at the map's site, at every token.

Where the activation is what a linear layer gives, h = x·Wₒᵀ + b, the mapped activation
y = α·((h − μ_base)·W + μ_tuned) is that of a layer with other weights. With U = α·W − I:

    ΔWₒ = Uᵀ·Wₒ            rank(ΔWₒ) ≤ rank(U)
    Δb  = α·((b − μ_base)·W + μ_tuned) − b

which PEFT stores as a LoRA with a bias: nothing is lost. For an update-family map of rank k with α = 1,
U = W − I and the LoRA has rank k; another α scales every direction, so the LoRA is exact and of full rank.
Elsewhere (after a norm, a mixture of experts, a whole block) the map itself is written, with a hook.
"""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.models import hook_adapter
from mechdiff_mlflow.models.attach import without_peft
from mechdiff_mlflow.models.peft_adapters import apply_adapter
from mechdiff_mlflow.spec.choices import Choice
from mechdiff_mlflow.spec.sites import Hook, Site

WEIGHTS_FILE = "adapter_model.safetensors"
HOOK_FILES = ("map.safetensors", "hook.json", "load_hook.py")


class Form(Choice):
    """How an adapter is stored."""

    AUTO = "auto"
    """As PEFT where that is exact, otherwise as a hook."""
    PEFT = "peft"
    """A LoRA that PEFT loads."""
    HOOK = "hook"
    """The map and a loader of 40 lines."""


@dataclass(frozen=True, slots=True)
class Lora:
    """A change of a linear layer: x·aᵀ·bᵀ + bias is added to its output; float32."""

    a: Tensor  # [r, width of x]
    b: Tensor  # [d, r]
    bias: Tensor  # [d]

    @property
    def rank(self) -> int:
        """r, at least 1."""
        return len(self.a)


def last_linear(decoder: Decoder, site: Site) -> tuple[str, nn.Module] | None:
    """The path and module of the linear layer whose output on three tokens is the activation at `site`."""
    if site.hook in (Hook.RESID_PRE, Hook.RESID_POST):
        return None
    owner = decoder.module(site)
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        outputs[module] = hidden.detach().clone()  # some blocks add to it in place

    candidates = [m for m in owner.modules() if _is_linear(m)]
    handles = [module.register_forward_hook(keep) for module in dict.fromkeys([*candidates, owner])]
    embeddings: Any = decoder.model.get_input_embeddings()  # type: ignore[operator]
    try:
        with torch.no_grad():
            decoder.model(input_ids=torch.ones(1, 3, dtype=torch.long, device=embeddings.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    target = outputs[owner].flatten()
    for module in reversed(candidates):
        if module in outputs and torch.equal(outputs[module].flatten(), target):
            return path_of(decoder.model, module).removesuffix(".base_layer"), module
    return None


def lora_of(the_map: AffineMap, linear: nn.Module) -> Lora:
    """The change that makes `linear`, whose output the map was fitted on, give the mapped output.

    Raises:
        MechdiffError: The widths do not fit.
    """
    stored: Any = linear.weight
    weight = stored.detach().double().cpu()
    weight = weight.mT if isinstance(linear, Conv1D) else weight  # [d, width of x]
    d = len(weight)
    if (the_map.d_in, the_map.d_out) != (d, d):
        raise MechdiffError(
            f"A map from {the_map.d_in} to {the_map.d_out} dimensions cannot change a layer that gives {d}; "
            "name the pair it was fitted on."
        )
    exact = the_map.to(torch.float64, "cpu")
    own_bias: Any = getattr(linear, "bias", None)
    bias = torch.zeros(d, dtype=torch.float64) if own_bias is None else own_bias.detach().double().cpu()
    a, b = _update(exact, weight)
    return Lora(a.float().contiguous(), b.float().contiguous(), (exact(bias) - bias).float())


def write_peft(
    lora: Lora, linear: nn.Module, path: str, folder: Path, *, base_model: str, revision: str | None
) -> None:
    """Write `lora` for the layer at `path` as PEFT does, which must be installed."""
    config = peft_library().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank,  # their ratio scales b·a
        target_modules=[path],
        lora_bias=True,
        fan_in_fan_out=isinstance(linear, Conv1D),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        revision=revision,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    prefix = f"base_model.model.{path}."
    tensors = {"lora_A.weight": lora.a, "lora_B.weight": lora.b, "lora_B.bias": lora.bias}
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(named, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def write_hook(the_map: AffineMap, decoder: Decoder, site: Site, folder: Path) -> None:
    """Write the map, its place in the model, and the loader that puts it there."""
    map_file, config_file, loader = (folder / name for name in HOOK_FILES)
    the_map.save(map_file)
    config = {
        "format": "mechdiff-hook",
        "version": 1,
        "module": path_of(decoder.model, decoder.module(site)),
        "at": "input" if site.hook is Hook.RESID_PRE else "output",
        "alpha": the_map.alpha,
        "site": str(site),
    }
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(hook_adapter.__file__, loader)


@contextmanager
def loaded(folder: Path, model: nn.Module) -> Iterator[nn.Module]:
    """`model` with the adapter in `folder` while the context is open, loaded as its README says."""
    if (folder / WEIGHTS_FILE).is_file():
        peft_library()
        adapted = apply_adapter(model, folder)
        try:
            yield adapted
        finally:
            adapted.unload()
        return
    loader = runpy.run_path(str(folder / HOOK_FILES[-1]))  # not imported: no __pycache__ beside it
    handle = loader["attach"](model)
    try:
        yield model
    finally:
        handle.remove()


def _update(the_map: AffineMap, weight: Tensor) -> tuple[Tensor, Tensor]:
    """ΔWₒ = Uᵀ·Wₒ as b @ a, with as few rows of a as its rank, and one at least."""
    w, alpha = the_map.weight, the_map.alpha
    if w.right is not None and bool((alpha * w.diagonal == 1).all()):
        a, b = w.left.mT @ weight, alpha * w.right.mT
    else:
        u = alpha * w.dense()
        u.diagonal().sub_(1)
        left, sizes, a = torch.linalg.svd(u.mT @ weight, full_matrices=False)
        kept = int((sizes > max(weight.shape) * torch.finfo(sizes.dtype).eps * sizes.amax()).sum())
        a, b = a[:kept], left[:, :kept] * sizes[:kept]
    if not len(a):
        return weight.new_zeros(1, weight.shape[1]), weight.new_zeros(len(weight), 1)
    return a, b


def _is_linear(module: nn.Module) -> bool:
    """Whether it can take a LoRA and its weight can be read, which a quantized one cannot."""
    return isinstance(module, nn.Linear | Conv1D) and module.weight.is_floating_point()


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The name of `module` in the transformers model, without PEFT's wrapper."""
    paths = {candidate: name for name, candidate in without_peft(model).named_modules()}
    return str(paths[module])


def peft_library() -> Any:
    """The peft module.

    Raises:
        MechdiffError: It is not installed.
    """
    try:
        return import_module("peft")
    except ImportError:
        raise MechdiffError(
            "A PEFT adapter is written and measured with peft, which is not installed; install "
            "mechdiff-mlflow[peft] or pass --form hook."
        ) from None
