"""Which measured maps may become champion."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.text import text_of
from mechdiff_mlflow.tracking.content.tag_names import (
    FITTED_ON,
    IMPORTED_FROM,
    PAIR_FINGERPRINT,
    REPORTED,
    SELECTION,
    SELECTION_LEAK,
)

_COMPARED = ("KL_mapped", "drop_pct", "skill_pct")
_MAX_FILE_BYTES = 1 << 16


class PromotionPolicy(BaseModel):
    """Rules that a measured map must meet; by default it must be measured, do good, and not be worse.

    It is worse than the version that it replaces where its skill_pct (drop_pct, where either has no skill) on
    the same prompts is lower. On other prompts the two cannot be compared, and it may not replace it either.

    Args:
        min_drop_pct: Least drop_pct, in percent; None for any.
        min_skill_pct: Least skill_pct, in percent; None for any.
        ci_above_zero: Whether the 95 % intervals of skill_pct and, where there is a raw patch, of drop_pct
            must lie above 0.
        allow_leak: Whether a choice may have been made on prompts that are reported, or nobody knows.
        allow_pair_mismatch: Whether the map may be of another pair than the version it replaces.
        force: Whether all of this is waived; not a rule for files.

    Raises:
        MechdiffError: A threshold is not a finite number.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    min_drop_pct: float | None = None
    min_skill_pct: float | None = None
    ci_above_zero: bool = True
    allow_leak: bool = False
    allow_pair_mismatch: bool = False
    force: bool = False

    def model_post_init(self, _: object) -> None:
        """Refuse thresholds that no number meets or misses."""
        for rule in ("min_drop_pct", "min_skill_pct"):
            least = getattr(self, rule)
            if least is not None and not math.isfinite(least):
                raise MechdiffError(f"Rule {rule} is {least}; give a finite number of percent.")

    @classmethod
    def load(cls, path: str | Path) -> PromotionPolicy:
        """The policy in a YAML file, its keys being the arguments of this class but `force`.

        Raises:
            MechdiffError: The file cannot be read, is not YAML, or has unknown keys or wrong values.
        """
        text = untrusted.read_text(Path(path), _MAX_FILE_BYTES, "Policy")
        rules = untrusted.parse_yaml(text, f"Policy {path}")
        try:
            policy = cls.model_validate({} if rules is None else rules)
            reason = "force is given by --force and not by a file" if policy.force else ""
        except ValidationError as error:
            reason = untrusted.explain(error)
        if reason:
            known = ", ".join(rule for rule in cls.model_fields if rule != "force")
            raise MechdiffError(f"Policy {path} is not valid: {reason}; its keys are {known}.")
        return policy

    def with_rules(self, **rules: Any) -> PromotionPolicy:
        """The same policy with those of `rules` that are not None in place of its own."""
        given = {rule: value for rule, value in rules.items() if value is not None}
        return PromotionPolicy(**{**self.model_dump(), **given})

    def __str__(self) -> str:
        """The rules that differ from the defaults: `min_drop_pct 30, ci_above_zero`; else `default`."""
        changed = [
            ("" if value else "no ") + rule if isinstance(value, bool) else f"{rule} {text_of(value)}"
            for rule, value in self.model_dump(exclude_defaults=True).items()
        ]
        return ", ".join(changed) or "default"

    def refusals(
        self, metrics: Mapping[str, float], ours: Mapping[str, str], incumbent: Mapping[str, str] | None
    ) -> list[str]:
        """Why a map may not replace a version with the tags `incumbent`, one line a rule.

        Args:
            metrics: Of the run that measured the map, e.g. drop_pct, skill_pct, ci/drop_pct_low.
            ours: The run's params and tags, and the map's meta, as text.
            incumbent: None where there is no such version.
        """
        theirs = incumbent or {}
        if "KL_mapped" not in metrics:
            # By `import`, which says so, and takes nothing away.
            new = incumbent is None and IMPORTED_FROM in ours
            if new and self.min_drop_pct is None and self.min_skill_pct is None:
                return []
            return [
                "force: no run has measured this map (mechdiff patch --map runs:/RUN does), and nobody knows "
                "what it does"
            ]
        found = []
        for metric, least in (("drop_pct", self.min_drop_pct), ("skill_pct", self.min_skill_pct)):
            if least is not None and not metrics.get(metric, -math.inf) >= least:
                found.append(
                    f"min_{metric}: {_shown(metrics, metric)}, at least {text_of(least)} is asked for"
                )
        # Between models of different widths there is no raw patch, and so no drop.
        has_drop = "KL_raw" in metrics or "drop_pct" in metrics
        for low in (*(["ci/drop_pct_low"] if has_drop else []), "ci/skill_pct_low"):
            if self.ci_above_zero and not metrics.get(low, -math.inf) > 0:
                found.append(f"ci_above_zero: {_shown(metrics, low)}")
        leak = ours.get(SELECTION_LEAK, "unknown").lower()
        if not self.allow_leak and leak != "false":
            found.append(
                f"allow_leak: {ours.get(SELECTION, 'a choice was made on prompts that it is measured on')}"
                if leak == "true"
                else "allow_leak: the map does not say on which prompts its settings were chosen"
            )
        pair, other = ours.get(PAIR_FINGERPRINT), theirs.get(PAIR_FINGERPRINT)
        if not self.allow_pair_mismatch:
            if FITTED_ON in ours:
                found.append(
                    f"allow_pair_mismatch: it was measured on pair {pair} and fitted on {ours[FITTED_ON]}"
                )
            if other not in (None, pair):
                found.append(
                    f"allow_pair_mismatch: it is of pair {pair or 'unknown'}, the present version of {other} "
                    "(another pair, or measured with an earlier version of mechdiff)"
                )
        if other in (None, pair):
            found += _not_better(metrics, ours, theirs)
        return found


