"""Whether blocks add what their sublayers give, as `attn_out` and `mlp_out` promise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.engine.model.chunks import in_chunks
from mechdiff_mlflow.engine.model.forward import PromptForward
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
_SUBLAYERS = (Hook.ATTN_OUT, Hook.MLP_OUT)


def rounding(x: Tensor) -> float:
    """Relative difference of activations that the order of summation explains, after many blocks."""
    return _ROUNDING.get(x.dtype, 0.1)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest distance of two rows relative to the length of one."""
    a, b = a.cpu().double(), b.cpu().double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)).max())


@dataclass(frozen=True, slots=True)
class Sums:
    """What the blocks of a model add, against what their sublayers give."""

    scales: tuple[float, ...]  # by which constant each block multiplies its sublayers' sum; not 1 in Granite
    rest: float  # largest relative distance of a block's output from its input and that
    limit: float  # what rounding explains of it
    n_blocks: int  # all of the model
    sublayers: bool  # whether any sublayer was recognised

    @classmethod
    def of(cls, captured: Mapping[Site, Tensor], n_blocks: int) -> Sums:
        """Of activations [n, width] by site, of every block.

        Where blocks have both sublayers those are looked at, and otherwise those that have one: the rest of
        a hybrid, as its state spaces, add more than is recognised.
        """
        rows = {site: x.cpu().double() for site, x in captured.items()}
        parts = [[rows[s] for h in _SUBLAYERS if (s := Site(i, h)) in rows] for i in range(n_blocks)]
        most = max(map(len, parts))
        scales, worst = [], 0.0
        for i, given in enumerate(parts):
            before, after = (rows.get(Site(i, hook)) for hook in (Hook.RESID_PRE, Hook.RESID_POST))
            if not most or len(given) < most or before is None or after is None:
                continue
            total = torch.stack(given).sum(0)
            scale = float(((after - before) * total).sum() / (total * total).sum())
            scales.append(scale)
            worst = max(worst, distance(after, before + scale * total))
        limit = rounding(next(iter(captured.values())))
        return cls(tuple(scales), worst, limit, n_blocks, most > 0)

    @property
    def passed(self) -> bool:
        """Whether the recognised sublayers are all that is added; so too where there are none."""
        return not self.sublayers or (bool(self.scales) and self.rest <= self.limit)

    def __str__(self) -> str:
        if not self.scales:
            return "no sublayer is recognised, so resid_pre and resid_post alone are sites"
        times = f"times {self.scales[0]:.3g}" if abs(self.scales[0] - 1) > self.limit else "as they are"
        few = len(self.scales) < self.n_blocks
        some = f" in {len(self.scales)} of {self.n_blocks} blocks" if few else ""
        rest = f"largest relative rest {self.rest:.1e}, limit {self.limit:.0e}"
        return f"outputs are added {times}{some}; {rest}"


def sites_of(decoder: Decoder) -> list[Site]:
    """All sites of a model."""
    sites = (Site(layer, hook) for layer in range(len(decoder.blocks)) for hook in Hook)
    return [site for site in sites if decoder.has(site)]


def few_sites_of(decoder: Decoder) -> list[Site]:
    """The sites of three blocks: the first, the middle and the last of those that have the most sites."""
    sites = sites_of(decoder)
    n_sites = Counter(site.layer for site in sites)
    whole = [layer for layer, n in n_sites.items() if n == max(n_sites.values())]
    chosen = {whole[0], whole[len(whole) // 2], whole[-1]}
    return [site for site in sites if site.layer in chosen]


def without_unlike(forward: PromptForward) -> Decoder:
    """The decoder without `attn_out` and `mlp_out` where blocks add other things than these.

    Such are blocks that add a third sublayer (the state space of Falcon-H1, the shared expert of Granite 4),
    that normalize the stream itself (BERT, MiniMax) or weigh it (Doge). What enters and leaves them is sound.
    """
    decoder, ids = forward.decoder, tuple((17 * i) % forward.vocabulary for i in range(7))
    if any(block.module._forward_hooks for block in decoder.blocks):  # the user's own, which may add anything
        return decoder
    chunk = next(in_chunks(TokenizedPrompts((ids,), (6,)), 1, forward.device))
    clean = forward.record(chunk, sites_of(decoder)).clean
    sums = Sums.of(clean, len(decoder.blocks))
    reached = len(clean) == len(sites_of(decoder))
    if (sums.passed and reached) or not torch.stack([x.cpu().isfinite().all() for x in clean.values()]).all():
        return decoder
    blocks = tuple(replace(block, attn_out=None, mlp_out=None) for block in decoder.blocks)
    name = type(decoder.blocks[0].module).__name__
    rest = sums if reached else "not all are reached by a forward"
    why = f"is not offered, since {name} adds other things than what attention and MLP give ({rest})"
    return replace(decoder, blocks=blocks, unlike=why)
