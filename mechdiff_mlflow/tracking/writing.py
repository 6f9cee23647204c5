"""One record into one run, so that doing it again changes nothing.

Files first, then one batch of params, metrics and tags, all with the time at which the run began: MLflow
keeps one of two equal points. The caller sets the status, last.
"""

from __future__ import annotations

import math
import threading
from pathlib import Path

from mlflow.entities import LoggedModelInput, Metric, Param, Run, RunTag

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking import artifacts, flavour, keys
from mechdiff_mlflow.tracking.artifacts import LongParams
from mechdiff_mlflow.tracking.records import RunRecord
from mechdiff_mlflow.tracking.redaction import redact
from mechdiff_mlflow.tracking.sent import Sent, digest_tag, files_of
from mechdiff_mlflow.tracking.store import Store
from mechdiff_mlflow.tracking.stored import StoredFiles

MAP_RUN_TAG = "mechdiff.map_run"


class RecordWriter:
    """Writes records; several threads may.

    Args:
        store: Where to.
        long_params: What to do with a param longer than MLflow keeps.
    """

    def __init__(self, store: Store, long_params: LongParams) -> None:
        self._store, self._long_params = store, long_params
        self._model_ids: dict[str, str] = {}
        self._sent: dict[str, dict[str, Sent]] = {}
        self._lock = threading.Lock()

    def write(self, run: Run, record: RunRecord, *, again: bool = False) -> None:
        """Everything but the status, the cheap checks before the first request.

        Args:
            run: As it is before; what it holds of durations is kept.
            record: What it is to hold.
            again: Whether some of that may be there from an earlier attempt.

        Raises:
            MechdiffError: The record or the store refuses, or the store does not hold what was sent.
        """
        run_id: str = run.info.run_id
        params, texts = artifacts.stored_params(record, self._long_params)
        metrics, undefined = _finite(record)
        tags = {**record.tags, **{f"mechdiff.undefined.{key}": why for key, why in undefined.items()}}
        if record.map_run is not None:
            tags[MAP_RUN_TAG] = record.map_run
        if record.description:
            tags["mlflow.note.content"] = record.description
        if record.tables:
            tags["mlflow.loggedArtifacts"] = artifacts.table_tag(record)
        client = self._store.client
        with self._store.errors():
            model_id = self._model_of(run, record, again)

            def send(folder: str) -> None:
                sent = files_of(Path(folder))
                files = StoredFiles(self._store, run.info.artifact_uri)
                files.send(Path(folder))
                files.demand_present(sent)
                with self._lock:
                    every = self._sent[run_id] = self._sent.get(run_id, {}) | sent
                tags.update(digest_tag(every))

            artifacts.upload(send, record, texts)
            models = [LoggedModelInput(model_id)] if model_id and record.map_run else None
            if record.datasets or models:
                client.log_inputs(run_id, [artifacts.dataset_input(p) for p in record.datasets], models)
            at_ms = record.ended_ms or run.info.start_time
            kept = keys.fresh({key: value for key, value, _ in metrics}, run.data.metrics)
            client.log_batch(
                run_id,
                [
                    Metric(key, value, at_ms, step, model_id=model_id)
                    for key, value, step in metrics
                    if key in kept
                ],
                [Param(key, text) for key, text in params.items()],
                [RunTag(key, redact(text)) for key, text in tags.items()],
            )

    def _model_of(self, run: Run, record: RunRecord, again: bool) -> str | None:
        """The logged model that metrics belong to: of the record's own map, or of the run it measures."""
        run_id: str = run.info.run_id
        if record.map is not None:
            there = flavour.maps_of_run(self._store, run_id) if again else []
            wanted = record.map.sha256() if there else ""
            logged = next((model for model in there if model.sha256 == wanted), None)
            logged = logged or flavour.log_model(
                record.map,
                record.name,
                store=self._store,
                run_id=run_id,
                experiment_id=run.info.experiment_id,
                params=record.params,
                metrics=record.metrics,
                again=again,
            )
            with self._lock:
                self._model_ids[run_id] = logged.model_id
            return logged.model_id
        if record.map_run is None:
            return None
        with self._lock:
            known = self._model_ids.get(record.map_run)
        if known is None:
            fitted = flavour.maps_of_run(self._store, record.map_run)
            if not fitted:
                raise MechdiffError(f"Run {record.map_run} has no map to evaluate; give the id of a fit run.")
            known = fitted[-1].model_id
            with self._lock:
                self._model_ids[record.map_run] = known
        return known


def _finite(record: RunRecord) -> tuple[list[tuple[str, float, int]], dict[str, str]]:
    """Metrics as (key, value, step), and why the others have no value (MLflow would store inf as 1.8e308)."""
    points = [(key, float(value), 0) for key, value in record.metrics.items()]
    points += [
        (key, float(v), step) for key, curve in record.stepped_metrics.items() for step, v in curve.items()
    ]
    undefined = {key: str(value) for key, value, _ in points if not math.isfinite(value)}
    return [point for point in points if math.isfinite(point[1])], {**undefined, **record.undefined}
