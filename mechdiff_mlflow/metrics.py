"""How far two next-token distributions are apart.

Divergences of a patched run from the clean run are often tiny, and the textbook forms cancel: in float32
`sum p (log p - log q)` is a difference of numbers near 1 and hides everything below 1e-7. Adding
`sum (q - p) = 0` makes every term of both directions non-negative, so nothing cancels between tokens:

    KL(p || q) = sum p (d - 1) + q,    KL(q || p) = sum p - q (d + 1),    d = log p - log q,

and with a = |d|, m = max(p, q) and t = exp(-a) - 1 both terms are bounded functions of a, times m.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError

_BLOCK_NUMBERS = 1 << 18
"""Numbers of one block of rows on a CPU: the dozen passes over a block then stay in its cache."""


@dataclass(frozen=True, slots=True)
class Divergences:
    """Next-token comparison of patched runs with their clean runs; every field has the same shape.

    Args:
        kl_patched_clean: KL(patched ‖ clean) in nats.
        kl_clean_patched: KL(clean ‖ patched) in nats.
        top1_agrees: 1.0 where the clean run's top token is a top token of the patched run too, else 0.0.
        delta_logprob: Log-probability of the clean run's top token, patched minus clean, in nats.
    """

    kl_patched_clean: Tensor
    kl_clean_patched: Tensor
    top1_agrees: Tensor
    delta_logprob: Tensor

    @classmethod
    def zeros(cls, *shape: int) -> Divergences:
        """Of runs that are bit for bit the clean run."""
        zero = torch.zeros(*shape, dtype=torch.float64)
        return cls(zero, zero.clone(), torch.ones_like(zero), zero.clone())

    def map(self, function: Callable[[Tensor], Tensor]) -> Divergences:
        """With `function` applied to every field."""
        return Divergences(*(function(getattr(self, f.name)) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class NextToken:
    """Clean next-token distributions of n prompts, as every patched run of them is compared with.

    Args:
        log_probs: [n, vocabulary], float32 or float64.
        top: The most probable token of each, [n].
    """

    log_probs: Tensor
    top: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> NextToken:
        """From logits [n, vocabulary] of any floating dtype."""
        return cls(log_softmax(logits), logits.argmax(-1))


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities in nats over the last dimension, in float32, or float64 for float64 logits.

    A half-precision log-softmax over a large vocabulary is off by more than the divergences measured here.
    """
    return torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def next_token_divergences(patched: Tensor, clean: Tensor) -> Divergences:
    """Compare next-token logits of patched runs with those of clean runs.

    Args:
        patched: Logits [..., vocabulary] of any floating dtype.
        clean: Logits that broadcast against `patched`.

    Returns:
        Float64 fields of the shape [...], on the CPU. Identical logits give exactly 0.

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
    rows = compare_rows(patched, NextToken.of(clean))
    return rows.map(lambda x: x.reshape(shape[:-1]).cpu().double())


def compare_rows(patched: Tensor, clean: NextToken, owner: Tensor | None = None) -> Divergences:
    """Unchecked core of `next_token_divergences`, on the logits' device and in the precision of log-softmax.

    NaN or infinite logits come out as such.

    Args:
        patched: Logits [r, vocabulary].
        clean: Of n prompts.
        owner: Index of each row's prompt [r], ascending; None when row i belongs to prompt i.
    """
    n_rows, vocabulary = patched.shape
    owner = owner if owner is None else owner.to(patched.device)
    step = n_rows if patched.is_cuda else max(1, _BLOCK_NUMBERS // vocabulary)
    blocks = []
    for start in range(0, n_rows, step):
        of = slice(start, start + step) if owner is None else owner[start : start + step]
        blocks.append(_compare_block(patched[start : start + step], clean.log_probs[of], clean.top[of]))
    return Divergences(*(torch.cat([getattr(b, f.name) for b in blocks]) for f in fields(Divergences)))


def _compare_block(patched: Tensor, log_q: Tensor, top: Tensor) -> Divergences:
    log_p = log_softmax(patched)
    d = log_p - log_q
    m = torch.maximum(log_p, log_q).exp_()
    p_is_larger = d > 0
    a = d.abs()
    t = torch.expm1(-a)
    near = a + t  # a - 1 + exp(-a)
    far = torch.addcmul(near, a, t).neg_()  # 1 - exp(-a) (1 + a)
    forward = (torch.where(p_is_larger, near, far).mul_(m)).sum(-1)
    backward = (torch.where(p_is_larger, far, near).mul_(m)).sum(-1)
    at_top = top.unsqueeze(-1)
    # A top token, not the top token: half-precision logits tie, and argmax breaks ties as it likes.
    agrees = patched.gather(-1, at_top).squeeze(-1) == patched.amax(-1)
    return Divergences(forward, backward, agrees.to(d.dtype), d.gather(-1, at_top).squeeze(-1))
