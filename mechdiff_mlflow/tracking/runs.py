"""Runs: one tree per command, written so that none is left RUNNING and nothing is there twice.

Every run below a parent has a key (see `keys`), by which it is looked up before it is made again: after a
lost answer, and after a killed process when the parent is resumed. What it holds is a function of what was
computed, and stamped with the time at which it began, so that writing it again changes nothing; FINISHED
comes last, once the store has been seen to hold what was sent. Who may write is decided by a lease (see
`lease`).
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from mlflow.entities import Run, RunTag, ViewType

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.artifacts import LongParams
from mechdiff_mlflow.tracking.endings import (
    RUN_ID_VARIABLE,
    cut,
    enclosing_run,
    ending,
    params_of,
    same_number,
)
from mechdiff_mlflow.tracking.interrupts import Interrupts
from mechdiff_mlflow.tracking.keys import KEY_TAG, ROOT_TAG, check_same, key_of
from mechdiff_mlflow.tracking.lease import Lease, taken_over
from mechdiff_mlflow.tracking.provenance import code_version, provenance_tags
from mechdiff_mlflow.tracking.records import ParamValue, RunRecord, param_text
from mechdiff_mlflow.tracking.redaction import redact
from mechdiff_mlflow.tracking.store import Store, StoreUnreachable
from mechdiff_mlflow.tracking.view import install_view
from mechdiff_mlflow.tracking.writing import MAP_RUN_TAG, RecordWriter

__all__ = ["MAP_RUN_TAG", "RUN_ID_VARIABLE", "OpenRun", "Tracker", "same_number"]

EPOCH_TAG = "mechdiff.epoch"
"""Tag of a run below a parent: which owner of the parent wrote it last."""

_WRITERS = 8
"""Threads that log at once to a server; a SQLite file takes one writer at a time."""
_PAGE = 1000

_log = logging.getLogger(__name__)


class Tracker:
    """Writes runs of one experiment.

    Args:
        store: Where to.
        experiment: Name of the experiment, made if there is none. The run that an enclosing `mlflow run`
            made brings its own, and its children go there too.
        long_params: What to do with a param longer than MLflow keeps.
        resume: Id of an unfinished run to go on with, instead of making one.
    """

    def __init__(
        self,
        store: Store,
        experiment: str,
        *,
        long_params: LongParams = LongParams.FAIL,
        resume: str | None = None,
    ) -> None:
        self.store = store
        self.experiment = experiment
        self.long_params = long_params
        self.interrupts = Interrupts(store.patience.hurry)
        self._resume = resume

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

        Inside `mlflow run` it is the run that MLflow made (once); else a new one, or the one that is resumed.
        It ends FINISHED; FAILED when the body raises; KILLED on SIGTERM, SIGHUP or Ctrl-C. The reason becomes
        a tag and goes into the description.

        Args:
            kind: `run`, `sweep`, `atlas`, `report`, `fit`, `patch`, …
            name: What the UI shows.
            params: The settings as asked for. Those that `mlflow run` has logged already must agree.
            tags: More tags.
            description: Markdown, until `add` brings a better one.

        Raises:
            MechdiffError: The store refuses, MLFLOW_RUN_ID names a run that cannot be continued, or another
                process is at work on the run that is resumed.
        """
        record = RunRecord(
            kind=kind, name=name, params=params or {}, tags=tags or {}, description=description
        )
        with self.interrupts.active(), ExitStack() as stack:
            open_run = None
            failure: BaseException | None = None
            try:
                if self._resume is not None:  # may take a minute, and has made nothing yet
                    open_run = stack.enter_context(self._resumed(self._resume))
                else:
                    with self.interrupts.deferred():
                        open_run = stack.enter_context(self._new(record))
                with self.interrupts.deferred():
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

    @contextmanager
    def _new(self, record: RunRecord) -> Iterator[OpenRun]:
        """A run that was just made, by us or by `mlflow run`."""
        lease = Lease(self.store)
        run = self._attach(record, lease) or self._create(record, lease)
        with lease.kept(run.info.run_id):
            yield OpenRun(self, run, lease)

    @contextmanager
    def _resumed(self, run_id: str) -> Iterator[OpenRun]:
        """A run that another process left."""
        with self.store.errors():
            run = self.store.client.get_run(run_id)
        with taken_over(self.store, run) as lease:
            yield OpenRun(self, self._restarted(run, lease), lease, resumed=True)

    def _create(self, record: RunRecord, lease: Lease) -> Run:
        experiment_id = self.store.experiment(self.experiment)
        key = uuid.uuid4().hex
        tags = {**provenance_tags(), "mechdiff.kind": record.kind, KEY_TAG: key, **lease.holder.tag}
        return _once(self.store, experiment_id, f"tags.`{KEY_TAG}` = '{key}'", record, tags)

    def _attach(self, record: RunRecord, lease: Lease) -> Run | None:
        # Taken out of the environment: a second run of this process, or of one it starts, is another run.
        run_id = os.environ.pop(RUN_ID_VARIABLE, None)
        if not run_id:
            return None
        with self.store.errors():
            run = self.store.client.get_run(run_id)
            tags = {**enclosing_run(run, record, provenance_tags()), **lease.holder.tag}
            self.store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        return run

    def _restarted(self, run: Run, lease: Lease) -> Run:
        """An unfinished run, RUNNING again."""
        client, run_id = self.store.client, run.info.run_id
        with self.store.errors():
            tags = {**provenance_tags(), "mechdiff.resumed": str(lease.holder.epoch - 1)}
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
            client.update_run(run_id, status="RUNNING")
            if "mechdiff.failure" in run.data.tags:
                client.delete_tag(run_id, "mechdiff.failure")
        return run


