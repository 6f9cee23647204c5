"""What a top run says of the patch runs below it, in one file, so that readers need not ask for each run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.tracking.content.tag_names import PAIR_FINGERPRINT, SELECTION, SELECTION_LEAK

CELLS = "cells.json"
"""Artifact of a finished top run: a table of the patch runs below it."""

_MAX_BYTES = 256 << 20
_TAGS = ("null", SELECTION, SELECTION_LEAK, PAIR_FINGERPRINT)
# A column of its own for what MLflow keeps apart under the same name.
_PREFIXES = ("params.", "metrics.", "tags.")
_STARTED = "time/started_ms"


def cell_row(run: Run) -> dict[str, Any]:
    """One patch run, with what it holds."""
    row: dict[str, Any] = {"run_id": run.info.run_id, "name": run.info.run_name}
    row |= {f"params.{key}": text for key, text in run.data.params.items()}
    row |= {f"metrics.{key}": value for key, value in run.data.metrics.items() if not key.startswith("time/")}
    row |= {
        f"tags.{key}": text
        for key, text in run.data.tags.items()
        if key in _TAGS or key.startswith("mechdiff.undefined.")
    }
    return row | {_STARTED: run.info.start_time}


def cells_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table that `mlflow.load_table` reads, too."""
    columns = sorted({key for row in rows for key in row})
    data = [[row.get(key) for key in columns] for row in rows]
    return json.dumps({"columns": columns, "data": data}, allow_nan=False)


def read_cells(path: Path) -> list[dict[str, Any]]:
    """What `cells_text` wrote, by row: run_id, name, started_ms, params, metrics and tags.

    Raises:
        MechdiffError: It is no such table.
    """
    try:
        content = json.loads(untrusted.read_text(path, _MAX_BYTES, "Table"))
        return [_parsed(dict(zip(content["columns"], row, strict=True))) for row in content["data"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MechdiffError(f"{path.name} is not a table that was logged; run that step again.") from error


def _parsed(row: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {key: str(row[key] or "") for key in ("run_id", "name")}
    found |= {"started_ms": int(row[_STARTED])}
    params, metrics, tags = (
        {key.removeprefix(prefix): v for key, v in row.items() if key.startswith(prefix) and v is not None}
        for prefix in _PREFIXES
    )
    found["params"] = {key: str(text) for key, text in params.items()}
    found["metrics"] = {key: float(value) for key, value in metrics.items()}
    found["tags"] = {key: str(text) for key, text in tags.items()}
    return found
