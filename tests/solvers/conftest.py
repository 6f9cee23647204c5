"""Rows to fit: correlated base activations, and tuned ones that are a noisy linear function of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Rows = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    """Standard normal float64 of the given shape; the next call differs."""
    g = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)


@pytest.fixture
def rows(normal: Callable[..., Tensor]) -> Rows:
    def make(n: int, d_in: int, d_out: int | None = None, noise: float = 0.3) -> tuple[Tensor, Tensor]:
        d_out = d_in if d_out is None else d_out
        x = normal(n, d_in) @ normal(d_in, d_in) / d_in**0.5 + normal(d_in)
        true = torch.eye(d_in, d_out, dtype=torch.float64) + 0.5 * normal(d_in, d_out) / d_in**0.5
        return x, x @ true + noise * normal(n, d_out) + normal(d_out)

    return make