class OpenRun:
    """A run in progress; made by `Tracker.run`."""

    def __init__(self, tracker: Tracker, run: Run, lease: Lease, *, resumed: bool = False) -> None:
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.is_resumed = resumed
        self._run, self._lease, self._tracker = run, lease, tracker
        self._store = tracker.store
        self._writer = RecordWriter(tracker.store, tracker.long_params)
        self._params: dict[str, str] = params_of(run)
        self._description = ""
        self._logged: dict[str, str] = {}
        """Runs below this one that this process has written or begun to, by key."""
        self._left = {child.data.tags[KEY_TAG]: child for child in self._below()} if resumed else {}

    def add(self, record: RunRecord) -> None:
        """Put what `record` holds into this run; its kind and name stay as they are.

        Params that the run has must agree, and are not logged again.

        Raises:
            MechdiffError: A param differs from the logged one, or the store refuses.
        """
        fresh = {k: v for k, v in record.params.items() if not self._has_param(k, param_text(k, v))}
        with self._tracker.interrupts.deferred():
            self._lease.demand()
            self._writer.write(self._run, replace(record, params=fresh), again=self.is_resumed)
        self._params |= {key: param_text(key, value) for key, value in fresh.items()}
        self._description = record.description or self._description

    def pin(self, key: str, text: str, what: str) -> None:
        """Set a tag that must be the same whenever the run is resumed.

        Args:
            key: Of the tag.
            text: Its text.
            what: What it stands for, in a message.

        Raises:
            MechdiffError: The run has it with another text.
        """
        there = self._run.data.tags.get(key, text)
        if there != text:
            raise MechdiffError(
                f"Run {self.run_id} was begun with {key} {there} and now it is {text}: {what} has changed "
                "since, so begin anew instead of resuming."
            )
        with self._store.errors():
            self._store.client.set_tag(self.run_id, key, text)

    def log(self, record: RunRecord, *, under: str | None = None) -> str:
        """Write one finished run below this one, or below `under`, one of its children; the new run's id.

        Raises:
            MechdiffError: The record or the store refuses; the child is then FAILED with the reason. Or
                another process owns this run by now.
        """
        with self._tracker.interrupts.deferred():
            return self._log(self._begun(record), record, under or self.run_id)

    def log_all(
        self, records: Iterable[RunRecord], progress: Callable[[int], None] | None = None
    ) -> list[str]:
        """Write finished runs below this one, several at once where the store takes that; ids in order.

        Args:
            records: Of the runs.
            progress: Called after each with 1.

        Raises:
            MechdiffError: As `log`; those that were begun are brought to their end first.
        """
        records = list(records)
        tokens = [self._begun(record) for record in records]
        n_writers = 1 if self._store.sqlite_path is not None else _WRITERS
        with ThreadPoolExecutor(n_writers, thread_name_prefix="mechdiff-log") as pool:
            futures = [
                pool.submit(self._log, key, record, self.run_id)
                for key, record in zip(tokens, records, strict=True)
            ]
            ids = []
            try:
                for future in futures:
                    ids.append(future.result())
                    if progress is not None:
                        progress(1)
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
        return ids

    def end(self, error: BaseException | None) -> None:
        """Set the final status, by what ended the run; `Tracker.run` calls this."""
        if error is None and (self.is_resumed or self._store.patience.was_tested):
            self._tidy()
        self._finish(self.run_id, error, self._description)

    def _begun(self, record: RunRecord) -> str:
        """The key of a record that is about to be logged."""
        key = key_of(record, code_version())
        assert key not in self._logged, f"{record.name} is logged twice below {self.run_id}"
        self._logged[key] = ""
        return key

    def _log(self, key: str, record: RunRecord, parent: str) -> str:
        self._lease.demand()
        left = self._left.get(key)
        if left is not None and left.info.status == "FINISHED":
            check_same(left.info.run_id, record, left.data.metrics)
            self._logged[key] = left.info.run_id
            return str(left.info.run_id)
        run = self._child(key, record, parent) if left is None else self._taken(left)
        run_id: str = run.info.run_id
        self._logged[key] = run_id
        try:
            self._writer.write(run, record, again=left is not None)
            self._lease.demand()
            with self._store.errors():
                self._store.client.set_terminated(run_id, "FINISHED", record.ended_ms)
        except BaseException as error:
            self._finish(run_id, error, record.description)
            raise
        return run_id

    def _child(self, key: str, record: RunRecord, parent: str) -> Run:
        tags = {
            **provenance_tags(),
            "mlflow.parentRunId": parent,
            "mechdiff.kind": record.kind,
            KEY_TAG: key,
            ROOT_TAG: self.run_id,
            EPOCH_TAG: str(self._lease.holder.epoch),
        }
        where = f"tags.`{ROOT_TAG}` = '{self.run_id}' and tags.`{KEY_TAG}` = '{key}'"
        return _once(self._store, self.experiment_id, where, record, tags)

    def _taken(self, left: Run) -> Run:
        """A child that an earlier owner left unfinished, RUNNING again and marked as ours."""
        client, run_id = self._store.client, left.info.run_id
        with self._store.errors():
            tags = {**provenance_tags(), EPOCH_TAG: str(self._lease.holder.epoch)}
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
            if left.info.status != "RUNNING":
                client.update_run(run_id, status="RUNNING")
            if "mechdiff.failure" in left.data.tags:
                client.delete_tag(run_id, "mechdiff.failure")
        return left

    def _below(self) -> list[Run]:
        """All that is below this run and not deleted, unfinished ones first, then the oldest first."""
        found = _search(self._store, self.experiment_id, f"tags.`{ROOT_TAG}` = '{self.run_id}'")
        return sorted(
            (run for run in found if KEY_TAG in run.data.tags),
            key=lambda run: (run.info.status == "FINISHED", run.info.start_time, run.info.run_id),
        )

    def _tidy(self) -> None:
        """Delete what a request that arrived late made a second time, and end what nobody will go on with."""
        ours = set(self._logged.values())
        with self._store.errors():
            for run in self._below():
                run_id = run.info.run_id
                if run_id in ours:
                    continue
                if run.data.tags[KEY_TAG] in self._logged:
                    self._store.client.delete_run(run_id)
                elif run.info.status == "RUNNING":
                    self._store.client.set_terminated(run_id, "KILLED")

    def _finish(self, run_id: str, error: BaseException | None, description: str) -> None:
        client = self._store.client
        status, reason = ending(error)
        # A server that was waited for in vain gets one more chance, not another while.
        in_vain = isinstance(error, StoreUnreachable)
        patience = self._store.patience.one_attempt() if in_vain else nullcontext()
        try:
            with patience, self._store.errors():
                if reason:
                    note = f"**{status}:** {reason}\n\n{description}"
                    tags = {"mechdiff.failure": reason, "mlflow.note.content": note}
                    client.log_batch(run_id, tags=[RunTag(k, cut(redact(v))) for k, v in tags.items()])
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


def _once(store: Store, experiment_id: str, where: str, record: RunRecord, tags: dict[str, str]) -> Run:
    """A new run, made exactly once: the one that `where` finds after an answer was lost."""

    def find() -> Run | None:
        return next(iter(_search(store, experiment_id, where)), None)

    started_ms = record.started_ms or int(time.time() * 1000)
    create = partial(store.client.create_run, experiment_id, started_ms, tags, record.name)
    with store.errors():
        return store.patience.once(create, find)


def _search(store: Store, experiment_id: str, where: str) -> list[Run]:
    runs: list[Run] = []
    token = None
    with store.errors():
        while True:
            page = store.client.search_runs(
                [experiment_id], where, ViewType.ACTIVE_ONLY, max_results=_PAGE, page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs
