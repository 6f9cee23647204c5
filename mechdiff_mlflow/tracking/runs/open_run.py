"""A run in progress, and the runs below it."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

from mlflow.entities import Run

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content import overview
from mechdiff_mlflow.tracking.content.cells import CELLS, cell_row, cells_text
from mechdiff_mlflow.tracking.content.records import RunRecord, check_same, key_of, param_text
from mechdiff_mlflow.tracking.content.tag_names import KEY_TAG, ROOT_TAG
from mechdiff_mlflow.tracking.flavour import LoggedMap
from mechdiff_mlflow.tracking.runs.interrupts import Interrupts, ending
from mechdiff_mlflow.tracking.runs.lookup import all_runs, made_once, reopen
from mechdiff_mlflow.tracking.runs.mlflow_run import failure_tags, params_of, plain
from mechdiff_mlflow.tracking.runs.provenance import code_version, provenance_tags
from mechdiff_mlflow.tracking.runs.run_lock import RunLock, owner_in
from mechdiff_mlflow.tracking.runs.writing import RecordWriter
from mechdiff_mlflow.tracking.store.store import RunTakenOver, Store, StoreFull, StoreUnreachable

EPOCH_TAG = "mechdiff.epoch"
"""Tag of a run below a parent: which owner of the parent wrote it last."""

_WRITERS = 8
"""Threads that log at once to a server; a SQLite file takes one writer at a time."""
_SWITCH_S = 2e-5

_log = logging.getLogger(__name__)


class OpenRun:
    """A run in progress, of which this process holds the lock; made by `Tracker.run`, which see."""

    def __init__(
        self,
        store: Store,
        run: Run,
        lock: RunLock,
        interrupts: Interrupts,
        *,
        resumed: bool = False,
        as_asked: Callable[[str, str], str] = plain,
    ) -> None:
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.is_resumed = resumed
        self._store, self._run, self._lock, self._interrupts = store, run, lock, interrupts
        self._as_asked = as_asked
        self.require_owner = lock.require
        """Makes sure that this process still owns the run; see `RunLock.require`."""
        self._writer = RecordWriter(store, lock.require)
        self._params: dict[str, str] = params_of(run)
        self._description = self._headline = ""
        self._curves: list[str] = []
        self._logged: dict[str, str] = {}
        """Ids of the runs below this one that this process logs, by key; empty until they are made."""
        self._whole: dict[str, Run] = {}
        """Runs below this one that this process has written whole, by id."""
        self._patches: dict[str, Run] = {}
        """Finished patch runs below this one, by key."""
        self._soon: list[tuple[RunRecord, Future[str]]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._left = {child.data.tags[KEY_TAG]: child for child in self._below()} if resumed else {}

    def add(self, record: RunRecord) -> None:
        """Put what `record` holds into this run; its kind and name stay as they are.

        Params that the run has must agree, and are not logged again.

        Raises:
            MechdiffError: A param differs from the logged one, or the store refuses.
        """
        texts = {key: param_text(key, value) for key, value in record.params.items()}
        fresh = {key: value for key, value in record.params.items() if not self._has_param(key, texts[key])}
        with self._interrupts.deferred():
            self._lock.require()
            self._writer.write(self._run, replace(record, params=fresh), again=self.is_resumed)
        self._params |= {key: texts[key] for key in fresh}
        self._description = record.description or self._description
        self._headline = record.headline or self._headline
        self._curves += [curve for curve in record.stepped_metrics if record.kind in ("sweep", "atlas")]

    def pin(self, key: str, text: str, what: str) -> None:
        """Set a tag that must be the same whenever the run is resumed; `what` it stands for, in a message.

        Raises:
            MechdiffError: The run has it with another text.
        """
        there = self._run.data.tags.get(key, text)
        if there != text:
            raise MechdiffError(
                f"Run {self.run_id} was begun with {key} {there} and now it is {text}: {what} has changed "
                "since, so begin anew instead of resuming."
            )
        self._lock.require()
        with self._store.errors():
            self._store.client.set_tag(self.run_id, key, text)

    def log(self, record: RunRecord, *, under: str | None = None) -> str:
        """Write one finished run below this one, or below `under`, one of its children; the new run's id.

        Raises:
            MechdiffError: The record or the store refuses; the child is then FAILED with the reason. Or
                another process owns this run by now.
        """
        with self._interrupts.deferred():
            return self._log(record, under)

    def log_soon(self, record: RunRecord) -> None:
        """Write one finished run below this one in the background; `wait` says how that went."""
        self._soon.append((record, self._writers().submit(self._log, record)))

    def wait(self, progress: Callable[[int], None] = lambda n: None) -> list[str]:
        """The ids of all that `log_soon` was given since the last call, in order, once they are written.

        What failed in the background is tried once more: a server may have been away for long while nothing
        but computing was to do. `progress` is called after each run with 1.

        Raises:
            MechdiffError: As `log`; those that were begun are brought to their end first.
        """
        soon, self._soon = self._soon, []
        ids = []
        try:
            for record, future in soon:
                try:
                    ids.append(future.result())
                except RunTakenOver:
                    raise
                except MechdiffError:
                    with self._interrupts.deferred():
                        ids.append(self._log(record, again=True))
                progress(1)
        except BaseException:
            for _, future in soon:
                future.cancel()
            wait([future for _, future in soon])
            raise
        return ids

    def written(self, run_id: str) -> Run | None:
        """A run below this one that this process wrote whole, as it is; None for any other."""
        return self._whole.get(run_id)

    def model_of(self, run_id: str) -> LoggedMap | None:
        """The logged model of a run below this one, if this process has written it or asked for it."""
        return self._writer.models.get(run_id)

    def summarise(self) -> None:
        """Put what the patch runs below this one hold into one file of it, for readers; see `cells`."""
        if len(self._patches) > 1:
            text = cells_text([cell_row(self._patches[key]) for key in sorted(self._patches)])
            self.add(RunRecord(kind="cells", name="cells", texts={CELLS: text}))

    def renew_overview(self, kind: str, about: str) -> None:
        """Put what this run found into its experiment's description and views."""
        self._lock.require()
        overview.renew(
            self._store,
            self.experiment_id,
            self.run_id,
            about=about,
            headline=self._headline,
            kind=kind,
            curves=self._curves,
        )

    def end(self, error: BaseException | None) -> None:
        """Set the final status, by what ended the run; `Tracker.run` calls this.

        Raises:
            RunTakenOver: The run is another process's by now, and its status that one's to set.
        """
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            sys.setswitchinterval(self._switch_s)
        if lost := self._lost(error):
            if lost is error:
                return
            raise lost from error
        if error is None and (self.is_resumed or self._store.retries.has_retried):
            self._delete_doubles()
        self._finish(self.run_id, error, self._description)

    def _writers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            n_writers = 1 if self._store.sqlite_path is not None else _WRITERS
            self._pool = ThreadPoolExecutor(n_writers, thread_name_prefix="mechdiff-log")
            # Or whoever computes waits 5 ms for the interpreter after every operation on arrays.
            self._switch_s = sys.getswitchinterval()
            sys.setswitchinterval(min(self._switch_s, _SWITCH_S))
        return self._pool

    def _log(self, record: RunRecord, under: str | None = None, *, again: bool = False) -> str:
        """Write a child whole; `again` where an attempt of this process failed."""
        key = key_of(record, code_version())
        assert again or key not in self._logged, f"{record.name} is logged twice below {self.run_id}"
        self._logged[key] = ""
        self._lock.require()
        run = None if again else self._left.get(key)
        is_new = run is None and not again
        if run is None:  # which the attempt that failed may have made, and ended
            run = self._child(key, record, under or self.run_id, look=again)
        run_id: str = run.info.run_id
        self._logged[key] = run_id
        if run.info.status == "FINISHED":
            check_same(run_id, record, run.data.metrics)
        else:
            try:
                if not is_new:
                    self._lock.require()
                    reopen(self._store, run, {EPOCH_TAG: str(self._lock.owner.epoch)})
                run = self._writer.write(run, record, again=not is_new)
                self._lock.require()
                with self._store.errors():
                    self._store.client.set_terminated(run_id, "FINISHED", record.ended_ms)
            except BaseException as error:  # FAILED with the reason, unless another process has it
                if self._lost(error) is None:
                    self._finish(run_id, error, record.description)
                raise
            self._whole[run_id] = run
        if record.kind == "patch":
            self._patches[key] = run
        return run_id

    def _child(self, key: str, record: RunRecord, parent: str, *, look: bool) -> Run:
        """A new run below this one, or with `look` the one that is there."""
        tags = {
            **provenance_tags(),
            "mlflow.parentRunId": parent,
            "mechdiff.kind": record.kind,
            KEY_TAG: key,
            ROOT_TAG: self.run_id,
            EPOCH_TAG: str(self._lock.owner.epoch),
        }
        where = f"tags.`{ROOT_TAG}` = '{self.run_id}' and tags.`{KEY_TAG}` = '{key}'"
        require = self._lock.require
        run = made_once(self._store, self.experiment_id, where, record, tags, look=look, require=require)
        try:
            require()
        except RunTakenOver:
            self._withdraw(run, where)
            raise
        return run

    def _withdraw(self, late: Run, where: str) -> None:
        """Delete a run that was made after another process had taken over, if that one has its own instead.

        If it has none it goes on with this one, or deletes it at its end.
        """
        ours = str(self._lock.owner.epoch)
        with suppress(MechdiffError):
            found = all_runs(self._store, [self.experiment_id], where)
            epochs = {run.info.run_id: run.data.tags.get(EPOCH_TAG) for run in found}
            if epochs.get(late.info.run_id) == ours and {*epochs.values()} != {ours}:
                with self._store.errors():
                    self._store.client.delete_run(late.info.run_id)

    def _below(self) -> list[Run]:
        """All that is below this run and not deleted, unfinished ones first, then the oldest first."""
        found = all_runs(self._store, [self.experiment_id], f"tags.`{ROOT_TAG}` = '{self.run_id}'")
        return sorted(
            (run for run in found if KEY_TAG in run.data.tags),
            key=lambda run: (run.info.status == "FINISHED", run.info.start_time, run.info.run_id),
        )

    def _delete_doubles(self) -> None:
        """Delete what a request that arrived late made a second time, and end what nobody will go on with."""
        client, key = self._store.client, self._run.data.tags.get(KEY_TAG)
        tops = all_runs(self._store, [self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'") if key else []
        with self._store.errors():
            for run in tops:
                owner = owner_in(run.data.tags)
                is_resumed = owner is not None and owner.epoch > 1
                if run.info.run_id != self.run_id and ROOT_TAG not in run.data.tags and not is_resumed:
                    self._lock.require()
                    client.delete_run(run.info.run_id)
            for run in self._below():
                ours = self._logged.get(run.data.tags[KEY_TAG])
                if ours is not None and ours != run.info.run_id:
                    self._lock.require()
                    client.delete_run(run.info.run_id)
                elif ours is None and run.info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, "KILLED")

    def _lost(self, error: BaseException | None) -> RunTakenOver | None:
        """The error that says that another process owns this run by now, if that is known."""
        if isinstance(error, RunTakenOver):
            return error
        with self._one_more_chance(error):
            return self._lock.loss()

    def _one_more_chance(self, error: BaseException | None) -> AbstractContextManager[None]:
        """After a server was waited for in vain it gets one more chance in here, not another while."""
        in_vain = isinstance(error, StoreUnreachable)
        return self._store.retries.one_attempt() if in_vain else nullcontext()

    def _finish(self, run_id: str, error: BaseException | None, description: str) -> None:
        client = self._store.client
        status, reason = ending(error)
        try:
            with self._one_more_chance(error), self._store.errors():
                if reason:
                    client.log_batch(run_id, tags=failure_tags(status, reason, description))
                client.set_terminated(run_id, status)
        except MechdiffError as another:
            if error is None:
                raise
            if isinstance(another, StoreFull):
                # A status needs less room; without even that, `resume` ends it.
                with suppress(MechdiffError), self._store.errors():
                    client.set_terminated(run_id, status)
                return
            # What went wrong before is on its way to the user and matters more.
            _log.warning("Run %s could not be marked %s: %s", run_id, status, another)

    def _has_param(self, key: str, text: str) -> bool:
        logged = self._params.get(key)
        if logged is None:
            return False
        if logged != text and plain(key, self._as_asked(key, logged)) != plain(key, text):
            raise MechdiffError(
                f"Param {key!r} is {text[:200]} but run {self.run_id} was started with {logged[:200]}; "
                f"start it with -P {shlex.quote(f'{key}={text[:200]}')}."
            )
        return True
