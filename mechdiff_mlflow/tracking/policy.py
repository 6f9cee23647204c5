"""Which candidates may become champion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mechdiff_mlflow import untrusted
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import explain

PAIR_FINGERPRINT = "pair_fingerprint"
FITTED_ON = "fitted_on_pair"
"""Fingerprint of the pair that a map was fitted on, where it was measured on another."""
SELECTION_LEAK = "selection_leak"

_MAX_FILE_BYTES = 1 << 16


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

    @classmethod
    def load(cls, path: str | Path) -> PromotionPolicy:
        """The policy in a YAML file, its keys being the arguments of this class.

        Raises:
            MechdiffError: The file cannot be read, is not YAML, or has unknown keys or wrong values.
        """
        text = untrusted.read_text(Path(path), _MAX_FILE_BYTES, "Policy")
        fields = untrusted.parse_yaml(text, f"Policy {path}")
        try:
            return cls(**_Rules.model_validate({} if fields is None else fields).model_dump())
        except (ValidationError, TypeError) as error:
            known = ", ".join(_Rules.model_fields)
            raise MechdiffError(
                f"Policy {path} is not valid: {explain(error)}; its keys are {known}."
            ) from None

    def with_rules(self, **rules: Any) -> PromotionPolicy:
        """The same policy with those of `rules` that are not None in place of its own."""
        return replace(self, **{rule: value for rule, value in rules.items() if value is not None})

    def __str__(self) -> str:
        """The rules that differ from the defaults: `min_drop_pct 30, ci_above_zero`; else `default`."""
        plain = asdict(PromotionPolicy())
        changed = [(rule, value) for rule, value in asdict(self).items() if value != plain[rule]]
        return (
            ", ".join(rule if value is True else f"{rule} {value:g}" for rule, value in changed) or "default"
        )

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
        fitted_on = candidate.facts.get(FITTED_ON)
        if not self.allow_pair_mismatch and fitted_on is not None:
            found.append(
                f"allow_pair_mismatch: it was measured on pair {candidate.facts.get(PAIR_FINGERPRINT)} and "
                f"fitted on {fitted_on}"
            )
        theirs = (incumbent or {}).get(PAIR_FINGERPRINT)
        ours = candidate.facts.get(PAIR_FINGERPRINT)
        if not self.allow_pair_mismatch and theirs is not None and ours != theirs:
            found.append(
                f"allow_pair_mismatch: it is of pair {ours or 'unknown'}, the present version of {theirs} "
                "(another pair, or measured with an earlier version of mechdiff)"
            )
        return found


class _Rules(BaseModel):
    """The form of a policy file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    min_drop_pct: float | None = None
    min_skill_pct: float | None = None
    ci_above_zero: bool = False
    allow_leak: bool = False
    allow_pair_mismatch: bool = False


def _shown(candidate: Candidate, metric: str) -> str:
    return f"{metric} is {candidate.metrics[metric]:.4g}" if metric in candidate.metrics else f"no {metric}"
