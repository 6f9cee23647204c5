"""One record into one run, so that doing it again changes nothing.

Files first, then one batch of params, metrics and tags, all with the time at which the run began: MLflow
keeps one of two equal points. The caller sets the status, last.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlflow.entities import LoggedModelInput, Metric, Param, Run, RunData, RunTag

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.content import artifacts, keys
from mechdiff_mlflow.tracking.content.artifact_digests import Sent, digest_tag, files_of
from mechdiff_mlflow.tracking.content.artifact_files import StoredFiles
from mechdiff_mlflow.tracking.content.records import RunRecord, param_text
from mechdiff_mlflow.tracking.flavour import LoggedMap
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.store import Store

MAP_RUN_TAG = "mechdiff.map_run"


@dataclass
class _Written:
    """What this process has written into a run, so that writing more of it sends only that."""

    model: LoggedMap | None = None
    has_map: bool = False
    has_inputs: bool = False
    sources: dict[str, object] = field(default_factory=dict)
    sent: dict[str, Sent] = field(default_factory=dict)
    points: dict[tuple[str, int], Metric] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class RecordWriter:
    """Writes records; several threads may, each into other runs.

    Args:
        store: Where to.
        demand: Called before each request that writes; raises if this process may not write any more.
    """

    def __init__(self, store: Store, demand: Callable[[], None]) -> None:
        self._store, self._demand = store, demand
        self._models: dict[str, LoggedMap] = {}
        self._written: dict[str, _Written] = {}
        self._lock = threading.Lock()

    def begin(self, run: Run, record: RunRecord, *, again: bool = False) -> None:
        """The map of a record alone, which takes longest and is known first.

        Args:
            run: As it is before.
            record: What it is to hold.
            again: Whether some of that may be there from an earlier attempt.

        Raises:
            MechdiffError: The store refuses, or does not hold what was sent.
        """
        done = self._of(run)
        with self._store.errors():
            self._map(run, record, again, done)

    def write(self, run: Run, record: RunRecord, *, again: bool = False) -> None:
        """Everything but the status, the cheap checks before the first request; what is written stays.

        Args:
            run: As it is before; what it holds of durations is kept.
            record: What it is to hold.
            again: Whether some of that may be there from an earlier attempt.

        Raises:
            MechdiffError: The record or the store refuses, or the store does not hold what was sent.
        """
        run_id, done = run.info.run_id, self._of(run)
        params = {key: redact(param_text(key, value)) for key, value in record.params.items()}
        metrics, undefined = _finite(record)
        with self._store.errors():
            is_first = again and not done.sent
            self._map(run, record, again, done)
            self._send(run, _unsent(record, done), done, is_first)
            model_id = done.model.model_id if done.model else None
            models = [LoggedModelInput(model_id)] if model_id and record.map_run else None
            if (record.datasets or models) and not done.has_inputs:
                self._demand()
                inputs = [artifacts.dataset_input(prompts) for prompts in record.datasets]
                self._store.client.log_inputs(run_id, inputs, models)
                done.has_inputs = True
            at_ms = record.ended_ms or run.info.start_time
            if again:  # a former owner's last request may have come in since
                run = self._store.client.get_run(run_id)
            known = keys.fresh({key: value for key, value, _ in metrics}, run.data.metrics)
            points = [
                Metric(key, value, at_ms, step, model_id=model_id)
                for key, value, step in metrics
                if key in known and not ((at := done.points.get((key, step))) and at.value == value)
            ]
            tags = {key: redact(text) for key, text in _tags(record, undefined, done).items()}
            new_tags = {key: text for key, text in tags.items() if done.tags.get(key) != text}
            new_params = {key: text for key, text in params.items() if key not in done.params}
            if points or new_params or new_tags:
                self._demand()
                self._store.client.log_batch(
                    run_id,
                    points,
                    [Param(key, text) for key, text in new_params.items()],
                    [RunTag(key, text) for key, text in new_tags.items()],
                )
        done.points |= {(point.key, point.step): point for point in points}
        done.params |= params
        done.tags |= tags

    def whole(self, run: Run) -> Run:
        """A run that is whole: as it was found, or with what this process wrote into it."""
        if run.info.status == "FINISHED":
            return run
        done = self._of(run)
        data = RunData(
            list(done.points.values()),
            [Param(key, text) for key, text in done.params.items()],
            [RunTag(key, text) for key, text in done.tags.items()],
        )
        return Run(run.info, data)

    def model_of(self, run_id: str) -> LoggedMap | None:
        """The logged model of a run that this process has written or asked for."""
        with self._lock:
            return self._models.get(run_id)

    def _of(self, run: Run) -> _Written:
        with self._lock:
            return self._written.setdefault(run.info.run_id, _Written())

    def _send(self, run: Run, record: RunRecord, done: _Written, again: bool) -> None:
        """The files of a record, read back before anything says that they are there."""

        def send(folder: str) -> None:
            sent = files_of(Path(folder))
            files = StoredFiles(self._store, run.info.artifact_uri)
            self._demand()
            files.send(Path(folder), again=again)
            files.demand_present(sent)
            done.sent |= sent

        artifacts.upload(send, record)
        done.sources |= {**record.tables, **record.texts}

    def _map(self, run: Run, record: RunRecord, again: bool, done: _Written) -> None:
        """The map of a record, which is sent once."""
        if done.has_map:
            return
        if record.map is None or record.is_model:
            done.model = self._model_of(run, record, again)
        else:
            self._demand()
            done.sent |= flavour.send_map(self._store, run.info.artifact_uri, record.map, again=again)
        done.has_map = done.model is not None or record.map is not None

    def _model_of(self, run: Run, record: RunRecord, again: bool) -> LoggedMap | None:
        """The logged model that metrics belong to: of the record's own map, or of the run it measures."""
        run_id: str = record.map_run if record.map is None and record.map_run else run.info.run_id
        if record.map is not None:
            there = flavour.maps_of_run(self._store, run_id) if again else []
            wanted = record.map.sha256() if there else ""
            known = next((model for model in there if model.sha256 == wanted), None)
            known = known or flavour.log_model(
                record.map,
                record.name,
                store=self._store,
                run_id=run_id,
                experiment_id=run.info.experiment_id,
                params=record.params,
                metrics=record.metrics,
                again=again,
                demand=self._demand,
            )
        elif record.map_run is None:
            return None
        elif (known := self.model_of(run_id)) is None:
            fitted = flavour.maps_of_run(self._store, run_id)
            if not fitted:
                raise MechdiffError(f"Run {run_id} has no map to evaluate; give the id of a fit run.")
            known = fitted[-1]
        with self._lock:
            self._models[run_id] = known
        return known


