"""From patched rows to a patch record: means, intervals, controls, and when a number has no meaning."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mechdiff_mlflow import similarity, stats
from mechdiff_mlflow.experiments.records import PatchRecord
from mechdiff_mlflow.experiments.rows import IDENTITY, RAW, SiteRows
from mechdiff_mlflow.maps import AffineMap
from mechdiff_mlflow.prompts import PromptSet
from mechdiff_mlflow.spec import Cell

FLOOR_FACTOR = 10
"""A raw KL below this many noise floors says nothing, and neither does its drop."""


def alignment(map_: AffineMap, rows: SiteRows) -> tuple[float | None, NDArray[np.float64] | None]:
    """ρ = ‖Y − Ŷ‖/‖Y − X‖ (None if undefined), and per prompt the cosine of ŷ and y about the tuned mean."""
    mapped = map_(rows.base)
    same_width = rows.base.shape == rows.tuned.shape
    rho = similarity.rho(rows.base, rows.tuned, mapped) if same_width else None
    return rho, similarity.centred_cosine(mapped, rows.tuned, map_.mean_out).numpy()


def summarise(
    cell: Cell,
    map_: AffineMap,
    rows: SiteRows,
    *,
    label: str,
    controls: Mapping[str, str],
    null: str,
    prompts: PromptSet,
    leak: tuple[str, ...],
    seed: int,
    n_resamples: int,
    seconds: float,
) -> PatchRecord:
    """One map on one split.

    Args:
        cell: Where and how.
        map_: The map.
        rows: The site's patched rows on the split.
        label: Which row is the map's.
        controls: By name, which row is each control's.
        null: The control that did best on val.
        prompts: The split.
        leak: What was chosen on this split.
        seed: Of the bootstrap.
        n_resamples: Of the bootstrap.
        seconds: What scoring took.
    """
    patched = rows.patched
    mapped, floor, raw = patched[label], patched[IDENTITY], patched.get(RAW)
    rho, cosines = alignment(map_, rows)
    undefined = {}
    noise = floor.mean_kl
    if raw is None:
        undefined["drop_pct"] = "base and tuned differ in width, so nothing can be cross-patched raw"
    elif raw.mean_kl <= FLOOR_FACTOR * noise:
        undefined["drop_pct"] = (
            f"below noise floor: KL_raw is {raw.mean_kl:.2g} nats, at most {FLOOR_FACTOR} times the floor, "
            f"{noise:.2g}"
        )
    if patched[controls[null]].mean_kl <= FLOOR_FACTOR * noise:
        undefined["skill_pct"] = (
            f"below noise floor: the null {null} has KL {patched[controls[null]].mean_kl:.2g} nats"
        )

    def against(reference: NDArray[np.float64]) -> stats.Interval:
        return stats.drop_pct(reference, mapped.kl_patched_clean_nats, n_resamples=n_resamples, seed=seed)

    return PatchRecord(
        cell=cell,
        map=map_,
        split=prompts.split,
        n=len(prompts),
        kl_raw=None if raw is None else raw.mean_kl,
        kl_mapped=mapped.mean_kl,
        kl_raw_reverse=None if raw is None else float(raw.kl_clean_patched_nats.mean()),
        kl_mapped_reverse=float(mapped.kl_clean_patched_nats.mean()),
        noise_floor=noise,
        drop_pct=None if raw is None or "drop_pct" in undefined else against(raw.kl_patched_clean_nats),
        kl_difference=None
        if raw is None
        else stats.mean_difference(
            raw.kl_patched_clean_nats, mapped.kl_patched_clean_nats, n_resamples=n_resamples, seed=seed
        ),
        skill_pct=None
        if "skill_pct" in undefined
        else against(patched[controls[null]].kl_patched_clean_nats),
        null=null,
        controls={name: patched[row].mean_kl for name, row in controls.items()},
        rho=rho,
        cos_mean=None if cosines is None else float(cosines.mean()),
        top1_agreement=float(mapped.top1_agrees.mean()),
        delta_logprob=float(mapped.delta_logprob_nats.mean()),
        per_prompt=_per_prompt(rows, label, controls, prompts, cosines),
        leak=leak,
        undefined=undefined,
        seconds=seconds,
    )


def _per_prompt(
    rows: SiteRows,
    label: str,
    controls: Mapping[str, str],
    prompts: PromptSet,
    cosines: NDArray[np.float64] | None,
) -> pd.DataFrame:
    mapped, raw = rows.patched[label], rows.patched.get(RAW)
    columns: dict[str, object] = {"prompt": [prompt.text for prompt in prompts.prompts]}
    if raw is not None:
        columns["KL_raw"] = raw.kl_patched_clean_nats
    columns |= {
        "KL_mapped": mapped.kl_patched_clean_nats,
        "KL_mapped_reverse": mapped.kl_clean_patched_nats,
        "KL_identity": rows.patched[IDENTITY].kl_patched_clean_nats,
        "cos": cosines,
        "top1_agrees": mapped.top1_agrees,
        "delta_logprob": mapped.delta_logprob_nats,
    }
    columns |= {f"KL_{name}": rows.patched[row].kl_patched_clean_nats for name, row in controls.items()}
    return pd.DataFrame(columns)
