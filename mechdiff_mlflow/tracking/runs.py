"""Runs: one tree per command, written so that none is left RUNNING and nothing is logged twice.

A child costs one `create_run`, one `log_batch`, one upload and one status update, and is complete or FAILED.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

from mlflow.entities import LoggedModelInput, Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking import artifacts, flavour
from mechdiff_mlflow.tracking.artifacts import LongParams
from mechdiff_mlflow.tracking.interrupts import Interrupts, Killed
from mechdiff_mlflow.tracking.provenance import provenance_tags
from mechdiff_mlflow.tracking.records import MAX_TAG_CHARS, ParamValue, RunRecord, param_text
from mechdiff_mlflow.tracking.redaction import redact
from mechdiff_mlflow.tracking.store import Store, StoreUnreachable, one_attempt
from mechdiff_mlflow.tracking.view import install_view

_log = logging.getLogger(__name__)

MAP_RUN_TAG = "mechdiff.map_run"
RUN_ID_VARIABLE = "MLFLOW_RUN_ID"


class Tracker:
    """Writes runs of one experiment.

    Args:
        store: Where to.
        experiment: Name of the experiment, made if there is none. The run that an enclosing `mlflow run`
            made brings its own, and its children go there too.
        long_params: What to do with a param longer than MLflow keeps.
    """

    def __init__(self, store: Store, experiment: str, *, long_params: LongParams = LongParams.FAIL) -> None:
        self.store = store
        self.experiment = experiment
        self.long_params = long_params
        self.interrupts = Interrupts()

    @contextmanager
    def run(
        self,
        kind: str,
        name: str,
        params: Mapping[str, ParamValue] | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        description: str = "",
    ) -> Iterator[OpenRun]:
        """An open top-level run: the parent of a sweep's runs, or a lone `fit` or `patch`.

        The experiment gets the shared view of `view.py`.

        Inside `mlflow run` it is the run that MLflow made (once); else a new one. It ends FINISHED; FAILED
        when the body raises; KILLED on SIGTERM, SIGHUP or Ctrl-C. The reason becomes a tag and goes into the
        description.

        Args:
            kind: `run`, `sweep`, `atlas`, `report`, `fit`, `patch`, …
            name: What the UI shows.
            params: The settings as asked for. Those that `mlflow run` has logged already must agree.
            tags: More tags.
            description: Markdown, until `add` brings a better one.

        Raises:
            MechdiffError: The store refuses, or MLFLOW_RUN_ID names a run that cannot be continued.
        """
        record = RunRecord(
            kind=kind, name=name, params=params or {}, tags=tags or {}, description=description
        )
        with self.interrupts.active():
            open_run = None
            failure: BaseException | None = None
            try:
                with self.interrupts.deferred():
                    open_run = self._attach(record) or self._create(record)
                    open_run.add(record)
                    install_view(self.store, open_run.experiment_id)
                yield open_run
            except BaseException as error:
                failure = error
                raise
            finally:
                if open_run is not None:
                    with self.interrupts.deferred():
                        open_run.end(failure)

    def log(self, record: RunRecord) -> str:
        """Write a lone finished run; its id."""
        with self.run(record.kind, record.name, record.params) as run:
            run.add(record)
        return run.run_id

    def _create(self, record: RunRecord) -> OpenRun:
        experiment_id = self.store.experiment(self.experiment)
        with self.store.errors():
            run = self.store.client.create_run(
                experiment_id,
                start_time=record.started_ms,
                tags={**provenance_tags(), "mechdiff.kind": record.kind},
                run_name=record.name,
            )
        return OpenRun(self, run, {})

    def _attach(self, record: RunRecord) -> OpenRun | None:
        # Taken out of the environment: a second run of this process, or of one it starts, is another run.
        run_id = os.environ.pop(RUN_ID_VARIABLE, None)
        if not run_id:
            return None
        with self.store.errors():
            run = self.store.client.get_run(run_id)
        if run.info.status not in ("RUNNING", "SCHEDULED"):
            raise MechdiffError(
                f"{RUN_ID_VARIABLE} names run {run_id}, which is {run.info.status} already; unset it "
                "to start a new run."
            )
        tags = {key: value for key, value in provenance_tags().items() if key not in run.data.tags}
        tags |= {"mechdiff.kind": record.kind}
        if _is_generated(run.info.run_name or ""):
            tags["mlflow.runName"] = record.name
        with self.store.errors():
            self.store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        return OpenRun(self, run, {key: _unquoted(value) for key, value in run.data.params.items()})


class OpenRun:
    """A run in progress; made by `Tracker.run`."""

    def __init__(self, tracker: Tracker, run: MlflowRun, params: dict[str, str]) -> None:
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self._tracker = tracker
        self._store = tracker.store
        self._params = params
        self._description = ""
        self._model_ids: dict[str, str] = {}

    def add(self, record: RunRecord) -> None:
        """Put what `record` holds into this run; its kind and name stay as they are.

        Params that the run has must agree, and are not logged again.

        Raises:
            MechdiffError: A param differs from the logged one, or the store refuses.
        """
        fresh = {k: v for k, v in record.params.items() if not self._has_param(k, param_text(k, v))}
        with self._tracker.interrupts.deferred():
            self._write(self.run_id, replace(record, params=fresh))
        self._params |= {key: param_text(key, value) for key, value in fresh.items()}
        self._description = record.description or self._description

    def log(self, record: RunRecord, *, under: str | None = None) -> str:
        """Write one finished run below this one, or below `under`, one of its children; the new run's id.

        Raises:
            MechdiffError: The record or the store refuses; the child is then FAILED with the reason.
        """
        client = self._store.client
        tags = {
            **provenance_tags(),
            "mlflow.parentRunId": under or self.run_id,
            "mechdiff.kind": record.kind,
        }
        with self._tracker.interrupts.deferred():
            with self._store.errors():
                child = client.create_run(self.experiment_id, record.started_ms, tags, record.name)
            child_id: str = child.info.run_id
            try:
                self._write(child_id, record)
                with self._store.errors():
                    client.set_terminated(child_id, "FINISHED", record.ended_ms)
            except BaseException as error:
                self._finish(child_id, error, record.description)
                raise
        return child_id

    def end(self, error: BaseException | None) -> None:
        """Set the final status, by what ended the run; `Tracker.run` calls this."""
        self._finish(self.run_id, error, self._description)

    def _finish(self, run_id: str, error: BaseException | None, description: str) -> None:
        client = self._store.client
        status, reason = _ending(error)
        # A server that was waited for in vain gets one more chance, not another half minute.
        patience = one_attempt() if isinstance(error, StoreUnreachable) else nullcontext()
        try:
            with patience, self._store.errors():
                if reason:
                    note = f"**{status}:** {reason}\n\n{description}"
                    tags = {"mechdiff.failure": reason, "mlflow.note.content": note}
                    client.log_batch(run_id, tags=[RunTag(k, _cut(redact(v))) for k, v in tags.items()])
                client.set_terminated(run_id, status)
        except MechdiffError as another:
            if error is None:
                raise
            # What went wrong before is on its way to the user and matters more.
            _log.warning("Run %s could not be marked %s: %s", run_id, status, another)

    def _has_param(self, key: str, text: str) -> bool:
        logged = self._params.get(key)
        if logged is None:
            return False
        if logged != text and not same_number(logged, text):
            raise MechdiffError(
                f"Param {key!r} is {text} but run {self.run_id} was started with {logged}; "
                f"start it with -P {key}={text}."
            )
        return True

    def _write(self, run_id: str, record: RunRecord) -> None:
        """Everything but the status, the cheap checks before the first call."""
        params, files = artifacts.stored_params(record, self._tracker.long_params)
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
            model_id = self._model_of(run_id, record)
            now = record.ended_ms or int(time.time() * 1000)
            client.log_batch(
                run_id,
                [Metric(key, value, now, step, model_id=model_id) for key, value, step in metrics],
                [Param(key, text) for key, text in params.items()],
                [RunTag(key, redact(text)) for key, text in tags.items()],
            )
            models = [LoggedModelInput(model_id)] if model_id and record.map_run else None
            if record.datasets or models:
                client.log_inputs(run_id, [artifacts.dataset_input(p) for p in record.datasets], models)
            artifacts.upload(lambda folder: client.log_artifacts(run_id, folder), record, files)

    def _model_of(self, run_id: str, record: RunRecord) -> str | None:
        if record.map is not None:
            logged = flavour.log_model(
                record.map,
                record.name,
                store=self._store,
                run_id=run_id,
                experiment_id=self.experiment_id,
                params=record.params,
                metrics=record.metrics,
            )
            self._model_ids[run_id] = logged.model_id
            return logged.model_id
        if record.map_run is None:
            return None
        if record.map_run not in self._model_ids:
            fitted = flavour.maps_of_run(self._store, record.map_run)
            if not fitted:
                raise MechdiffError(f"Run {record.map_run} has no map to evaluate; give the id of a fit run.")
            self._model_ids[record.map_run] = fitted[-1].model_id
        return self._model_ids[record.map_run]


def _finite(record: RunRecord) -> tuple[list[tuple[str, float, int]], dict[str, str]]:
    """Metrics as (key, value, step), and why the others have no value (MLflow would store inf as 1.8e308)."""
    points = [(key, float(value), 0) for key, value in record.metrics.items()]
    points += [
        (key, float(v), step) for key, curve in record.stepped_metrics.items() for step, v in curve.items()
    ]
    undefined = {key: str(value) for key, value, _ in points if not math.isfinite(value)}
    return [point for point in points if math.isfinite(point[1])], {**undefined, **record.undefined}


def _ending(error: BaseException | None) -> tuple[str, str]:
    """The status and reason that an exception ends a run with."""
    if error is None:
        return "FINISHED", ""
    if isinstance(error, Killed):
        return "KILLED", f"Ended by {error.signal_name}."
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "Ended by Ctrl-C."
    if isinstance(error, GeneratorExit):
        return "KILLED", "The program stopped before the run was over."
    if isinstance(error, SystemExit):
        return ("FAILED", f"Exit code {error.code}.") if error.code else ("FINISHED", "")
    if isinstance(error, MechdiffError):
        return "FAILED", str(error)
    return "FAILED", f"{type(error).__name__}: {error}"


def _cut(text: str) -> str:
    """A failure's text, cut visibly where MLflow would refuse it."""
    mark = " … (cut)"
    return text if len(text) <= MAX_TAG_CHARS else text[: MAX_TAG_CHARS - len(mark)] + mark


def _unquoted(value: str) -> str:
    """A param as typed: `mlflow run` logs it quoted for the shell."""
    try:
        words = shlex.split(value)
    except ValueError:
        return value
    return words[0] if len(words) == 1 else value


def same_number(a: str, b: str) -> bool:
    """Whether two params read as the same number."""
    try:
        return float(a) == float(b)
    except ValueError:
        return False


def _is_generated(name: str) -> bool:
    """Whether MLflow made the run's name up, as in `dapper-owl-42`."""
    words = name.split("-")
    return (
        len(words) == 3
        and words[0] in {word.lower() for word in _GENERATOR_PREDICATES}
        and words[1] in {word.lower() for word in _GENERATOR_NOUNS}
    )
