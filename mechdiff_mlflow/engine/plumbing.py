"""Checks that an engine reads and writes what it says, on a user's own model and prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.chunks import in_chunks
from mechdiff_mlflow.engine.model.hooks import activation_hook
from mechdiff_mlflow.engine.patch_engine import PatchEngine
from mechdiff_mlflow.engine.paths.variants import VariantGroup
from mechdiff_mlflow.spec.prompts import TokenizedPrompts
from mechdiff_mlflow.spec.sites import Hook, Site

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Relative difference of activations that the order of summation explains, after many blocks."""

_FLOOR_NATS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""KL of an identity patch that rounding explains."""


@dataclass(frozen=True, slots=True)
class PlumbingCheck:
    """The outcome of one check."""

    name: str
    passed: bool
    detail: str  # what was seen, with values


def check_plumbing(engine: PatchEngine, prompts: TokenizedPrompts, n_prompts: int = 4) -> list[PlumbingCheck]:
    """Run every check on so many of the prompts, the shortest and the longest.

    Raises:
        MechdiffError: The prompts cannot be run.
    """
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts.ids[i]))
    chosen = [*by_length[: n_prompts // 2], *by_length[n_prompts // 2 :][-(n_prompts - n_prompts // 2) :]]
    some = prompts.take(chosen)
    decoder = engine.forward.decoder
    sites = [Site(i, hook) for i in range(engine.n_layers) for hook in Hook if decoder.has(Site(i, hook))]
    together = engine.capture(some, sites)
    return [
        _hooks_fire_once(engine, some, sites),
        _padding_and_batch(engine, some, together),
        _sublayers_add_up(engine, together),
        _identity_patches(engine, some, sites),
    ]


def _hooks_fire_once(engine: PatchEngine, prompts: TokenizedPrompts, sites: Sequence[Site]) -> PlumbingCheck:
    chunk = next(in_chunks(prompts, len(prompts), engine.forward.device))
    fired: Counter[Site] = Counter()

    def count(site: Site, hidden: Tensor) -> None:
        fired[site] += 1

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(
                activation_hook(engine.forward.decoder, site, partial(count, site), len(chunk))
            )
        engine.forward(chunk)
    wrong = [f"{site} fired {fired[site]} times" for site in sites if fired[site] != 1]
    detail = ", ".join(wrong[:3]) or f"{len(sites)} sites fired once in a forward"
    return PlumbingCheck("hooks fire once", not wrong, detail)


def _padding_and_batch(
    engine: PatchEngine, prompts: TokenizedPrompts, together: Mapping[Site, Tensor]
) -> PlumbingCheck:
    alone = [engine.capture(prompts[i : i + 1], list(together)) for i in range(len(prompts))]
    errors = {site: _distance(x, torch.cat([one[site] for one in alone])) for site, x in together.items()}
    worst = max(errors, key=lambda site: errors[site])
    limit = _ROUNDING.get(together[worst].dtype, 0.1)
    return PlumbingCheck(
        "capture depends on neither padding nor batch size",
        errors[worst] <= limit,
        f"largest relative difference {errors[worst]:.1e} at {worst}, limit {limit:.0e}",
    )


def _sublayers_add_up(engine: PatchEngine, captured: Mapping[Site, Tensor]) -> PlumbingCheck:
    """A block adds what its sublayers give, times one constant (not 1 in Granite).

    A hybrid's blocks of another kind, as those of a state space, are left out: they have no such sites.
    """
    worst, scales = 0.0, []
    for i in range(engine.n_layers):
        parts = [captured.get(Site(i, hook)) for hook in Hook]
        if any(x is None for x in parts):
            continue
        before, attn, mlp, after = (x.double() for x in parts if x is not None)
        given = attn + mlp
        scale = ((after - before) * given).sum() / (given * given).sum()
        scales.append(float(scale))
        worst = max(worst, _distance(after, before + scale * given))
    if not scales:
        return PlumbingCheck("sublayers add up", False, "no block has both sublayers recognised")
    limit = _ROUNDING.get(captured[Site(0, Hook.RESID_POST)].dtype, 0.1)
    times = f"times {scales[0]:.3g}" if abs(scales[0] - 1) > limit else "as they are"
    some = f" in {len(scales)} of {engine.n_layers} blocks" if len(scales) < engine.n_layers else ""
    detail = f"outputs are added {times}{some}; largest relative rest {worst:.1e}, limit {limit:.0e}"
    return PlumbingCheck("sublayers add up", worst <= limit, detail)


def _identity_patches(engine: PatchEngine, prompts: TokenizedPrompts, sites: Sequence[Site]) -> PlumbingCheck:
    result = engine.score(prompts, [VariantGroup.identity(site) for site in sites])
    floors = {
        site: float(found.kl_patched_clean.max())
        for site, found in zip(sites, result.divergences, strict=True)
    }
    worst = max(floors, key=lambda site: floors[site])
    limit = _FLOOR_NATS.get(result.clean[worst].dtype, 1e-2)
    detail = f"largest KL {floors[worst]:.1e} nats at {worst}, limit {limit:.0e}"
    return PlumbingCheck("identity patches change nothing", floors[worst] <= limit, detail)


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest distance of two rows relative to the length of one."""
    a, b = a.double(), b.double()
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30)).max())
