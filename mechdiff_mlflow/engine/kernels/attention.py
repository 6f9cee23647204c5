"""Attention of patched tokens: a variant of a prompt sees the prompt's prefix and itself, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mechdiff_mlflow.engine.kernels.fusion import gpu_kernels


@dataclass(frozen=True, slots=True)
class Prefix:
    """What patched tokens of one block can see of n prompts."""

    keys: Tensor  # [n, key heads, prefix, head width], rotated
    values: Tensor  # [n, key heads, prefix, value width]
    # What each of the S suffix positions sees of prefix and suffix [n or 1, 1, S, prefix + S], boolean or
    # added to the scores; None when that is the prefix and the suffix up to itself.
    mask: Tensor | None

    def of(self, prompts: slice) -> Prefix:
        """The prefix of some of the prompts."""
        mask = self.mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[prompts]
        return Prefix(self.keys[prompts], self.values[prompts], mask)

    def first(self, n: int) -> Prefix:
        """The prefix of the first n suffix positions alone."""
        mask = None if self.mask is None else self.mask[:, :, :n, : self.keys.shape[2] + n]
        return Prefix(self.keys, self.values, mask)

    def added_mask(self, suffix: int, dtype: torch.dtype) -> Tensor:
        """The mask [n or 1, 1, S, prefix + S] as numbers added to scores, large and negative where hidden."""
        # Half the smallest number: finite, so that a row with all of its prefix hidden is no NaN.
        hidden = torch.finfo(dtype).min / 2
        if self.mask is None:
            device, n_prefix = self.keys.device, self.keys.shape[2]
            mask = torch.zeros(1, 1, suffix, n_prefix + suffix, dtype=dtype, device=device)
            later = torch.ones(suffix, suffix, dtype=torch.bool, device=device).triu(1)
            mask[..., n_prefix:].masked_fill_(later, hidden)
            return mask
        if self.mask.dtype == torch.bool:
            return torch.zeros_like(self.mask, dtype=dtype).masked_fill_(~self.mask, hidden)
        return self.mask.to(dtype).clamp(min=hidden)


def split_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    *,
    suffix: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of V variants of `suffix` tokens each, as if each variant followed the prefix alone.

    Softmax over the prefix and softmax over a variant's own tokens are merged by their log-sum-exp, so no
    score between two variants is computed. Rows of query [n, heads, V * suffix, head width], key and value
    [n, key heads, V * suffix, head or value width] lie variant by variant, and so does what is returned,
    [n, V * suffix, heads, value width]. Scores are scaled, then become softcap * tanh(score / softcap);
    `sinks` [heads] are scores that take their share of the softmax and add nothing.
    """
    n, heads, tokens, _ = query.shape
    kernels = gpu_kernels(query) if suffix == 1 and softcap is None and sinks is None else None
    if kernels is not None:
        mask = None if prefix.mask is None else prefix.added_mask(1, torch.float32)[:, 0, 0, :-1].contiguous()
        found: Tensor = kernels.split_attention(
            query, key, value, prefix.keys, prefix.values, mask, scale=scale
        )
        return found
    key_heads, n_prefix = key.shape[1], prefix.keys.shape[2]
    groups, variants = heads // key_heads, tokens // suffix
    accumulate = torch.promote_types(query.dtype, torch.float32)
    mask = None if prefix.mask is None and suffix == 1 else prefix.added_mask(suffix, accumulate)

    def capped(scores: Tensor) -> Tensor:
        return scores * scale if softcap is None else softcap * torch.tanh(scores * scale / softcap)

    # A variant's own tokens: scores [n, key heads, groups, V, S, S].
    by_variant = query.reshape(n, key_heads, groups, variants, suffix, -1).to(accumulate)
    own_keys = key.reshape(n, key_heads, 1, variants, suffix, -1).to(accumulate)
    own_values = value.reshape(n, key_heads, 1, variants, suffix, -1).to(accumulate)
    if suffix == 1:
        own = capped((by_variant * own_keys).sum(-1, keepdim=True))
    else:
        own = capped(by_variant @ own_keys.transpose(-1, -2))
    if mask is not None:
        own = own + mask[..., n_prefix:].view(-1, 1, 1, 1, suffix, suffix)
    own_sum = own.logsumexp(-1)
    of_own = own_values if suffix == 1 else torch.softmax(own, -1) @ own_values

    # The prefix: rows [n, key heads, groups * V * S].
    rows = query.reshape(n, key_heads, groups * tokens, -1)
    before = None if prefix.mask is None or mask is None else mask[..., :n_prefix]
    if before is not None and suffix > 1:
        before = before.repeat(1, 1, groups * variants, 1)
    if n_prefix == 0:
        out, total = of_own.expand(*own_sum.shape, -1), own_sum
    else:
        fused = softcap is None and _is_fused(rows, prefix)
        attend = _fused_attention if fused else partial(_plain_attention, capped=capped)
        of_prefix, prefix_sum = attend(rows, prefix, before, scale=scale)
        of_prefix, prefix_sum = of_prefix.view(*own_sum.shape, -1), prefix_sum.view(own_sum.shape)
        out = torch.lerp(of_prefix.to(accumulate), of_own, torch.sigmoid(own_sum - prefix_sum).unsqueeze(-1))
        total = torch.logaddexp(own_sum, prefix_sum) if sinks is not None else own_sum
    if sinks is not None:
        out = out * torch.sigmoid(total - sinks.to(accumulate).view(key_heads, groups, 1, 1)).unsqueeze(-1)
    return out.to(value.dtype).reshape(n, heads, tokens, -1).transpose(1, 2)


def _plain_attention(
    rows: Tensor, prefix: Prefix, mask: Tensor | None, *, scale: float, capped: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention of rows [n, key heads, r, width] to the prefix, and its log-sum-exp [n, key heads, r]."""
    scores = capped((rows @ prefix.keys.transpose(-1, -2)).to(torch.promote_types(rows.dtype, torch.float32)))
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1).to(rows.dtype) @ prefix.values, scores.logsumexp(-1)


def _is_fused(rows: Tensor, prefix: Prefix) -> bool:
    if rows.shape[-1] != prefix.values.shape[-1]:
        return False
    return rows.device.type == "cpu" or (rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16))


def _fused_attention(
    rows: Tensor, prefix: Prefix, mask: Tensor | None, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The same by the kernels behind `scaled_dot_product_attention`, which does not give the log-sum-exp."""
    kernels = torch.ops.aten
    arguments = (rows, prefix.keys, prefix.values)
    if rows.device.type == "cpu":
        out = kernels._scaled_dot_product_flash_attention_for_cpu(
            *arguments, 0.0, False, attn_mask=mask, scale=scale
        )
        return out[0], out[1]
    if mask is None:
        out = kernels._scaled_dot_product_flash_attention(*arguments, 0.0, False, False, scale=scale)
        return out[0], out[1]
    # This kernel wants rows of the bias to begin at multiples of 8.
    n_prefix, n_rows = mask.shape[-1], rows.shape[2]
    bias = torch.nn.functional.pad(mask.to(rows.dtype), (0, -n_prefix % 8))[..., :n_prefix]
    bias = bias.expand(rows.shape[0], rows.shape[1], n_rows, n_prefix)
    out = kernels._scaled_dot_product_efficient_attention(*arguments, bias, True, 0.0, False, scale=scale)
    return out[0], out[1][..., :n_rows]
