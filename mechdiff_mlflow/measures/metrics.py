"""How far two next-token distributions are apart.

Divergences are often tiny, and a float32 log-softmax is off by 1e-7 of its size: everything is computed in
float64 whatever the model's dtype, or on a GPU by a kernel that cancels nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError

_BLOCK_NUMBERS = 1 << 15
"""Logits compared together on a CPU: the passes over a block then stay in its cache."""


@dataclass(frozen=True, slots=True)
class Divergences:
    """Next-token comparison of patched runs with their clean runs; every field has the same shape."""

    kl_patched_clean: Tensor  # KL(patched ‖ clean) in nats
    kl_clean_patched: Tensor  # KL(clean ‖ patched) in nats
    # |A∩B|/|A∪B| of the sets of most probable tokens: several tie at times, above all in half precision
    top1_agrees: Tensor
    delta_logprob: Tensor  # log-probability of the clean run's top token, patched minus clean, in nats
    top: Tensor  # the patched run's most probable token, the first of those that tie
    top_logprob: Tensor  # its log-probability, in nats

    def map(self, function: Callable[[Tensor], Tensor]) -> Divergences:
        """With `function` applied to every field."""
        return Divergences(*(function(getattr(self, f.name)) for f in fields(self)))


def top_tokens(logits: Tensor) -> Tensor:
    """The most probable token of each row and its log-probability in nats, float64 [n, 2] on the CPU."""
    largest, top = logits.max(-1)
    log_p = _double(largest) - torch.logsumexp(_double(logits), -1)
    return torch.stack([top.to(log_p.device).double(), log_p], -1).cpu()


@dataclass(frozen=True, slots=True)
class NextToken:
    """Clean next-token distributions of n prompts, as every patched run of them is compared with."""

    log_probs: Tensor  # [n, vocabulary] in nats
    top: Tensor  # the most probable token of each, [n]

    @classmethod
    def of(cls, logits: Tensor) -> NextToken:
        """From logits [n, vocabulary] of any floating dtype."""
        kernels = _kernels(logits)
        if kernels is not None:
            return cls(kernels.log_softmax_rows(logits.contiguous()), logits.argmax(-1))
        return cls(torch.log_softmax(_double(logits), -1), logits.argmax(-1))

    def unchanged(self) -> Divergences:
        """Of runs that are bit for bit the clean runs: float64 fields [n] on the CPU."""
        top_logprob = self.log_probs.gather(-1, self.top[:, None])[:, 0].cpu().double()
        zero = torch.zeros_like(top_logprob)
        return Divergences(zero, zero, torch.ones_like(zero), zero, self.top.cpu().double(), top_logprob)


def next_token_divergences(patched: Tensor, clean: Tensor) -> Divergences:
    """Compare next-token logits [..., vocabulary] of patched runs with those of clean runs, which broadcast.

    The fields are float64 [...] on the CPU. Identical logits give exactly 0.

    Raises:
        MechdiffError: A logit is NaN or infinite.
    """
    for name, logits in (("patched", patched), ("clean", clean)):
        if not torch.isfinite(logits).all():
            raise MechdiffError(
                f"The {name} logits hold NaN or infinite values; load the model in bfloat16 or float32, "
                "or look for broken weights."
            )
    shape = np.broadcast_shapes(patched.shape, clean.shape)
    patched, clean = (logits.expand(shape).reshape(-1, shape[-1]) for logits in (patched, clean))
    owner = torch.arange(len(patched))
    return compare_rows(patched, NextToken.of(clean), owner).map(lambda x: x.reshape(shape[:-1]).cpu())


def compare_rows(patched: Tensor, clean: NextToken, owner: Tensor) -> Divergences:
    """Unchecked core of `next_token_divergences`: float64 fields [r] on the logits' device.

    Row i of the logits [r, vocabulary] is compared with the clean prompt owner[i] (on the CPU). Logits that
    are not finite make results that are not.
    """
    kernels = _kernels(patched)
    if kernels is not None:
        of = owner.to(patched.device, non_blocking=True)
        found = kernels.compare_rows(patched.contiguous(), clean.log_probs, of, clean.top)
        return Divergences(*found.double())
    at_once = max(1, (_BLOCK_NUMBERS << 9 if patched.is_cuda else _BLOCK_NUMBERS) // patched.shape[1])
    prompts, counts = torch.unique_consecutive(owner, return_counts=True)
    # The same memory for every block: a page touched for the first time costs more than the arithmetic on it.
    log_p, d = torch.empty(2, at_once, patched.shape[1], dtype=torch.float64, device=clean.log_probs.device)
    blocks, start = [], 0
    for prompt, count in zip(prompts.tolist(), counts.tolist(), strict=True):
        log_q, top = clean.log_probs[prompt], int(clean.top[prompt])
        q = log_q.exp()
        for begin in range(start, start + count, at_once):
            rows = patched[begin : min(begin + at_once, start + count)]
            blocks.append(_compare(rows, log_q, q, top, log_p[: len(rows)], d[: len(rows)]))
        start += count
    return Divergences(*(torch.cat([getattr(b, f.name) for b in blocks]) for f in fields(Divergences)))


def _compare(patched: Tensor, log_q: Tensor, q: Tensor, top: int, log_p: Tensor, d: Tensor) -> Divergences:
    """Rows [r, vocabulary] of one prompt; `log_p` and `d` are scratch memory of that shape."""
    torch.log_softmax(d.copy_(patched), -1, out=log_p)
    torch.sub(log_p, log_q, out=d)
    delta = d[:, top].clone()
    # Sets, not tokens: half-precision logits tie, and argmax breaks ties as it likes.
    largest, patched_top = patched.max(-1, keepdim=True)
    tops, clean_tops = patched == largest, (log_q == log_q[top]).nonzero()[:, 0]
    shared = tops[:, clean_tops].sum(-1)
    agrees = shared.double() / (tops.sum(-1) + len(clean_tops) - shared)
    top_logprob = log_p.gather(-1, patched_top)[:, 0]
    backward = -(d @ q)
    forward = log_p.exp_().mul_(d).sum(-1)
    tokens = patched_top[:, 0].double()
    return Divergences(forward.clamp_(min=0), backward.clamp_(min=0), agrees, delta, tokens, top_logprob)


def rounding_kl(logits: Tensor) -> Tensor:
    """The KL in nats that rounding leaves between two runs that differ in nothing else, float64 [n].

    Each logit z of either run is off by a uniform error of up to half of ulp(z) = eps·2^⌊log₂|z|⌋ of its
    dtype, so that KL ≈ ½·Var_p of their differences is Σ p(1 − p)·ulp²/12 on average. To that comes what
    float64 loses when the KL itself is summed: eps₆₄·Σ p·(|z| + |log p|). The logits [n, vocabulary] must
    have the dtype in which the model gives them.
    """
    z = _double(logits)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    ulp = torch.finfo(logits.dtype).eps * torch.exp2(torch.frexp(z).exponent - 1.0)
    summed = torch.finfo(torch.float64).eps * (p * (z.abs() + log_p.abs())).sum(-1)
    found: Tensor = (p * (1 - p) * ulp**2 / 12).sum(-1) + summed
    return found.cpu()


def _kernels(logits: Tensor) -> ModuleType | None:
    """Kernels for logits on this device, where there are any."""
    if not logits.is_cuda or logits.dtype == torch.float64:
        return None
    return triton_kernels("mechdiff_mlflow.measures.metrics_triton")


@cache
def triton_kernels(module: str) -> ModuleType | None:
    """A module of GPU kernels; None without Triton, which comes with torch for CUDA, but not everywhere."""
    try:
        return import_module(module)
    except ImportError:
        return None


def _double(logits: Tensor) -> Tensor:
    if logits.device.type == "mps":  # which has no float64
        logits = logits.cpu()
    return logits.double()
