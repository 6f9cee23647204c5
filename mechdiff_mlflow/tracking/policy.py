"""Which candidates may become champion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mechdiff_mlflow.errors import MechdiffError

PAIR_FINGERPRINT = "pair_fingerprint"
SELECTION_LEAK = "selection_leak"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a policy looks at.

    Args:
        run_id: Of the run that measured the map.
        metrics: Of that run, e.g. drop_pct, skill_pct, ci/drop_pct_low.
        facts: Its params and tags, and the map's meta, as text.
    """

    run_id: str
    metrics: Mapping[str, float]
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PromotionPolicy:
    """Rules that a candidate must meet; the defaults are those that concern what the numbers mean at all.

    Args:
        min_drop_pct: Least drop_pct, in percent; None for any.
        min_skill_pct: Least skill_pct, in percent; None for any.
        ci_above_zero: Whether the 95 % interval of drop_pct must lie above 0.
        allow_leak: Whether a choice may have been made on the split that is reported.
        allow_pair_mismatch: Whether the candidate may be of another pair than the version it replaces.

    Raises:
        MechdiffError: A threshold is not a finite number.
    """

    min_drop_pct: float | None = None
    min_skill_pct: float | None = None
    ci_above_zero: bool = False
    allow_leak: bool = False
    allow_pair_mismatch: bool = False

    def __post_init__(self) -> None:
        for rule, least in (("min_drop_pct", self.min_drop_pct), ("min_skill_pct", self.min_skill_pct)):
            if least is not None and not math.isfinite(least):
                raise MechdiffError(f"Rule {rule} is {least}; give a finite number of percent.")

    def refusals(self, candidate: Candidate, incumbent: Mapping[str, str] | None) -> list[str]:
        """Why the candidate may not replace a version with the tags `incumbent`, one line a rule."""
        found = []
        for metric, least in (("drop_pct", self.min_drop_pct), ("skill_pct", self.min_skill_pct)):
            if least is not None and not candidate.metrics.get(metric, -math.inf) >= least:
                found.append(f"min_{metric}: {_shown(candidate, metric)}, at least {least:g} is asked for")
        if self.ci_above_zero and not candidate.metrics.get("ci/drop_pct_low", -math.inf) > 0:
            found.append(f"ci_above_zero: {_shown(candidate, 'ci/drop_pct_low')}")
        if not self.allow_leak and candidate.facts.get(SELECTION_LEAK, "").lower() == "true":
            found.append("allow_leak: a choice was made on the split that it is measured on")
        theirs = (incumbent or {}).get(PAIR_FINGERPRINT)
        ours = candidate.facts.get(PAIR_FINGERPRINT)
        if not self.allow_pair_mismatch and theirs is not None and ours != theirs:
            found.append(
                f"allow_pair_mismatch: it is of pair {ours or 'unknown'}, the present version of {theirs}"
            )
        return found


def _shown(candidate: Candidate, metric: str) -> str:
    return f"{metric} is {candidate.metrics[metric]:.4g}" if metric in candidate.metrics else f"no {metric}"