def _not_better(
    metrics: Mapping[str, float], ours: Mapping[str, str], theirs: Mapping[str, str]
) -> list[str]:
    """Why a map is no improvement on a measured version with the tags `theirs`."""
    present = numbers_in(theirs)
    if not present:
        return []
    both = f"the present version has {numbers(present)}, this one {numbers(metrics)}"
    if not same_prompts(ours, theirs):
        return [f"force: they were measured on different prompts and cannot be compared; {both}"]
    key = next((key for key in ("skill_pct", "drop_pct") if key in present and key in metrics), None)
    if key is not None and metrics[key] < present[key]:
        return [f"force: it is worse on the same prompts; {both}"]
    return []


def numbers(metrics: Mapping[str, float]) -> str:
    """Drop and skill with their intervals, in words."""
    shown = []
    for name in ("drop", "skill"):
        key = f"{name}_pct"
        ends = [metrics.get(f"ci/{key}_{end}") for end in ("low", "high")]
        bounds = "" if None in ends else f" [{ends[0]:.1f}, {ends[1]:.1f}]"
        shown += [f"{name} {metrics[key]:.1f}{bounds} %"] if key in metrics else []
    return ", ".join(shown) or ("no drop or skill" if "KL_mapped" in metrics else "not measured")


def numbers_in(tags: Mapping[str, str]) -> dict[str, float]:
    """The metrics that a version's tags hold; what is no finite number there counts as not measured."""
    found = {}
    for key, text in tags.items():
        if key in _COMPARED or key.startswith("ci/"):
            with contextlib.suppress(ValueError):
                if math.isfinite(value := float(text)):
                    found[key] = value
    return found


def same_prompts(ours: Mapping[str, str], theirs: Mapping[str, str]) -> bool:
    """Whether two measurements are of one pair on the same prompts, by digest where both have one."""
    keys = ("pair_fingerprint", REPORTED if REPORTED in ours and REPORTED in theirs else "split", "n")
    return all(ours.get(key) == theirs.get(key) for key in keys)


def _shown(metrics: Mapping[str, float], key: str) -> str:
    return f"{key} is {metrics[key]:.4g}" if key in metrics else f"no {key}"
