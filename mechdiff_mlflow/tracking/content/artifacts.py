"""A record's tables, texts, files, long params and prompt sets in the forms that MLflow keeps and shows."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow.entities import Dataset, DatasetInput, InputTag

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content import records
from mechdiff_mlflow.tracking.content.records import RunRecord

if TYPE_CHECKING:
    import pandas as pd


_COLUMN = {"type": "string", "required": True}
"""A column of prompts in MLflow's schemas."""


def write_files(record: RunRecord, folder: Path) -> None:
    """Write every artifact of `record` into the new directory `folder`."""
    folder.mkdir()
    for path, table in record.tables.items():
        _write(folder / path, table_json(table))
    for path, text in record.texts.items():
        _write(folder / path, text)
    for path, source in record.files.items():
        _copy(Path(source), folder / path)


def table_json(table: pd.DataFrame) -> str:
    """The table as `mlflow.load_table` and the UI read it; every float keeps all its digits, NaN is null."""
    columns = [map(_plain, table.iloc[:, i].tolist()) for i in range(table.shape[1])]
    rows = list(zip(*columns, strict=True))
    return json.dumps({"columns": [str(c) for c in table.columns], "data": rows}, allow_nan=False)


def table_tag(record: RunRecord) -> str:
    """The tag value that makes MLflow offer the tables of a run for comparison."""
    return json.dumps([{"path": path, "type": "table"} for path in record.tables])


def dataset_input(prompts: records.Dataset) -> DatasetInput:
    """A prompt set as MLflow's run page shows it, with its split as the context."""
    dataset = Dataset(
        name=prompts.name,
        digest=prompts.digest,
        source_type="local",
        source=json.dumps({"uri": prompts.source}),
        schema=json.dumps({"mlflow_colspec": [_COLUMN | {"name": name} for name in prompts.columns]}),
        profile=json.dumps({"num_rows": prompts.n}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", prompts.split)])


def _plain(value: object) -> object:
    item = getattr(value, "item", None)
    if callable(item):
        value = item()  # a NumPy scalar
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        raise MechdiffError(f"Artifact {source} does not exist; the run that should hold it is not complete.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    try:
        os.link(source, target)  # nothing writes to it: it is only read to be uploaded
    except OSError:
        shutil.copyfile(source, target)
