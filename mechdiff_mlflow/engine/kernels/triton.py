"""The steps between matrix products as GPU kernels that read and write every number once.

Each rounds where the model's own code rounds; attention accumulates in float32. Importable only with Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mechdiff_mlflow.measures.metrics_triton import device_of

_ELEMENTS = 4096
_QUERIES, _KEYS = 64, 32


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x, weight, out, width, eps, OFFSET: tl.constexpr, LATE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    h = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    h = h * tl.rsqrt(tl.sum(h * h, 0) / width + eps)
    h = h * w if LATE else h.to(x.dtype.element_ty).to(tl.float32) * w
    tl.store(out + row + column, h.to(x.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _silu_kernel(gate, up, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (silu * u).to(gate.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, out, heads, tokens, half,
    x_prompt, x_head, x_token, cos_prompt, cos_token,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    # One token of one prompt: all of its heads, first and second half of each.
    prompt, token = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    dtype = x.dtype.element_ty
    source = x + prompt * x_prompt + token * x_token + head * x_head + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    angle = prompt * cos_prompt + token * cos_token + column
    cos1 = tl.load(cos + angle, mask=column < half, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + half, mask=column < half, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle, mask=column < half, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + half, mask=column < half, other=0.0).to(tl.float32)
    new1 = (first * cos1).to(dtype).to(tl.float32) - (second * sin1).to(dtype).to(tl.float32)
    new2 = (second * cos2).to(dtype).to(tl.float32) + (first * sin2).to(dtype).to(tl.float32)
    target = out + (((prompt * tokens + token) * heads + head) * 2) * half + column
    tl.store(target, new1.to(dtype), mask=inside)
    tl.store(target + half, new2.to(dtype), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _split_attention_kernel(  # type: ignore[no-untyped-def]
    query, key, value, prefix_keys, prefix_values, mask, out,
    scale, n_prompts, variants, heads, key_heads, groups, n_prefix, width, value_width,
    q_prompt, q_head, q_row, k_prompt, k_head, k_row, v_prompt, v_head, v_row,
    pk_prompt, pk_head, pk_row, pv_prompt, pv_head, pv_row, mask_prompt,
    HAS_MASK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    # Rows of one prompt and key head, variant by variant, the heads that share the key side by side.
    prompt = (tl.program_id(0) // key_heads).to(tl.int64)
    key_head = (tl.program_id(0) % key_heads).to(tl.int64)
    row = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    variant, head = row // groups, key_head * groups + row % groups
    real = (row < variants * groups)[:, None]
    column, value_column = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)
    wide, value_wide = (column < width)[None, :], (value_column < value_width)[None, :]
    q_at = prompt * q_prompt + head[:, None] * q_head + variant[:, None] * q_row + column[None, :]
    q = tl.load(query + q_at, mask=real & wide, other=0.0)

    # A row's own key first: it is never hidden, so that no maximum is minus infinity.
    k_at = prompt * k_prompt + key_head * k_head + variant[:, None] * k_row + column[None, :]
    own_key = tl.load(key + k_at, mask=real & wide, other=0.0)
    v_at = prompt * v_prompt + key_head * v_head + variant[:, None] * v_row + value_column[None, :]
    acc = tl.load(value + v_at, mask=real & value_wide, other=0.0).to(tl.float32)
    largest = tl.sum(q.to(tl.float32) * own_key.to(tl.float32), 1) * scale
    total = tl.full([QUERIES], 1.0, tl.float32)

    for start in range(0, n_prefix, KEYS):
        token = start + tl.arange(0, KEYS)
        there = token < n_prefix
        keys = tl.load(
            prefix_keys + prompt * pk_prompt + key_head * pk_head + token[None, :] * pk_row + column[:, None],
            mask=there[None, :] & (column < width)[:, None], other=0.0,
        )  # fmt: skip
        scores = tl.dot(q, keys) * scale
        if HAS_MASK:
            added = tl.load(mask + prompt * mask_prompt + token, mask=there, other=float("-inf"))
            scores += added[None, :]
        else:
            scores = tl.where(there[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - larger)
        p = tl.exp(scores - larger[:, None])
        values = tl.load(
            prefix_values + prompt * pv_prompt + key_head * pv_head + token[:, None] * pv_row
            + value_column[None, :],
            mask=there[:, None] & value_wide, other=0.0,
        )  # fmt: skip
        acc = acc * shrink[:, None] + tl.dot(p.to(values.dtype), values)
        total = total * shrink + tl.sum(p, 1)
        largest = larger
    target = ((variant[:, None].to(tl.int64) * n_prompts + prompt) * heads + head[:, None]) * value_width
    acc = acc / total[:, None]
    tl.store(out + target + value_column[None, :], acc.to(out.dtype.element_ty), mask=real & value_wide)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float, late: bool) -> Tensor:
    """As in `cpu`; if `late`, rounded to the dtype of x after the product with the weight only."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    warps = 8 if block > 1024 else 4
    with device_of(x):
        _rms_norm_kernel[(x.numel() // width,)](
            x, weight, out, width, eps, OFFSET=offset, LATE=late, BLOCK=block, num_warps=warps
        )
    return out


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, of the same shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    n = gate.numel()
    with device_of(gate):
        _silu_kernel[(triton.cdiv(n, _ELEMENTS),)](gate, up, out, n, BLOCK=_ELEMENTS, num_warps=8)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in `cpu`; cos and sin have the same strides, of which only the last must be 1."""
    n, heads, tokens, width = x.shape
    out = torch.empty(n, tokens, heads, width, dtype=x.dtype, device=x.device)
    half = width // 2
    cos_prompt = 0 if cos.shape[0] == 1 else cos.stride(0)
    with device_of(x):
        _rotate_kernel[(n, tokens)](
            x, cos, sin, out, heads, tokens, half,
            x.stride(0), x.stride(1), x.stride(2), cos_prompt, cos.stride(1),
            HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(half), num_warps=4,
            enable_fp_fusion=False,  # which would skip the rounding between product and sum
        )  # fmt: skip
    return out.transpose(1, 2)


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix_keys: Tensor, prefix_values: Tensor,
    mask: Tensor | None, *, scale: float,
) -> Tensor:  # fmt: skip
    """Attention of V variants of one token each, that see a prefix and themselves.

    Shapes are those of the `split_attention` in plain torch; the mask, if any, is added to the scores of the
    prefix [n or 1, prefix], float32 and contiguous. What is returned [n, V, heads, value width] is laid out
    variant by variant.
    """
    n, heads, variants, width = query.shape
    key_heads, n_prefix, value_width = key.shape[1], prefix_keys.shape[2], value.shape[3]
    groups = heads // key_heads
    out = torch.empty(variants, n, heads, value_width, dtype=value.dtype, device=value.device)
    strides = [x.stride(i) for x in (query, key, value, prefix_keys, prefix_values) for i in range(3)]
    mask_prompt = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
    with device_of(query):
        _split_attention_kernel[(n * key_heads, triton.cdiv(variants * groups, _QUERIES))](
            query, key, value, prefix_keys, prefix_values, mask, out,
            scale, n, variants, heads, key_heads, groups, n_prefix, width, value_width,
            *strides, mask_prompt,
            HAS_MASK=mask is not None, QUERIES=_QUERIES, KEYS=_KEYS,
            WIDTH=_block(width), VALUE_WIDTH=_block(value_width),
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out.transpose(0, 1)


def _block(width: int) -> int:
    """The smallest tile of a matrix product that holds `width`."""
    return max(16, int(triton.next_power_of_2(width)))
