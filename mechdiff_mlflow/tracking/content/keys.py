"""What makes a run the same run when it is asked for again, and its contents the same contents."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content.records import RunRecord, param_text

_OTHER_NUMBERS = 1e-2
"""Relative difference at which a number is another one, and not the same computed elsewhere."""
_TIME = "time/"


def key_of(record: RunRecord, code: str) -> str:
    """32 hex digits over what a record was asked to be: its kind, settings, prompts, pair and code.

    What was measured is not part of it, nor when. `code` is a version like `0.1.0+g1a2b3c4d5e`.
    """
    asked = {
        "kind": record.kind,
        "name": record.name,
        "params": {key: param_text(key, value) for key, value in record.params.items()},
        "datasets": sorted([p.name, p.split, p.digest] for p in record.datasets),
        "pair": record.tags.get("pair_fingerprint", ""),
        # What the map is, where a command was given it: what a name stands for may change.
        "map": [record.tags.get(key, "") for key in ("mechdiff.map", "mechdiff.map_sha256")]
        if "mechdiff.map" in record.tags
        else "",
        "code": code,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def fresh(metrics: Mapping[str, float], logged: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a run does not have yet; durations that it has stay as they are."""
    return {key: value for key, value in metrics.items() if not (key.startswith(_TIME) and key in logged)}


def check_same(run_id: str, record: RunRecord, logged: Mapping[str, float]) -> None:
    """Make sure that what was computed again is what a run holds.

    The last digits may differ: another machine, or other chunks after memory ran out.

    Raises:
        MechdiffError: A number is another one.
    """
    for key, value in record.metrics.items():
        if key.startswith(_TIME) or not math.isfinite(value) or key not in logged:
            continue
        if not math.isclose(value, logged[key], rel_tol=_OTHER_NUMBERS, abs_tol=1e-6):
            raise MechdiffError(
                f"Run {run_id} holds {key} = {logged[key]:.6g} and the same was now computed as {value:.6g}; "
                "something changed since it was written, so begin anew instead of resuming."
            )