def _unsent(record: RunRecord, done: _Written) -> RunRecord:
    """The record with those tables and texts alone that were not sent as they are."""
    return replace(
        record,
        tables={path: table for path, table in record.tables.items() if done.sources.get(path) is not table},
        texts={path: text for path, text in record.texts.items() if done.sources.get(path) is not text},
    )


def _tags(record: RunRecord, undefined: Mapping[str, str], done: _Written) -> dict[str, str]:
    tags = {**record.tags, **{f"mechdiff.undefined.{key}": why for key, why in undefined.items()}}
    if record.map_run is not None:
        tags[MAP_RUN_TAG] = record.map_run
    if record.description:
        tags["mlflow.note.content"] = record.description
    if record.tables:
        tags["mlflow.loggedArtifacts"] = artifacts.table_tag(record)
    return tags | digest_tag(done.sent)


def _finite(record: RunRecord) -> tuple[list[tuple[str, float, int]], dict[str, str]]:
    """Metrics as (key, value, step), and why the others have no value (MLflow would store inf as 1.8e308)."""
    points = [(key, float(value), 0) for key, value in record.metrics.items()]
    points += [
        (key, float(v), step) for key, curve in record.stepped_metrics.items() for step, v in curve.items()
    ]
    undefined = {key: str(value) for key, value, _ in points if not math.isfinite(value)}
    return [point for point in points if math.isfinite(point[1])], {**undefined, **record.undefined}
