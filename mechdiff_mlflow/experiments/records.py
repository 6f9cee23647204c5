"""Results of experiments: plain frozen values, from which runs, tables and reports are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.measures.bootstrap import Interval
from mechdiff_mlflow.measures.stats import Correlation
from mechdiff_mlflow.spec.pair_spec import Cell


@dataclass(frozen=True, eq=False)
class FitRecord:
    """One map, fitted on train, with what val chose."""

    cell: Cell  # where and how; its α is the one in force
    asked: Cell  # the cell as requested: its α may be a grid
    off_span: str  # what the map does outside the span of the training rows
    map: AffineMap  # its α included
    n_train: int  # prompts fitted on
    chosen: tuple[str, ...]  # what val chose: of `alpha`, `off_span`
    rho: float | None  # ‖Y − Ŷ‖ / ‖Y − X‖ on val; None where the widths differ or base equals tuned
    cos_mean: float | None  # mean cosine of mapped and tuned activations about the tuned mean, on val
    candidates: pd.DataFrame  # one row per candidate with its mean KL on val
    seconds: float  # time of the factorisation that all ranks of the site share

    @property
    def to_patch(self) -> tuple[Cell, AffineMap]:
        """An argument of `Study.patch`; the cell as asked for, because controls get the same choice of α."""
        return self.asked, self.map


@dataclass(frozen=True, eq=False)
class PatchRecord:
    """One map patched on a split, against raw, controls and the noise floor.

    KL is KL(patched ‖ clean) of the next token in nats, and reverse is KL(clean ‖ patched).
    """

    cell: Cell
    map: AffineMap
    split: str  # which prompts are reported
    n: int  # how many
    kl_raw: float | None  # mean KL of the raw cross-patch; None where the widths differ
    kl_mapped: float
    kl_raw_reverse: float | None
    kl_mapped_reverse: float
    noise_floor: float  # what KL must stand out from, see `SiteRows.noise_floor`
    drop_pct: Interval | None  # 100·(1 − ΣKL_mapped/ΣKL_raw); None with a reason in `undefined`
    kl_difference: Interval | None  # KL_raw − KL_mapped
    skill_pct: Interval | None  # 100·(1 − ΣKL_mapped/ΣKL_null)
    null: str  # the best control, chosen on val
    controls: Mapping[str, float]  # mean KL of every control; `shuffled` over all permutations
    p_raw: float | None  # one-sided, of a mean of KL_raw − KL_mapped above 0; None without a drop
    p_null: float | None  # the same of KL_null − KL_mapped > 0: does the map beat its best control?
    p_holm: float | None  # `p_null` by Holm's method over all reported together; None for one alone
    p_permutation: float | None  # share of fits of shuffled pairs that do as well; None without permutations
    rho: float | None  # ‖Y − Ŷ‖ / ‖Y − X‖
    cos_mean: float | None  # mean cosine of mapped and tuned activations about the tuned mean
    explained_variance: float | None  # 1 − ‖Y − Ŷ‖² / ‖Y − ȳ‖²; None where y does not vary
    cka: float | None  # debiased linear CKA of base and tuned activations; None where undefined
    cos_vs_kl: Correlation | None  # over prompts, of that cosine with KL_raw − KL_mapped; None if undefined
    top1_agreement: float  # mean over prompts of how far patched and clean prefer the same tokens
    delta_logprob: float  # mean change of the log-probability of the clean run's preferred token, nats
    accuracy: Mapping[str, float]  # of base, tuned, raw, mapped: see `NextTokens`; empty without answers
    per_prompt: pd.DataFrame  # one row per prompt
    leak: tuple[str, ...] | None  # what was chosen on reported prompts, see `selection`; None if nobody knows
    undefined: Mapping[str, str]  # why a number has no value, by name
    seconds: float  # time of the split's recording and patches, shared by all cells
