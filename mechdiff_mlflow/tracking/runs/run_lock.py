"""The lock of a run: one process writes it at a time, and one that was taken for dead does not go on.

How, and what that leaves open, is in docs/faults.md, points 5 and 6.

References: Gray & Cheriton (1989), Leases; Kleppmann (2016), How to do distributed locking (fencing tokens).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Annotated

from filelock import FileLock, Timeout
from mlflow.entities import Run
from pydantic import Field

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.tracking.store.file_locks import lock_file, machine_id, process_start, run_lock_file
from mechdiff_mlflow.tracking.store.store import RunTakenOver, Store

OWNER_TAG = "mechdiff.lease."
OWNER_TIMEOUT_S = 60.0
_POLL_S = 1.0
_kept: set[str] = set()
"""Tokens of the locks that this process holds."""

_log = logging.getLogger(__name__)
_Word = Annotated[str, Field(max_length=255)]
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]


@dataclass(frozen=True, slots=True)
class Owner:
    """An owner of a run, as its tag says."""

    epoch: Annotated[int, Field(ge=0, lt=1_000_000)]  # how many there have been
    token: _Word  # random, another for each owner
    machine: _Word  # who sees its lock file: `machine_id`
    host: _Word  # for people
    pid: _Count
    beat: _Count = 0  # counted up while it works
    start: _Word = ""  # of the process, in its system's ticks, where that is known

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def tag(self) -> dict[str, str]:
        """The tag that says so."""
        return {f"{OWNER_TAG}{self.epoch}": json.dumps(asdict(self))}


def owner_in(tags: Mapping[str, str]) -> Owner | None:
    """The last owner that a run's tags name; None for a run that has none. What is no owner is left out."""
    found = []
    for key, text in tags.items():
        if key.startswith(OWNER_TAG):
            with suppress(foreign.Malformed):  # not written by us
                found.append(foreign.record(Owner, key, text))
    return max(found, key=lambda owner: owner.epoch, default=None)


class RunLock:
    """This process's ownership of one run."""

    def __init__(self, store: Store) -> None:
        self._store = store
        pid, token = os.getpid(), uuid.uuid4().hex[:16]
        self.owner = Owner(1, token, _here(store), platform.node() or "?", pid, 0, process_start(pid))
        self._run_id = ""
        self._seen_s = now_s()
        self._lost: RunTakenOver | None = None

    def claim(self, run_id: str, last: Owner | None) -> None:
        """Write the epoch after `last`, wait, and read back; the caller holds the run's lock file.

        Raises:
            MechdiffError: Another process was quicker, or came later.
        """
        self._run_id = run_id
        current = self._current()
        if current is not None and (last is None or current.token != last.token):
            raise _busy(run_id, current)
        self.owner = replace(self.owner, epoch=1 if current is None else current.epoch + 1)
        self._write()
        if self._store.sqlite_path is None:  # else the lock file keeps everybody out
            time.sleep(2 * _trusted_s())
        self._seen_s = now_s()
        current = self._current()
        if current is None or current.token != self.owner.token:
            raise _busy(run_id, current)

    @contextmanager
    def kept(self, run_id: str) -> Iterator[None]:
        """Hold the run, whose tags name this owner already, and count up in its tag meanwhile."""
        with _lock_file_held(self._store, run_id, None), self.beating(run_id):
            yield

    @contextmanager
    def beating(self, run_id: str) -> Iterator[None]:
        """Count up in the run's tag; the caller holds the run's lock file."""
        self._run_id = run_id
        done = threading.Event()
        _kept.add(self.owner.token)
        threading.Thread(target=self._beat, args=(done,), daemon=True, name="mechdiff-run-lock").start()
        try:
            yield
        finally:
            done.set()
            _kept.discard(self.owner.token)

    def require(self) -> None:
        """Make sure that this process still owns the run; called before everything that is made or changed.

        Raises:
            RunTakenOver: Another process has taken it over.
            MechdiffError: The store does not say.
        """
        if self._lost is None and now_s() - self._seen_s > _trusted_s():
            self._look()
        if self._lost is not None:
            raise self._lost

    def loss(self) -> RunTakenOver | None:
        """The error that says that another process owns the run by now, if that is known."""
        with suppress(MechdiffError):  # or the store does not say
            self.require()
        return self._lost

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(OWNER_TIMEOUT_S / 4):
            try:
                self._look()
                if self._lost is not None:
                    return
                self.owner = replace(self.owner, beat=self.owner.beat + 1)
                self._write()
            except MechdiffError as error:
                _log.debug("The owner's tag of run %s could not be renewed: %s", self._run_id, error)

    def _look(self) -> None:
        before = now_s()
        last = self._current()
        if last is not None and last.token != self.owner.token and last.epoch >= self.owner.epoch:
            self._lost = RunTakenOver(
                f"Run {self._run_id} was taken over by {last} while this process stood still; let that one "
                "finish."
            )
        self._seen_s = before

    def _current(self) -> Owner | None:
        with self._store.errors():
            return owner_in(self._store.client.get_run(self._run_id).data.tags)

    def _write(self) -> None:
        ((key, text),) = self.owner.tag.items()
        with self._store.errors():
            self._store.client.set_tag(self._run_id, key, text)


