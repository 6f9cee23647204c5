"""From patched rows to a patch record: means, intervals, controls, and when a number has no meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mechdiff_mlflow.experiments.fitting import SHUFFLED
from mechdiff_mlflow.experiments.next_tokens import NextTokens
from mechdiff_mlflow.experiments.records import PatchRecord
from mechdiff_mlflow.experiments.rows import IDENTITY, RAW, Patched, SiteRows
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.measures import similarity, stats
from mechdiff_mlflow.measures.bootstrap import Bootstrap
from mechdiff_mlflow.spec.pair_spec import Cell

MIN_CKA_PROMPTS = 4
MIN_CORRELATED_PROMPTS = 3
N_TEST = 9999
"""Resamples of a test: as many as a correction for thousands of cells needs to leave anything."""


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
    controls: Mapping[str, Sequence[AffineMap]],
    null: str,
    next_tokens: NextTokens,
    leak: tuple[str, ...] | None,
    bootstrap: Bootstrap,
    seconds: float,
    p_null: float | None,
    p_holm: float | None,
) -> PatchRecord:
    """One map on one split, from the site's patched rows by the digests of maps.

    `controls` are the maps of each control, of shuffled fits one a permutation; all else as in the record.
    """
    mapped, raw = rows.patched[map_.digest], rows.patched.get(RAW)
    rho, cosines = alignment(map_, rows)
    noise = rows.noise_floor
    undefined = {}
    drop = difference = p_raw = cos_vs_kl = None
    if raw is None:
        undefined["drop_pct"] = "base and tuned differ in width, so nothing can be cross-patched raw"
    else:
        kl_raw, kl_mapped = raw.kl_patched_clean_nats, mapped.kl_patched_clean_nats
        drop = stats.drop_pct(kl_raw, kl_mapped, noise_floor=noise, bootstrap=bootstrap)
        difference = stats.kl_difference(kl_raw, kl_mapped, bootstrap=bootstrap)
        if drop.estimate is None:
            undefined["drop_pct"] = _below_floor("KL_raw", raw.mean_kl, noise)
        else:
            p_raw = stats.p_less_kl(kl_raw, kl_mapped, bootstrap=replace(bootstrap, n_resamples=N_TEST))
            cos_vs_kl = _correlation(cosines, kl_raw - kl_mapped, bootstrap)
    control_kl = {name: rows.kl(maps) for name, maps in controls.items()}
    p_permutation = None
    if shuffled := controls.get(SHUFFLED):
        p_permutation = stats.permutation_p(
            mapped.mean_kl, [rows.patched[one.digest].mean_kl for one in shuffled]
        )
    best = control_kl[null]
    skill = stats.drop_pct(best, mapped.kl_patched_clean_nats, noise_floor=noise, bootstrap=bootstrap)
    if skill.estimate is None:
        undefined["skill_pct"] = _below_floor(f"the KL of {null}", float(best.mean()), noise)
    return PatchRecord(
        cell=cell,
        map=map_,
        split=next_tokens.prompts.split,
        n=len(cosines),
        kl_raw=None if raw is None else raw.mean_kl,
        kl_mapped=mapped.mean_kl,
        kl_raw_reverse=None if raw is None else float(raw.kl_clean_patched_nats.mean()),
        kl_mapped_reverse=float(mapped.kl_clean_patched_nats.mean()),
        noise_floor=noise,
        drop_pct=drop if "drop_pct" not in undefined else None,
        kl_difference=difference,
        skill_pct=skill if "skill_pct" not in undefined else None,
        null=null,
        controls={name: float(kl.mean()) for name, kl in control_kl.items()},
        p_raw=p_raw,
        p_null=p_null,
        p_holm=p_holm,
        p_permutation=p_permutation,
        rho=rho,
        cos_mean=mean_of_defined(cosines),
        explained_variance=similarity.explained_variance(rows.tuned, map_(rows.base)),
        cka=similarity.debiased_cka(rows.base, rows.tuned) if len(cosines) >= MIN_CKA_PROMPTS else None,
        cos_vs_kl=cos_vs_kl,
        top1_agreement=float(mapped.top1_agrees.mean()),
        delta_logprob=float(mapped.delta_logprob_nats.mean()),
        accuracy=next_tokens.accuracy(rows, mapped),
        per_prompt=_per_prompt(rows, mapped, control_kl, next_tokens, cosines),
        leak=leak,
        undefined=undefined,
        seconds=seconds,
    )


def p_against_null(
    rows: SiteRows, map_: AffineMap, null: Sequence[AffineMap], bootstrap: Bootstrap
) -> float | None:
    """One-sided p-value that a map does better than its null; None where that would be told from noise."""
    best, mapped = rows.kl(null), rows.kl([map_])
    if not stats.is_defined(best, mapped, rows.noise_floor):
        return None
    return stats.p_less_kl(best, mapped, bootstrap=replace(bootstrap, n_resamples=N_TEST))


def _correlation(
    cosines: NDArray[np.float64], gain: NDArray[np.float64], bootstrap: Bootstrap
) -> stats.Correlation | None:
    """Over the prompts whose cosine is defined; None when they are too few or one of the two is constant."""
    defined = ~np.isnan(cosines)
    if defined.sum() < MIN_CORRELATED_PROMPTS:
        return None
    found = stats.correlation(cosines[defined], gain[defined], bootstrap=bootstrap.of(defined))
    return None if found.pearson.estimate is None else found


def _below_floor(what: str, kl_nats: float, noise_nats: float) -> str:
    return (
        f"below noise floor: {what} is {kl_nats:.2g} nats, under {stats.FLOORS:g} times the floor of "
        f"{noise_nats:.2g}"
    )


def _per_prompt(
    rows: SiteRows,
    mapped: Patched,
    control_kl: Mapping[str, NDArray[np.float64]],
    next_tokens: NextTokens,
    cosines: NDArray[np.float64],
) -> pd.DataFrame:
    prompts = next_tokens.prompts
    columns: dict[str, object] = {"prompt": [prompt.text for prompt in prompts.prompts]}
    columns |= {"group": prompts.groups} if prompts.groups else {}
    columns |= {"KL_raw": rows.patched[RAW].kl_patched_clean_nats} if RAW in rows.patched else {}
    columns |= {
        "KL_mapped": mapped.kl_patched_clean_nats,
        "KL_mapped_reverse": mapped.kl_clean_patched_nats,
        "KL_identity": rows.patched[IDENTITY].kl_patched_clean_nats,
        "cos": cosines,
        "top1_agrees": mapped.top1_agrees,
        "delta_logprob": mapped.delta_logprob_nats,
    }
    columns |= {f"KL_{name}": kl for name, kl in control_kl.items()}
    columns |= next_tokens.columns(rows, mapped)
    table: pd.DataFrame = pd.DataFrame(columns)
    return table
