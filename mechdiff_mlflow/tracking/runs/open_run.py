"""A run in progress, and the runs below it."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

from mlflow.entities import Run, RunTag

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content.cells import CELLS, cell_row, cells_text
from mechdiff_mlflow.tracking.content.keys import KEY_TAG, ROOT_TAG, check_same, key_of
from mechdiff_mlflow.tracking.content.records import RunRecord, param_text
from mechdiff_mlflow.tracking.content.tag_names import SHA256_TAG
from mechdiff_mlflow.tracking.flavour import LoggedMap
from mechdiff_mlflow.tracking.runs.endings import cut, ending, params_of, plain
from mechdiff_mlflow.tracking.runs.interrupts import Interrupts
from mechdiff_mlflow.tracking.runs.lookup import all_runs, made_once
from mechdiff_mlflow.tracking.runs.provenance import code_version, provenance_tags
from mechdiff_mlflow.tracking.runs.run_lock import Lease
from mechdiff_mlflow.tracking.runs.writing import RecordWriter
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.store import LeaseLost, Store, StoreFull, StoreUnreachable

EPOCH_TAG = "mechdiff.epoch"
"""Tag of a run below a parent: which owner of the parent wrote it last."""

_WRITERS = 8
"""Threads that log at once to a server; a SQLite file takes one writer at a time."""
_EPOCH_DIGITS = 10
_IDS = 50
"""Ids in one filter."""
_SWITCH_S = 2e-5

_log = logging.getLogger(__name__)


class OpenRun:
    """A run in progress; made by `Tracker.run`.

    Args:
        store: Where it is.
        run: As it is.
        lease: Of this process on it.
        interrupts: Held back while something is written.
        resumed: Whether an earlier process may have written a part of it.
        as_asked: See `Tracker`.
    """

    def __init__(
        self,
        store: Store,
        run: Run,
        lease: Lease,
        interrupts: Interrupts,
        *,
        resumed: bool = False,
        as_asked: Callable[[str, str], str] = plain,
    ) -> None:
        self._as_asked = as_asked
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.is_resumed = resumed
        self._store, self._run, self._lease, self._interrupts = store, run, lease, interrupts
        self.demand = lease.demand
        """Makes sure that this process still owns the run; see `Lease.demand`."""
        self._writer = RecordWriter(store, lease.demand)
        self._params: dict[str, str] = params_of(run)
        self._description = ""
        self._logged: dict[str, str] = {}
        """Ids of the runs below this one that this process has written, by key; empty while it has not."""
        self._cells: dict[str, dict[str, Any]] = {}
        self._runs: dict[str, Run] = {}
        self._prepared: dict[str, Future[None]] = {}
        self._soon: list[tuple[Callable[[], RunRecord], Future[str]]] = []
        self._pool: ThreadPoolExecutor | None = None
        self._left = {child.data.tags[KEY_TAG]: child for child in self._below()} if resumed else {}

    def add(self, record: RunRecord) -> None:
        """Put what `record` holds into this run; its kind and name stay as they are.

        Params that the run has must agree, and are not logged again.

        Raises:
            MechdiffError: A param differs from the logged one, or the store refuses.
        """
        fresh = {k: v for k, v in record.params.items() if not self._has_param(k, param_text(k, v))}
        with self._interrupts.deferred():
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
        self._lease.demand()
        with self._store.errors():
            self._store.client.set_tag(self.run_id, key, text)

    def prepare(self, records: Iterable[RunRecord]) -> None:
        """Begin runs below this one in the background, with what is known of them: their maps.

        `log_soon` with the whole records, which have the same keys, finishes them. What goes wrong meanwhile
        is tried again then.
        """
        for record in records:
            key = key_of(record, code_version())
            self._prepared[key] = self._writers().submit(self._prepare, key, record)

    def log(self, record: RunRecord, *, under: str | None = None) -> str:
        """Write one finished run below this one, or below `under`, one of its children; the new run's id.

        Raises:
            MechdiffError: The record or the store refuses; the child is then FAILED with the reason. Or
                another process owns this run by now.
        """
        with self._interrupts.deferred():
            return self._log(self._begun(record), record, under or self.run_id)

    def log_soon(self, make: Callable[[], RunRecord]) -> None:
        """Write one finished run below this one in the background; `wait` says how that went.

        Args:
            make: Gives the record, there too, and the same whenever it is called.
        """
        self._soon.append((make, self._writers().submit(self._log_made, make)))

    def wait(self, progress: Callable[[int], None] | None = None) -> list[str]:
        """The ids of all that `log_soon` was given since the last call, in order, once they are written.

        What failed in the background is tried once more: a server may have been away for long while nothing
        but computing was to do.

        Args:
            progress: Called after each with 1.

        Raises:
            MechdiffError: As `log`; those that were begun are brought to their end first.
        """
        soon, self._soon = self._soon, []
        ids = []
        try:
            for make, future in soon:
                try:
                    ids.append(future.result())
                except LeaseLost:
                    raise
                except MechdiffError:
                    record = make()
                    with self._interrupts.deferred():
                        key = key_of(record, code_version())
                        ids.append(self._log(key, record, self.run_id, look=True))
                if progress is not None:
                    progress(1)
        except BaseException:
            for _, future in soon:
                future.cancel()
            wait([future for _, future in soon])
            raise
        return ids

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
        for record in records:
            self.log_soon(lambda record=record: record)  # type: ignore[misc]
        return self.wait(progress)

    def written(self, run_id: str) -> Run | None:
        """A run below this one that this process wrote whole, as it is; None for any other."""
        ours = (run for key, run in self._runs.items() if self._logged.get(key) == run_id)
        run = next((run for run in ours if run.info.status != "FINISHED"), None)
        return None if run is None else self._writer.whole(run)

    def model_of(self, run_id: str) -> LoggedMap | None:
        """The logged model of a run below this one, if this process has written it or asked for it."""
        return self._writer.model_of(run_id)

    def summarise(self) -> None:
        """Put what the patch runs below this one hold into one file of it, for readers; see `cells`."""
        if len(self._cells) > 1:
            text = cells_text([self._cells[key] for key in sorted(self._cells)])
            self.add(RunRecord(kind="cells", name="cells", texts={CELLS: text}))

    def end(self, error: BaseException | None) -> None:
        """Set the final status, by what ended the run; `Tracker.run` calls this.

        Raises:
            LeaseLost: The run is another process's by now, and its status that one's to set.
        """
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            sys.setswitchinterval(self._switch_s)
        if lost := self._lost(error):
            if lost is error:
                return
            raise lost from error
        for run in [run for key, run in self._runs.items() if not self._logged.get(key)]:
            if run.info.status == "FINISHED":  # by an earlier process
                continue
            self._finish(run.info.run_id, error or MechdiffError("It was begun and not finished."), "")
        if error is None and (self.is_resumed or self._store.patience.was_tested):
            self._tidy()
        self._finish(self.run_id, error, self._description)

    def _writers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            n_writers = 1 if self._store.sqlite_path is not None else _WRITERS
            self._pool = ThreadPoolExecutor(n_writers, thread_name_prefix="mechdiff-log")
            # Or whoever computes waits 5 ms for the interpreter after every operation on arrays.
            self._switch_s = sys.getswitchinterval()
            sys.setswitchinterval(min(self._switch_s, _SWITCH_S))
        return self._pool

    def _prepare(self, key: str, record: RunRecord) -> None:
        run = self._run_of(key, record, self.run_id)
        if run.info.status != "FINISHED":
            self._writer.begin(run, record, again=key in self._left)

    def _log_made(self, make: Callable[[], RunRecord]) -> str:
        record = make()
        return self._log(self._begun(record), record, self.run_id)

    def _begun(self, record: RunRecord) -> str:
        """The key of a record that is about to be logged."""
        key = key_of(record, code_version())
        assert key not in self._logged, f"{record.name} is logged twice below {self.run_id}"
        self._logged[key] = ""
        return key

    def _log(self, key: str, record: RunRecord, parent: str, *, look: bool = False) -> str:
        """Write a child whole.

        Args:
            key: Of the record.
            record: What it is to hold.
            parent: Whose child it is.
            look: Whether an earlier attempt of this process failed.
        """
        self._lease.demand()
        prepared = self._prepared.get(key)
        look = look or (prepared is not None and prepared.exception() is not None)
        run = self._run_of(key, record, parent, look=look)
        run_id: str = run.info.run_id
        self._logged[key] = run_id
        if run.info.status == "FINISHED":
            check_same(run_id, record, run.data.metrics)
            self._note_cell(key, run, record)
            return run_id
        try:
            if prepared is not None:  # as it was, or would have been: a map's card has no numbers then
                self._writer.begin(run, _planned(record), again=look or key in self._left)
            self._writer.write(run, record, again=look or key in self._left)
            self._lease.demand()
            with self._store.errors():
                self._store.client.set_terminated(run_id, "FINISHED", record.ended_ms)
        except BaseException as error:
            if self._lost(error) is None:
                self._finish(run_id, error, record.description)
            raise
        self._note_cell(key, run, record)
        return run_id

    def _note_cell(self, key: str, run: Run, record: RunRecord) -> None:
        if record.kind == "patch":
            self._cells[key] = cell_row(self._writer.whole(run))

    def _lost(self, error: BaseException | None) -> LeaseLost | None:
        """What says that another process owns this run by now, if that is known."""
        if isinstance(error, LeaseLost):
            return error
        with self._brief(error):
            return self._lease.loss()

    def _brief(self, error: BaseException | None) -> AbstractContextManager[None]:
        """After a server was waited for in vain it gets one more chance, not another while."""
        in_vain = isinstance(error, StoreUnreachable)
        return self._store.patience.one_attempt() if in_vain else nullcontext()

    def _run_of(self, key: str, record: RunRecord, parent: str, *, look: bool = False) -> Run:
        """The run of a record: prepared, left by an earlier process, or made now.

        Args:
            key: Of the record.
            record: What it will hold.
            parent: Whose child it is.
            look: Whether an earlier attempt failed, and may have made it, and ended it.
        """
        if look:
            self._runs.pop(key, None)
        if key not in self._runs:
            run = self._left.get(key) or self._child(key, record, parent, look=look)
            is_ours = run.info.status == "FINISHED" or (key not in self._left and not look)
            self._runs[key] = run if is_ours else self._taken(run)
        return self._runs[key]

    def _child(self, key: str, record: RunRecord, parent: str, *, look: bool) -> Run:
        tags = {
            **provenance_tags(),
            "mlflow.parentRunId": parent,
            "mechdiff.kind": record.kind,
            KEY_TAG: key,
            ROOT_TAG: self.run_id,
            EPOCH_TAG: str(self._lease.holder.epoch),
        }
        where = f"tags.`{ROOT_TAG}` = '{self.run_id}' and tags.`{KEY_TAG}` = '{key}'"
        run = made_once(
            self._store, self.experiment_id, where, record, tags, look=look, demand=self._lease.demand
        )
        try:
            self._lease.demand()
        except LeaseLost:
            self._withdraw(run, where)
            raise
        return run

    def _withdraw(self, late: Run, where: str) -> None:
        """Delete a run that was made after another process had taken over, if that one has its own instead.

        If it has none it goes on with this one, or deletes it at its end.
        """
        with suppress(MechdiffError):
            epochs = {
                run.info.run_id: _epoch(run) for run in all_runs(self._store, [self.experiment_id], where)
            }
            ours = self._lease.holder.epoch
            if epochs.get(late.info.run_id) == ours and max(epochs.values()) > ours:
                with self._store.errors():
                    self._store.client.delete_run(late.info.run_id)

    def _taken(self, left: Run) -> Run:
        """A child that an earlier owner left unfinished, RUNNING again and marked as ours."""
        client, run_id = self._store.client, left.info.run_id
        self._lease.demand()
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
        found = all_runs(self._store, [self.experiment_id], f"tags.`{ROOT_TAG}` = '{self.run_id}'")
        return sorted(
            (run for run in found if KEY_TAG in run.data.tags),
            key=lambda run: (run.info.status == "FINISHED", run.info.start_time, run.info.run_id),
        )

    def _tidy(self) -> None:
        """Delete what a request that arrived late made a second time, and end what nobody will go on with."""
        client, ours = self._store.client, set(self._logged.values())
        with self._store.errors():
            below = [run for run in self._below() if run.info.run_id not in ours]
            for run in [*self._twins(), *(run for run in below if run.data.tags[KEY_TAG] in self._logged)]:
                self._lease.demand()
                client.delete_run(run.info.run_id)
            for run in below:
                if run.data.tags[KEY_TAG] not in self._logged and run.info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, "KILLED")
            taken = [run.info.run_id for run in self._left.values() if run.info.status != "FINISHED"]
            for start in range(0, len(taken), _IDS):
                self._tidy_models(taken[start : start + _IDS])

    def _tidy_models(self, run_ids: list[str]) -> None:
        """Delete models that stayed PENDING where the run's map is READY in another."""
        client, ids = self._store.client, ", ".join(f"'{run_id}'" for run_id in run_ids)
        found = client.search_logged_models(
            [self.experiment_id], f"source_run_id IN ({ids})", max_results=100
        )
        ready = {(m.source_run_id, m.tags.get(SHA256_TAG)) for m in found if m.status == "READY"}
        for model in found:
            if model.status == "PENDING" and (model.source_run_id, model.tags.get(SHA256_TAG)) in ready:
                client.delete_logged_model(model.model_id)

    def _twins(self) -> list[Run]:
        """Runs that a late request made in place of this one; nobody has written below them."""
        key = self._run.data.tags.get(KEY_TAG)
        if key is None:  # `mlflow run` made it
            return []
        found = all_runs(self._store, [self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'")
        others = [run for run in found if run.info.run_id != self.run_id and ROOT_TAG not in run.data.tags]
        below = "tags.`{}` = '{}'"
        return [
            run
            for run in others
            if not all_runs(self._store, [self.experiment_id], below.format(ROOT_TAG, run.info.run_id))
        ]

    def _finish(self, run_id: str, error: BaseException | None, description: str) -> None:
        client = self._store.client
        status, reason = ending(error)
        try:
            with self._brief(error), self._store.errors():
                if reason:
                    note = f"**{status}:** {reason}\n\n{description}"
                    tags = {"mechdiff.failure": reason, "mlflow.note.content": note}
                    client.log_batch(run_id, tags=[RunTag(k, cut(redact(v))) for k, v in tags.items()])
                client.set_terminated(run_id, status)
        except MechdiffError as another:
            if error is None:
                raise
            if isinstance(
                another, StoreFull
            ):  # a status needs less room; without even that, `resume` ends it
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


def _epoch(run: Run) -> int:
    text = run.data.tags.get(EPOCH_TAG, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < _EPOCH_DIGITS else 0


def _planned(record: RunRecord) -> RunRecord:
    """What a record was before it was measured."""
    return replace(record, metrics={}, stepped_metrics={}, undefined={})
