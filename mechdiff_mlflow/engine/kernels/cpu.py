"""Norms and rotations of a CPU in fewer passes over memory and fewer new pieces of it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, late: bool) -> Tensor:
    """Scale x [..., width] to x / √(mean x² + eps) · (weight + offset); nothing is rounded on the way."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight + offset if offset else weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of halves: x · cos + (−x₂, x₁) · sin.

    x is [n, heads, tokens, head width], cos and sin [n or 1, tokens, head width].
    """
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
