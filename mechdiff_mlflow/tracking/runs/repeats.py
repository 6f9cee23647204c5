"""Commands that are repeated, not resumed: the run that a killed attempt left is found and gone on with."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Run

from mechdiff_mlflow.tracking.runs.lookup import all_runs
from mechdiff_mlflow.tracking.runs.mlflow_run import RUN_ID_VARIABLE
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.runs.run_lock import is_alive
from mechdiff_mlflow.tracking.store.store import Store

_TAG = "mechdiff.repeat"
"""Tag of a top run: a digest of what was asked, a dot, and one of what it is to hold."""


@dataclass(frozen=True, slots=True)
class Earlier:
    """The runs that earlier attempts at the same left.

    Args:
        tag: For the run, if one is to be made or gone on with.
        finished: The run that holds all this already.
        unfinished: Id of a run that this machine's attempt left, to be gone on with.
    """

    tag: dict[str, str]
    finished: Run | None = None
    unfinished: str | None = None


def earlier(store: Store, experiment: str, asked: Any, content: Any = "") -> Earlier:
    """The run that an earlier attempt made, if any; deleted ones do not count.

    Args:
        store: Where to look.
        experiment: Name of the experiment, which need not exist.
        asked: What makes it the same request, as JSON holds it.
        content: What the run is to hold: where that is another now, a finished run is another, too.
    """
    request = _digest([asked, code_version()])
    tag = f"{request}.{_digest(content)}"
    with store.errors():
        there = store.client.get_experiment_by_name(experiment)
    if there is None or RUN_ID_VARIABLE in os.environ:  # `mlflow run` has made another run for this
        return Earlier({_TAG: tag})
    found = all_runs(store, [there.experiment_id], f"tags.`{_TAG}` LIKE '{request}.%'", newest_first=True)
    finished = (run for run in found if run.info.status == "FINISHED" and run.data.tags[_TAG] == tag)
    left = (run for run in found if run.info.status != "FINISHED" and is_alive(store, run) is False)
    unfinished = next((run.info.run_id for run in left), None)
    return Earlier({_TAG: tag}, next(finished, None), unfinished)


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
