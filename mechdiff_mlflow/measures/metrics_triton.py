"""The comparison of next-token distributions as GPU kernels that read each logit twice and write none.

In float32, where `sum p (log p - log q)` is a difference of numbers near 1 that hides everything below 1e-7.
Adding `sum (q - p) = 0` leaves no negative term in either direction. With d = log p - log q, a = |d| and
m = max(p, q) the terms are m f(a) and m g(a), which is which by the sign of d:

    f(a) = a - 1 + exp(-a),    g(a) = 1 - (1 + a) exp(-a).

Importable only where Triton is; torch's builds for CUDA on Linux bring it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _log_sum_exp(row, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest number and log-sum-exp of a row."""
    largest = float("-inf")
    total = 0.0
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(row + column, mask=column < n, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), 0)
        largest = larger
    return largest, largest + tl.log(total)


@triton.jit  # type: ignore[untyped-decorator]
def _log_softmax_kernel(logits, out, n, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    _, log_z = _log_sum_exp(logits + row * stride, n, BLOCK)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * stride + column, mask=column < n, other=0.0).to(tl.float32)
        tl.store(out + row * n + column, z - log_z, mask=column < n)


@triton.jit  # type: ignore[untyped-decorator]
def _compare_kernel(patched, log_q, owner, top, out, n_rows, n, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    prompt = tl.load(owner + row).to(tl.int64)
    largest, log_z = _log_sum_exp(patched + row * stride, n, BLOCK)
    forward = tl.zeros([BLOCK], dtype=tl.float32)
    backward = tl.zeros([BLOCK], dtype=tl.float32)
    # Of the sets of top tokens, which ties make larger than one.
    shared = tl.zeros([BLOCK], dtype=tl.float32)
    either = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.full([BLOCK], n, dtype=tl.int32)
    at = tl.load(top + prompt)
    clean_largest = tl.load(log_q + prompt * n + at)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < n
        z = tl.load(patched + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        log_p = z - log_z
        log_c = tl.load(log_q + prompt * n + column, mask=inside, other=0.0)
        d = log_p - log_c
        a = tl.abs(d)
        e = tl.exp(-a)
        # The series of f to a^7; for small a its two forms above cancel.
        series = 1 - a * (1 / 3) * (1 - a * 0.25 * (1 - a * 0.2 * (1 - a * (1 / 6) * (1 - a * (1 / 7)))))
        series = 0.5 * a * a * series
        f = tl.where(a < 0.25, series, a - 1 + e)
        g = tl.where(a < 0.25, a * a - (1 + a) * f, 1 - (1 + a) * e)
        m = tl.where(inside, tl.exp(tl.maximum(log_p, log_c)), 0.0)
        forward += tl.where(inside, m * tl.where(d > 0, f, g), 0.0)
        backward += tl.where(inside, m * tl.where(d > 0, g, f), 0.0)
        ours, theirs = inside & (z == largest), inside & (log_c == clean_largest)
        first = tl.minimum(first, tl.where(ours, column, n))
        shared += tl.where(ours & theirs, 1.0, 0.0)
        either += tl.where(ours | theirs, 1.0, 0.0)
    z = tl.load(patched + row * stride + at).to(tl.float32)
    tl.store(out + row, tl.sum(forward, 0))
    tl.store(out + n_rows + row, tl.sum(backward, 0))
    tl.store(out + 2 * n_rows + row, tl.sum(shared, 0) / tl.sum(either, 0))
    tl.store(out + 3 * n_rows + row, z - log_z - clean_largest)
    tl.store(out + 4 * n_rows + row, tl.min(first, 0).to(tl.float32))  # exact up to 2^24
    tl.store(out + 5 * n_rows + row, largest - log_z)


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors' own: inside, that is the one of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def log_softmax_rows(logits: Tensor) -> Tensor:
    """Log-probabilities [r, vocabulary] of logits that lie row by row, in float32."""
    out = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    with device_of(logits):
        _log_softmax_kernel[(len(logits),)](
            logits, out, logits.shape[1], logits.stride(0), BLOCK=_BLOCK, num_warps=4
        )
    return out


def compare_rows(patched: Tensor, log_q: Tensor, owner: Tensor, top: Tensor) -> Tensor:
    """The fields of `Divergences` [6, r] in float32.

    Logits [r, vocabulary] bit for bit the same give exactly 0, if `log_q` [n, vocabulary] is by
    `log_softmax_rows`; row i is compared with the q of owner[i], whose top token is in `top` [n].
    """
    out = torch.empty(6, len(patched), dtype=torch.float32, device=patched.device)
    with device_of(patched):
        _compare_kernel[(len(patched),)](
            patched, log_q, owner, top, out, len(patched), patched.shape[1], patched.stride(0),
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return out
