"""The atlas: every layer and hook in one sweep, so that nobody has to guess where to look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from mechdiff_mlflow.experiments.records import FitRecord, PatchRecord
from mechdiff_mlflow.experiments.rows import RAW, SiteRows
from mechdiff_mlflow.experiments.study import Study
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.measures import stats
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, Rank
from mechdiff_mlflow.spec.sites import SUBLAYERS, Hook, Site

COLUMNS = (
    "site", "layer", "hook", "alpha", "change", "KL_raw", "KL_mapped", "drop_pct", "drop_low", "drop_high",
    "skill_pct", "skill_low", "skill_high", "null", "rho", "noise_floor", "above_floor", "p", "p_holm",
)  # fmt: skip
"""Columns of the table, which has one row a site in the order of the forward pass.

change is ‖Y − X‖ / ‖Y‖ of tuned and base activations, None where the widths differ; p is of a test
that the mean of KL_mapped is below that of the best control, p_holm the same corrected over all sites tested.
"""


@dataclass(frozen=True, eq=False)
class AtlasRecord:
    """The results at every site."""

    table: pd.DataFrame  # `COLUMNS`; None where a number has no value
    fits: Mapping[Site, FitRecord]  # of the sites above the floor, a place with two names once
    patches: Mapping[Site, PatchRecord]  # of the same sites, by both names
    best: Sequence[Site]  # by drop on val, best first; empty unless asked for


def atlas(
    study: Study,
    *,
    hooks: Sequence[Hook],
    solver: str,
    family: str,
    alpha: float,
    best: int = 0,
    min_effect_nats: float = 0.0,
) -> AtlasRecord:
    """Raw and mapped patches at every layer of some hooks, all maps of full rank and scale `alpha`.

    A first pass scores raw and identity patches everywhere. Maps and controls are then tried only where
    KL_raw is above its noise floor: elsewhere no drop is defined, whatever the map. A place with two names is
    measured, and counted among those that are tested, once; both get its numbers. The `best` sites are
    those with the highest drop on val among attention and MLP outputs, or whatever else alone was visited,
    whose KL_raw there is at least `min_effect_nats`.

    Raises:
        MechdiffError: A hook, the solver or the family is impossible for this pair.
    """
    sites = [Site(layer, hook) for layer in range(study.pair.n_layers) for hook in Hook if hook in hooks]
    measured = _measured(study, sites)
    places = dict.fromkeys(measured.values())
    rows = study.plain_patches(places)
    cells = [
        Cell(site, solver, family, Rank(None), Alpha((alpha,)))
        for site in places
        if _above_floor(rows[site]) and _varies(rows[site])
    ]
    fits = {fit.cell.site: fit for fit in study.fit(cells)} if cells else {}
    patches = {p.cell.site: p for p in study.patch([fit.to_patch for fit in fits.values()])} if fits else {}
    candidates = _ranked_on_val(study, fits, min_effect_nats) if best else []
    ranked = candidates[:best]
    for site in ranked:
        one_of = selection.entry(f"site (one of {len(candidates)})", study.val_prompts)
        map_ = selection.recorded(fits[site].map, one_of)
        leak = selection.leaks(map_, study.report_prompts, but=selection.CELL)
        fits[site], patches[site] = replace(fits[site], map=map_), replace(patches[site], map=map_, leak=leak)
    patches = {site: _named(patches[at], site) for site, at in measured.items() if at in patches}
    table = _table({site: rows[at] for site, at in measured.items()}, patches, alpha)
    return AtlasRecord(table, fits, patches, ranked)


def _measured(study: Study, sites: Sequence[Site]) -> dict[Site, Site]:
    """Where each site is measured: what enters a block, where the block before leaves it.

    So it is where the engine hands rows from block to block itself, which only fits models that do so, too.
    """
    if study.engine_mode != "sweep":
        return {site: site for site in sites}
    before = {Site(site.layer + 1, Hook.RESID_PRE): site for site in sites if site.hook is Hook.RESID_POST}
    return {site: before.get(site, site) for site in sites}


def _named(patch: PatchRecord, site: Site) -> PatchRecord:
    """The record of a place under the name `site`."""
    return replace(patch, cell=replace(patch.cell, site=site), map=patch.map.with_meta(site=str(site)))


def _above_floor(rows: SiteRows) -> bool:
    raw = rows.patched.get(RAW)
    return raw is None or stats.above_floor(raw.mean_kl, rows.noise_floor)


def _varies(rows: SiteRows) -> bool:
    """Whether there is anything to fit: what enters the first block may be the same for all prompts."""
    return bool((rows.base != rows.base[0]).any()) and bool((rows.tuned != rows.tuned[0]).any())


def _ranked_on_val(study: Study, fits: Mapping[Site, FitRecord], min_effect_nats: float) -> list[Site]:
    """Sites with an effect by rising KL_mapped/KL_raw on val, or KL_mapped where nothing is patched raw.

    The residual stream is the sum of what came before, so its sites count only where no others were visited.
    """
    kinds = (SUBLAYERS, (Hook.RESID_POST,), (Hook.RESID_PRE,))
    found = ([site for site in fits if site.hook in hooks] for hooks in kinds)
    wanted = {site: {"mapped": fits[site].map} for site in next(filter(None, found), [])}
    rows = study.computing.score(study.val_prompts, study.protocol.position, wanted, study.stage)
    raw = {site: rows[site].patched[RAW].mean_kl if RAW in rows[site].patched else None for site in wanted}
    moving = [site for site, kl in raw.items() if kl is None or 0 < kl >= min_effect_nats]
    return sorted(moving, key=lambda site: rows[site].patched["mapped"].mean_kl / (raw[site] or 1.0))


def _table(rows: Mapping[Site, SiteRows], patches: Mapping[Site, PatchRecord], alpha: float) -> pd.DataFrame:
    found = []
    for site, at in rows.items():
        row: dict[str, object] = {
            "site": str(site),
            "layer": site.layer,
            "hook": str(site.hook),
            "alpha": alpha,
            "change": float((at.tuned - at.base).norm() / at.tuned.norm()) if RAW in at.patched else None,
            "KL_raw": at.patched[RAW].mean_kl if RAW in at.patched else None,
            "noise_floor": at.noise_floor,
            "above_floor": _above_floor(at),
        }
        if (patch := patches.get(site)) is not None:
            row |= {"KL_mapped": patch.kl_mapped, "null": patch.null, "rho": patch.rho, "p": patch.p_null}
            row["p_holm"] = patch.p_null if patch.p_holm is None else patch.p_holm
            for key, interval in (("drop", patch.drop_pct), ("skill", patch.skill_pct)):
                if interval is not None:
                    row |= {f"{key}_pct": interval.estimate}
                    row |= {f"{key}_low": interval.low, f"{key}_high": interval.high}
        found.append([row.get(column) for column in COLUMNS])
    table: pd.DataFrame = pd.DataFrame(found, columns=list(COLUMNS))
    return table
