"""What experiments yield: plain frozen values, from which runs, tables and reports are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import pandas as pd

from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.measures.stats import Correlation, Interval
from mechdiff_mlflow.spec.pair_spec import Cell


@dataclass(frozen=True, eq=False)
class FitRecord:
    """One map, fitted on train, with what val chose.

    Args:
        cell: Where and how; its α is the one in force.
        asked: The cell as requested: its α may be a grid.
        off_span: What the map does outside the span of the training rows.
        map: The map, its α included.
        n_train: Prompts fitted on.
        chosen: What val chose: of `alpha`, `off_span`.
        rho: ‖Y − Ŷ‖ / ‖Y − X‖ on val; None where the widths differ or base equals tuned.
        cos_mean: Mean cosine of mapped and tuned activations about the tuned mean, on val.
        candidates: One row per candidate with its mean KL on val.
        seconds: Time of the factorisation that all ranks of the site share.
    """

    cell: Cell
    asked: Cell
    off_span: str
    map: AffineMap
    n_train: int
    chosen: tuple[str, ...]
    rho: float | None
    cos_mean: float | None
    candidates: pd.DataFrame
    seconds: float

    @property
    def to_patch(self) -> tuple[Cell, AffineMap]:
        """What `Study.patch` takes; the cell as asked for, because controls get the same choice of α."""
        return self.asked, self.map


@dataclass(frozen=True, eq=False)
class PatchRecord:
    """One map patched on a split, against raw, controls and the noise floor.

    Args:
        cell: Where and how.
        map: The map.
        split: Which prompts are reported.
        n: How many.
        kl_raw: Mean KL(patched ‖ clean) in nats of the raw cross-patch; None where the widths differ.
        kl_mapped: The same of the mapped patch.
        kl_raw_reverse: Mean KL(clean ‖ patched) of the raw cross-patch.
        kl_mapped_reverse: The same of the mapped patch.
        noise_floor: What KL must stand out from, see `SiteRows.noise_floor`.
        drop_pct: 100·(1 − ΣKL_mapped/ΣKL_raw) with its bootstrap interval; None with a reason in `undefined`.
        kl_difference: KL_raw − KL_mapped with its interval.
        skill_pct: 100·(1 − ΣKL_mapped/ΣKL_null) with its interval.
        null: The best control, chosen on val.
        controls: Mean KL of every control; `shuffled` over all permutations.
        p_sign_flip: One-sided p-value of KL_raw − KL_mapped > 0 under random signs; None where the drop is
            undefined.
        p_null: The same of KL_null − KL_mapped > 0: does the map beat its best control?
        p_holm: `p_null` by Holm's method over all patches that were reported together; None for one alone.
        p_permutation: Share of fits of shuffled pairs that do as well, of B + 1; None without permutations.
        rho: ‖Y − Ŷ‖ / ‖Y − X‖.
        cos_mean: Mean cosine of mapped and tuned activations about the tuned mean.
        explained_variance: 1 − ‖Y − Ŷ‖² / ‖Y − ȳ‖²; None where y does not vary.
        cka: Debiased linear CKA of base and tuned activations; None where undefined.
        cos_vs_kl: Correlation over prompts of that cosine with KL_raw − KL_mapped; None where undefined.
        top1_agreement: Mean over prompts of how far patched and clean prefer the same tokens; see `metrics`.
        delta_logprob: Mean change of the log-probability of the clean run's preferred token, nats.
        per_prompt: One row per prompt.
        leak: What was chosen on prompts that are reported, see `selection`; None where nobody knows.
        undefined: Why a number has no value, by name.
        seconds: Time of the split's recording and sweep, shared by all cells.
    """

    cell: Cell
    map: AffineMap
    split: str
    n: int
    kl_raw: float | None
    kl_mapped: float
    kl_raw_reverse: float | None
    kl_mapped_reverse: float
    noise_floor: float
    drop_pct: Interval | None
    kl_difference: Interval | None
    skill_pct: Interval | None
    null: str
    controls: Mapping[str, float]
    p_sign_flip: float | None
    p_null: float | None
    p_holm: float | None
    p_permutation: float | None
    rho: float | None
    cos_mean: float | None
    explained_variance: float | None
    cka: float | None
    cos_vs_kl: Correlation | None
    top1_agreement: float
    delta_logprob: float
    per_prompt: pd.DataFrame
    leak: tuple[str, ...] | None
    undefined: Mapping[str, str]
    seconds: float


Record: TypeAlias = FitRecord | PatchRecord
