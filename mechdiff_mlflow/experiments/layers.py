"""RQ1: how alike base and tuned are layer by layer, and from where on swapping one layer's output matters."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from torch import Tensor

from mechdiff_mlflow import similarity, stats
from mechdiff_mlflow.engine import VariantGroup
from mechdiff_mlflow.engine.variants import Replace
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.rows import Array, capture, patchable
from mechdiff_mlflow.experiments.study import Study
from mechdiff_mlflow.pairs import Pair
from mechdiff_mlflow.prompts import PromptSet
from mechdiff_mlflow.sites import Hook, Site
from mechdiff_mlflow.spec import Position

DIRECTIONS = {"tuned_from_base": ("base", "tuned"), "base_from_tuned": ("tuned", "base")}
"""Which model's activation goes into which."""


def layer_profile(study: Study) -> pd.DataFrame:
    """One row a layer, at resid_post on the reported prompts.

    Columns: layer; cka, debiased, None where either does not vary; for both directions KL_… (mean
    KL(patched ‖ clean) in nats of the unmapped patch), its 95 % interval …_low and …_high, and floor_… of the
    identity patch.

    Raises:
        MechdiffError: The models differ in depth or width.
    """
    pair, prompts, position = study.pair, study.report_prompts, study.protocol.position
    shapes = []
    for side in (pair.base, pair.tuned):
        with side.engine() as engine:
            shapes.append((engine.n_layers, engine.width))
    if shapes[0] != shapes[1]:
        raise MechdiffError(
            f"Base has {shapes[0][0]} layers of width {shapes[0][1]} and tuned {shapes[1][0]} of "
            f"{shapes[1][1]}; an unmapped patch needs models of one shape."
        )
    sites = [Site(layer, Hook.RESID_POST) for layer in range(shapes[0][0])]
    columns: dict[str, list[float | None]] = {"layer": [float(site.layer) for site in sites]}
    own = {role: _recorded(pair, role, prompts, position, sites) for role in ("base", "tuned")}
    columns["cka"] = [
        similarity.debiased_cka(own["base"][s].double(), own["tuned"][s].double()) for s in sites
    ]
    bootstrap = stats.Bootstrap(n_resamples=study.protocol.n_resamples, seed=study.protocol.seed)
    for name, (giver, taker) in DIRECTIONS.items():
        groups = [VariantGroup(site, _rows_of(own[giver], site), n_variants=1) for site in sites]
        groups += [VariantGroup.identity(site) for site in sites]
        with (
            patchable(pair, taker, prompts, position) as (engine, recorded),
            study.stage(f"patching {taker} from {giver}", len(prompts)) as advance,
        ):
            scored = engine.score(recorded(sites), groups, progress=advance).divergences
        kls: list[Array] = [found.kl_patched_clean[:, 0].numpy() for found in scored]
        patched, floors = kls[: len(sites)], kls[len(sites) :]
        means = [stats.kl_difference(kl, 0 * kl, bootstrap=bootstrap) for kl in patched]
        columns[f"KL_{name}"] = [mean.estimate for mean in means]
        columns[f"KL_{name}_low"] = [mean.low for mean in means]
        columns[f"KL_{name}_high"] = [mean.high for mean in means]
        columns[f"floor_{name}"] = [float(floor.mean()) for floor in floors]
    table: pd.DataFrame = pd.DataFrame(columns).astype({"layer": int})
    return table


def _recorded(
    pair: Pair, role: str, prompts: PromptSet, position: Position, sites: list[Site]
) -> Mapping[Site, Tensor]:
    """Activations of a model that is patched afterwards on the same prompts."""
    if pair.one_at_a_time:  # its clean run would not outlast the other model
        return capture(pair, role, prompts, position, sites)
    with patchable(pair, role, prompts, position) as (engine, recorded):
        to_patch = recorded(sites)
        engine.complete(to_patch)
        return to_patch.activations


def _rows_of(rows: Mapping[Site, Tensor], site: Site) -> Replace:
    """A giver's rows, read chunk by chunk: they may lie on disk."""
    return lambda index, clean: rows[site][index].unsqueeze(1)
