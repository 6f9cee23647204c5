"""One record into one run, so that doing it again changes nothing.

Files first, then one batch of params, metrics and tags, all with the time at which the run began: MLflow
keeps one of two equal points. The caller sets the status, last.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from mlflow.entities import LoggedModelInput, Metric, Param, Run, RunData, RunTag

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.content import artifacts
from mechdiff_mlflow.tracking.content.artifact_files import Sent, StoredFiles, digest_tag, files_of
from mechdiff_mlflow.tracking.content.records import TIME, RunRecord, param_text
from mechdiff_mlflow.tracking.content.tag_names import MAP_RUN_TAG
from mechdiff_mlflow.tracking.flavour import MAP_FILE, LoggedMap
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.store import Store


class RecordWriter:
    """Writes records; several threads may, each into other runs.

    `require` is called before each request that writes; it raises if this process may not write any more.
    """

    def __init__(self, store: Store, require: Callable[[], None]) -> None:
        self._store, self._require = store, require
        self.models: dict[str, LoggedMap] = {}
        """The logged models of runs that were written or measured, by run."""
        self._sent: dict[str, dict[str, Sent]] = {}
        """All files of each run that is written, which may be in several goes."""

    def write(self, run: Run, record: RunRecord, *, again: bool = False) -> Run:
        """Write everything but the status, the cheap checks before the first request.

        Returns the run with what was written. `again` says that some may be there from an earlier attempt.

        Raises:
            MechdiffError: The record or the store refuses, or the store does not hold what was sent.
        """
        client, run_id = self._store.client, run.info.run_id
        params = [Param(key, redact(param_text(key, value))) for key, value in record.params.items()]
        metrics, undefined = _finite(record)
        with self._store.errors():
            sent = self._sent.setdefault(run_id, {})
            sent |= self._send(run, record, again)
            model = self._model_of(run, record, again)
            inputs = [LoggedModelInput(model.model_id)] if model and record.map_run else None
            if record.datasets or inputs:
                self._require()
                client.log_inputs(run_id, [artifacts.dataset_input(p) for p in record.datasets], inputs)
            at_ms = record.ended_ms or run.info.start_time
            if again:  # a former owner's last request may have come in since
                run = client.get_run(run_id)
            model_id = model.model_id if model else None
            on = next(
                (d for d in record.datasets if model_id and d.split == record.params.get("split")), None
            )
            named = (on.name, on.digest) if on else (None, None)
            points = [
                Metric(key, value, at_ms, step, model_id, *named)
                for key, value, step in metrics
                if not (key.startswith(TIME) and key in run.data.metrics)  # durations stay as they were
            ]
            tags = [RunTag(key, redact(text)) for key, text in _tags(record, undefined, sent).items()]
            if points or params or tags:
                self._require()
                client.log_batch(run_id, points, params, tags)
        return Run(run.info, RunData(points, params, tags))

    def _send(self, run: Run, record: RunRecord, again: bool) -> dict[str, Sent]:
        """Send the files of a record, its map too where that is no model, and check them there."""
        with tempfile.TemporaryDirectory(prefix="mechdiff-") as temporary:
            folder = Path(temporary, "sent")
            artifacts.write_files(record, folder)
            is_file = record.map is not None and not record.is_model
            if record.map is not None and is_file:
                (folder / MAP_FILE).write_bytes(record.map.to_bytes())
            if sent := files_of(folder):
                files = StoredFiles(self._store, run.info.artifact_uri)
                self._require()
                files.send(folder, again=again)
                files.require_present(sent)
                if is_file:
                    files.require_same({MAP_FILE: sent[MAP_FILE].sha256}, Path(temporary, "back"))
        return sent

    def _model_of(self, run: Run, record: RunRecord, again: bool) -> LoggedMap | None:
        """The logged model that metrics belong to: of the record's own map, or of the run it measures."""
        run_id: str = record.map_run or run.info.run_id
        if record.map is not None and record.is_model and run_id not in self.models:
            there = flavour.maps_of(self._store, run_id) if again else []
            wanted = record.map.sha256() if there else ""
            found = next((model for model in there if model.sha256 == wanted), None)
            self.models[run_id] = found or flavour.log_model(
                record.map,
                record.name,
                store=self._store,
                run_id=run_id,
                experiment_id=run.info.experiment_id,
                params=record.params,
                metrics=record.metrics,
                again=again,
                require_owner=self._require,
            )
        elif record.map_run is not None and run_id not in self.models:
            fitted = flavour.maps_of(self._store, run_id)
            if not fitted:
                raise MechdiffError(f"Run {run_id} has no map to evaluate; give the id of a fit run.")
            self.models[run_id] = fitted[-1]
        return self.models.get(run_id)


def _tags(record: RunRecord, undefined: Mapping[str, str], sent: Mapping[str, Sent]) -> dict[str, str]:
    tags = {**record.tags, **{f"mechdiff.undefined.{key}": why for key, why in undefined.items()}}
    if record.map_run is not None:
        tags[MAP_RUN_TAG] = record.map_run
    if record.description:
        tags["mlflow.note.content"] = record.description
    if record.tables:
        tags["mlflow.loggedArtifacts"] = artifacts.table_tag(record)
    return tags | digest_tag(sent)


def _finite(record: RunRecord) -> tuple[list[tuple[str, float, int]], dict[str, str]]:
    """Metrics as (key, value, step), and why the others have no value (MLflow would store inf as 1.8e308)."""
    points = [(key, float(value), 0) for key, value in record.metrics.items()]
    points += [
        (key, float(v), step) for key, curve in record.stepped_metrics.items() for step, v in curve.items()
    ]
    undefined = {key: str(value) for key, value, _ in points if not math.isfinite(value)}
    return [point for point in points if math.isfinite(point[1])], {**undefined, **record.undefined}