@contextmanager
def taken_over(store: Store, run: Run) -> Iterator[RunLock]:
    """Ownership of a run that another process left, while the context is open.

    Raises:
        MechdiffError: Its owner is alive, or somebody else is taking it over.
    """
    run_id: str = run.info.run_id
    last = owner_in(run.data.tags)
    with _lock_file_held(store, run_id, last):
        if last is not None and not _is_near(store, last):
            words = "Run %s was written by %s; watching for %g s whether it still is."
            _log.warning(words, run_id, last, OWNER_TIMEOUT_S)
            if watched(store, {run_id: run})[run_id]:
                raise _busy(run_id, last)
        elif last is not None and _is_process(store, run, last):
            raise _busy(run_id, last)
        lock = RunLock(store)
        lock.claim(run_id, last)
        with lock.beating(run_id):
            yield lock


def is_alive(store: Store, run: Run) -> bool | None:
    """Whether a run's owner is at work; None where that cannot be told at once."""
    last = owner_in(run.data.tags)
    if last is None or not _is_near(store, last):
        return None
    file = run_lock_file(store.uri, run.info.run_id)
    try:
        if file.exists():
            FileLock(file).acquire(timeout=0).lock.release()
    except Timeout:
        return True
    return _is_process(store, run, last)


def watched(store: Store, runs: Mapping[str, Run]) -> dict[str, bool]:
    """Whether the owner of each run counts up within `OWNER_TIMEOUT_S` seconds."""
    before = {run_id: owner_in(run.data.tags) for run_id, run in runs.items()}
    alive = dict.fromkeys(runs, False)
    until = now_s() + OWNER_TIMEOUT_S
    while now_s() < until and not all(alive.values()):
        time.sleep(_POLL_S)
        for run_id in [run_id for run_id, is_seen in alive.items() if not is_seen]:
            with store.errors():
                tags = store.client.get_run(run_id).data.tags
            alive[run_id] = owner_in(tags) != before[run_id]
    return alive


def now_s() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps where there is one."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


def _trusted_s() -> float:
    """Seconds for which an owner need not look again."""
    return OWNER_TIMEOUT_S / 30


def _here(store: Store) -> str:
    with store.errors():
        return machine_id(lock_file(store.uri, "run"))  # beside which, or below, all locks of its runs are


def _is_near(store: Store, owner: Owner) -> bool:
    """Whether the lock file tells if an owner is dead."""
    return store.sqlite_path is not None or owner.machine == _here(store)


def _is_process(store: Store, run: Run, owner: Owner) -> bool:
    """Whether an owner is at work though nobody holds its lock: temporary files may be cleaned away."""
    is_over = run.info.status not in ("RUNNING", "SCHEDULED")
    if is_over or not owner.start or owner.machine != _here(store):
        return False
    if owner.pid == os.getpid():
        return owner.token in _kept
    return process_start(owner.pid) == owner.start


def _busy(run_id: str, owner: Owner | None) -> MechdiffError:
    who = "another process" if owner is None else str(owner)
    return MechdiffError(
        f"Run {run_id} is being written by {who}; wait for it, or stop it, then resume the run."
    )


@contextmanager
def _lock_file_held(store: Store, run_id: str, owner: Owner | None) -> Iterator[None]:
    """Hold a run's lock file, and leave none behind; filelock takes one that was unlinked meanwhile for none.

    Raises:
        MechdiffError: Another process, by its tag `owner`, holds it.
    """
    file = run_lock_file(store.uri, run_id)
    lock = FileLock(file, thread_local=False)
    with store.errors():
        file.parent.mkdir(exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:  # which is an OSError, too
            raise _busy(run_id, owner) from error
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()
        if file.parent.name.endswith(".running"):
            with suppress(OSError):
                file.parent.rmdir()
