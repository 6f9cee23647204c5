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


def alignment(map_: AffineMap, rows: SiteRows) -> tuple[float | None, NDArray[np.float64]]:
    """ρ = ‖Y − Ŷ‖/‖Y − X‖ (None if undefined), and per prompt the cosine of ŷ and y about the tuned mean."""
    mapped = map_(rows.base)
    rho = similarity.rho(rows.base, rows.tuned, mapped) if rows.base.shape == rows.tuned.shape else None
    return rho, similarity.centred_cosines(rows.tuned, mapped, map_.mean_out).numpy()


def mean_of_defined(values: NDArray[np.float64]) -> float | None:
    """The mean of what is not NaN; None if all is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else None


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
    noise = floor.mean_kl
    bootstrap = stats.Bootstrap(n_resamples=n_resamples, seed=seed)
    undefined = {}
    drop = difference = None
    if raw is None:
        undefined["drop_pct"] = "base and tuned differ in width, so nothing can be cross-patched raw"
    else:
        pairs = raw.kl_patched_clean_nats, mapped.kl_patched_clean_nats
        drop = stats.drop_pct(*pairs, noise_floor=noise, bootstrap=bootstrap)
        difference = stats.kl_difference(*pairs, bootstrap=bootstrap)
        if drop.estimate is None:
            undefined["drop_pct"] = _below_floor("KL_raw", raw.mean_kl, noise)
    best = patched[controls[null]]
    skill = stats.drop_pct(
        best.kl_patched_clean_nats, mapped.kl_patched_clean_nats, noise_floor=noise, bootstrap=bootstrap
    )
    if skill.estimate is None:
        undefined["skill_pct"] = _below_floor(f"the KL of {null}", best.mean_kl, noise)
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
        drop_pct=drop if "drop_pct" not in undefined else None,
        kl_difference=difference,
        skill_pct=skill if "skill_pct" not in undefined else None,
        null=null,
        controls={name: patched[row].mean_kl for name, row in controls.items()},
        rho=rho,
        cos_mean=mean_of_defined(cosines),
        top1_agreement=float(mapped.top1_agrees.mean()),
        delta_logprob=float(mapped.delta_logprob_nats.mean()),
        per_prompt=_per_prompt(rows, label, controls, prompts, cosines),
        leak=leak,
        undefined=undefined,
        seconds=seconds,
    )


def _below_floor(what: str, kl_nats: float, noise_nats: float) -> str:
    return (
        f"below noise floor: {what} is {kl_nats:.2g} nats, under {stats.FLOORS:g} times the floor of "
        f"{noise_nats:.2g}"
    )


def _per_prompt(
    rows: SiteRows,
    label: str,
    controls: Mapping[str, str],
    prompts: PromptSet,
    cosines: NDArray[np.float64],
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
    table: pd.DataFrame = pd.DataFrame(columns)
    return table
