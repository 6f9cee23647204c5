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
from mechdiff_mlflow.engine.model.sums import Sums, distance, few_sites_of, rounding, sites_of
from mechdiff_mlflow.engine.patch_engine import PatchEngine
from mechdiff_mlflow.engine.paths.variants import VariantGroup
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

_FLOOR_NATS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""KL of an identity patch that rounding explains."""


@dataclass(frozen=True, slots=True)
class PlumbingCheck:
    """The outcome of one check."""

    name: str
    passed: bool
    detail: str  # what was seen, with values


def check_plumbing(
    engine: PatchEngine, prompts: TokenizedPrompts, *, thorough: bool = True
) -> list[PlumbingCheck]:
    """Run every check on two short and two long prompts at all sites, or on one each at `few_sites_of`."""
    n_prompts = 4 if thorough else 2
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts.ids[i]))
    chosen = [*by_length[: n_prompts // 2], *by_length[n_prompts // 2 :][-(n_prompts - n_prompts // 2) :]]
    some = prompts.take(chosen)
    sites = (sites_of if thorough else few_sites_of)(engine.forward.decoder)
    together = engine.capture(some, sites)
    sums = Sums.of(together, engine.n_layers)
    return [
        _hooks_fire_once(engine, some, sites),
        _padding_and_batch(engine, some, together),
        PlumbingCheck("sublayers add up", sums.passed, str(sums)),
        _identity_patches(engine, some, sites),
        _plain_forward(engine, some),
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
    errors = {site: distance(x, torch.cat([one[site] for one in alone])) for site, x in together.items()}
    worst = max(errors, key=lambda site: errors[site])
    limit = rounding(together[worst])
    return PlumbingCheck(
        "capture depends on neither padding nor batch size",
        errors[worst] <= limit,
        f"largest relative difference {errors[worst]:.1e} at {worst}, limit {limit:.0e}",
    )


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


@torch.no_grad()
def _plain_forward(engine: PatchEngine, prompts: TokenizedPrompts) -> PlumbingCheck:
    """A prompt alone gives what the model itself makes of its tokens, without our mask and positions."""
    model, worst, limit = engine.forward.decoder.model, 0.0, 0.0
    for chunk in in_chunks(prompts, 1, engine.forward.device):
        plain = model(input_ids=chunk.ids, use_cache=False).logits[:, -1]
        worst, limit = max(worst, distance(engine.forward(chunk), plain)), rounding(plain)
    detail = f"largest relative difference of logits {worst:.1e}, limit {limit:.0e}"
    return PlumbingCheck("prompts are read as the model reads them", worst <= limit, detail)
