"""A model's norms, rotations and gated MLPs in fewer passes over memory, while the engine runs it.

A module is computed by a kernel that reproduces its output; any other runs as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine.kernels import cpu as kernels_cpu
from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.measures.metrics import triton_kernels

_ROTARY = "apply_rotary_pos_emb"
_NORMS = ({"offset": 0.0, "late": False}, {"offset": 0.0, "late": True}, {"offset": 1.0, "late": True})
"""Forms of RMSNorm: Llama's, OLMo 2's and Gemma's."""

_HALF = (torch.float16, torch.bfloat16)


def gpu_kernels(x: Tensor) -> ModuleType | None:
    """Kernels for tensors like `x` on a GPU, where there are any."""
    half = x.is_cuda and x.dtype in _HALF
    return triton_kernels("mechdiff_mlflow.engine.kernels.triton") if half else None


def _kernels(x: Tensor) -> ModuleType | None:
    return kernels_cpu if x.device.type == "cpu" and x.dtype == torch.float32 else gpu_kernels(x)


@dataclass(frozen=True, slots=True)
class Fusion:
    """What is computed differently while a model runs."""

    forwards: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor]]] = ()  # modules and their new `forward`
    rotations: Sequence[ModuleType] = ()  # Python modules whose rotation of queries and keys is replaced

    @classmethod
    @torch.no_grad()
    def of(cls, decoder: Decoder) -> Fusion:
        """All that the kernels reproduce on random numbers; nothing without kernels."""
        found = ((module, _fused(module)) for module in decoder.model.modules())
        forwards = [(module, forward) for module, forward in found if forward is not None]
        homes = {
            sys.modules[base.__module__]: block.attention
            for block in decoder.blocks
            if block.attention is not None
            for base in type(block.attention).__mro__
            if hasattr(sys.modules[base.__module__], _ROTARY)
        }
        rotations = [home for home, attention in homes.items() if _rotates_halves(home, attention)]
        return cls(forwards, rotations)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the kernels while the context is open, in one thread at a time."""
        own = [getattr(home, _ROTARY) for home in self.rotations]
        try:
            for module, forward in self.forwards:
                module.__dict__["forward"] = forward
            for home, rotate in zip(self.rotations, own, strict=True):
                setattr(home, _ROTARY, partial(_rotate, rotate))
            yield
        finally:
            for module, _ in self.forwards:
                module.__dict__.pop("forward", None)
            for home, rotate in zip(self.rotations, own, strict=True):
                setattr(home, _ROTARY, rotate)


def _fused(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Another `forward` for a module, if there is one that gives the same."""
    if "forward" in module.__dict__:  # somebody else's, such as accelerate's
        return None
    weight = next(module.parameters(), None)
    if weight is None:
        return None
    for forward, width in _candidates(module):
        x = torch.randn(4, width, device=weight.device, generator=_generator(weight.device)).to(weight.dtype)
        try:
            if _agree(forward(x), module(x)):
                return forward
        except (TypeError, AttributeError, RuntimeError):  # the norm of a hybrid takes a gate besides
            continue
    return None


def _candidates(module: nn.Module) -> Iterator[tuple[Callable[[Tensor], Tensor], int]]:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" in type(module).__name__ and isinstance(weight, Tensor) and isinstance(eps, float):
        kernels = _kernels(weight)
        if kernels is not None and weight.dim() == 1:
            for form in _NORMS:
                yield partial(kernels.rms_norm, weight=weight, eps=eps, **form), len(weight)
    parts = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    gate, up, down = (part if isinstance(part, nn.Linear) else None for part in parts)
    activation: Any = getattr(module, "act_fn", None)
    if gate is not None and up is not None and down is not None and activation is not None:
        kernels = gpu_kernels(gate.weight)
        if kernels is not None and _is_silu(activation, gate.weight):
            yield lambda x: down(kernels.silu_product(gate(x), up(x))), gate.in_features


def _is_silu(activation: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    """Whether an activation is SiLU; near 0, where small weights lead, GELU is hardly another one."""
    x = torch.linspace(-8, 8, 257, device=like.device).to(like.dtype)
    return _agree(nn.functional.silu(x), activation(x))


def _rotates_halves(home: ModuleType, attention: nn.Module) -> bool:
    """Whether the rotation of a Python module is the one that the kernel computes."""
    weight = next(attention.parameters())
    kernels = _kernels(weight)
    if kernels is None:
        return False
    make = partial(torch.randn, device=weight.device, generator=_generator(weight.device))
    q, k = make(2, 4, 3, 16).to(weight.dtype), make(2, 2, 3, 16).to(weight.dtype)
    cos, sin = make(2, 3, 16).to(weight.dtype), make(2, 3, 16).to(weight.dtype)
    try:
        found = getattr(home, _ROTARY)(q, k, cos, sin)
    except (TypeError, RuntimeError):  # another signature, or complex numbers
        return False
    return all(_agree(kernels.rotate(x, cos, sin), y) for x, y in zip((q, k), found, strict=True))


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding, of numbers of whatever size."""
    eps = torch.finfo(expected.dtype).eps
    size = expected.double().abs()
    scale = size.clamp(min=max(1e-2 * float(size.max()), torch.finfo(torch.float32).tiny))
    error = ((found.double() - expected.double()).abs() / scale).max()
    return bool(error <= eps * (2 if expected.dtype in _HALF else 64))


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _rotate(own: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **more: Any) -> Any:
    kernels = _kernels(q)
    plain = not more and not torch.is_grad_enabled() and cos.dim() == 3 and cos.shape[-1] == q.shape[-1]
    if kernels is None or not plain or cos.stride() != sin.stride() or cos.stride(-1) != 1:
        return own(q, k, cos, sin, **more)
    return kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)
