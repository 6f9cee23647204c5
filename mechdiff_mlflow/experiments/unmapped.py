"""One model's activations in the other, unmapped, in either direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mechdiff_mlflow.engine import VariantGroup
from mechdiff_mlflow.engine.paths.variants import Replace
from mechdiff_mlflow.experiments.rows import capture_to_patch, patchable
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Site


def swap(
    pair: Pair, taker: str, prompts: PromptSet, position: Position, sites: Sequence[Site]
) -> dict[str, Tensor]:
    """Patch one model at some sites with what the other has there.

    Args:
        pair: The models, of one width.
        taker: Which is patched: `base` or `tuned`.
        prompts: n prompts.
        position: Which token.
        sites: Where, each by itself.

    Returns:
        `KL` and `floor`: KL(patched ‖ clean) in nats of the patch and of the identity patch, [n, sites]; for
        each role and site the activations `<role>/<site>` [n, d].

    Raises:
        MechdiffError: A site does not exist, or an activation is not finite.
    """
    giver = "tuned" if taker == "base" else "base"
    given = capture_to_patch(pair, giver, prompts, position, list(sites))
    groups = [VariantGroup(site, _rows_of(given, site), n_variants=1) for site in sites]
    groups += [VariantGroup.identity(site) for site in sites]
    with patchable(pair, taker, prompts, position) as (engine, recorded):
        scored = engine.score(recorded(sites), groups)
    kls = torch.cat([found.kl_patched_clean for found in scored.divergences], 1)  # [n, 2 · sites]
    rows = {giver: given, taker: scored.clean}
    return {
        "KL": kls[:, : len(sites)],
        "floor": kls[:, len(sites) :],
        **{f"{role}/{site}": rows[role][site] for role in rows for site in sites},
    }


def _rows_of(rows: Mapping[Site, Tensor], site: Site) -> Replace:
    """A giver's rows, read chunk by chunk: they may lie on disk."""
    return lambda index, clean: rows[site][index].unsqueeze(1)
