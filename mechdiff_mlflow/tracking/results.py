"""Runs as a table: what `search_runs` gives, with params as numbers and the columns a person wants first."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.entities import Run

from mechdiff_mlflow import untrusted
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.lookup import all_runs
from mechdiff_mlflow.tracking.sent import check_read
from mechdiff_mlflow.tracking.store import Store

_MAX_TABLE = 256 << 20
# Not what Python reads as numbers: 1_000, nan and 007 stay text.
_INTEGER = r"-?(?:0|[1-9]\d{0,17})"
_DECIMAL = r"-?(?:0|[1-9]\d*)(?:\.\d*)?(?:[eE][+-]?\d+)?"
_FIRST = ["run_id", "name", "kind", "status", "parent_id", "started"]


def results_df(store: Store, experiment: str, *, where: str = "", kind: str | None = None) -> pd.DataFrame:
    """Every run of `experiment`, newest first, one row each, params and metrics as columns.

    MLflow keeps params as text and can only compare them for equality; here a param that reads as a number,
    true or false is one, so that `k` may hold 1, 8 and "full". A metric with the name of a param gets the
    column `metric.<name>`. Our own tags are text columns `tag.<name>`.

    Args:
        store: Where to look.
        experiment: Name of the experiment.
        where: MLflow's own filter, e.g. "metrics.drop_pct > 30 and params.hook = 'attn_out'".
        kind: Only runs of this kind, e.g. "patch".

    Raises:
        MechdiffError: There is no such experiment, or the filter is not valid.
    """
    conditions = [where] if where else []
    if kind is not None:
        conditions.append(f"tags.`mechdiff.kind` = '{kind}'")
    rows = [_row(run) for run in all_runs(store, [store.experiment_id(experiment)], " and ".join(conditions))]
    columns = _FIRST + sorted({key for row in rows for key in row if key not in _FIRST})
    table: pd.DataFrame = pd.DataFrame(rows, columns=columns)
    return table


def tables_of(store: Store, run_ids: Iterable[str], path: str) -> dict[str, pd.DataFrame]:
    """The table at `path` among the artifacts of each run that has it.

    Raises:
        MechdiffError: The store cannot be read, or a table is not what was logged.
    """
    found: dict[str, pd.DataFrame] = {}
    for run_id in run_ids:
        with store.errors(), tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
            if any(item.path == path for item in store.client.list_artifacts(run_id)):
                local = Path(store.client.download_artifacts(run_id, path, folder))
                check_read(local, path, run_id, store.client.get_run(run_id).data.tags)
                found[run_id] = _table(local)
    return found


def _table(path: Path) -> pd.DataFrame:
    try:
        content = json.loads(untrusted.read_text(path, _MAX_TABLE, "Table"))
        table: pd.DataFrame = pd.DataFrame(content["data"], columns=content["columns"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MechdiffError(f"{path.name} is not a table that was logged; run that step again.") from error
    return table


def _row(run: Run) -> dict[str, Any]:
    tags, params = run.data.tags, run.data.params
    row: dict[str, Any] = {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "kind": tags.get("mechdiff.kind"),
        "status": run.info.status,
        "parent_id": tags.get("mlflow.parentRunId"),
        "started": pd.to_datetime(run.info.start_time, unit="ms", utc=True, errors="coerce"),
    }
    row |= {key if key not in _FIRST else f"param.{key}": _value(text) for key, text in params.items()}
    row |= {key if key not in row else f"metric.{key}": value for key, value in run.data.metrics.items()}
    row |= {f"tag.{key}": text for key, text in tags.items() if not key.startswith("mlflow.")}
    return row


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(_INTEGER, text):
        return int(text)
    if re.fullmatch(_DECIMAL, text) and math.isfinite(number := float(text)):
        return number
    return text
