"""Who writes a run: one process at a time, and a process that was taken for dead does not go on.

An owner announces itself in the run's tag `mechdiff.lease.<epoch>` and counts up in it every quarter of
`LEASE_S` seconds while it works; it also holds a lock file of its machine, which the system lets go when it
dies. On the same machine, and with a SQLite store on all that see its file, the lock decides at once;
elsewhere an owner counts as dead when its tag has not changed for `LEASE_S` seconds of the observer's own
clock. No clock of another machine is read.

To take a run over is to write the next epoch's tag, to wait, and to read it back: of several who write the
same epoch the last one stays, and it alone begins. An owner reads the tags again before it makes or changes
anything, if it last did so more than `LEASE_S` / 30 seconds ago; who takes over waits for twice that. So
when the new owner begins, only a request of the former one that is under way may still arrive. What such a
request made is deleted: by the former owner, which looks again after each creation, and by the new one at
the end of its command.

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
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from mlflow.entities import Run
from pydantic import Field

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.tracking.store.file_locks import lock_file, machine_id, process_start, run_lock_file
from mechdiff_mlflow.tracking.store.store import LeaseLost, Store

LEASE_TAG = "mechdiff.lease."
LEASE_S = 60.0
_POLL_S = 1.0
_kept: set[str] = set()
"""Tokens of the leases that this process keeps."""

_log = logging.getLogger(__name__)
_Word = Annotated[str, Field(max_length=255)]
_Count = Annotated[int, Field(ge=0, lt=1 << 53)]


@dataclass(frozen=True, slots=True)
class Holder:
    """An owner of a run, as its tag says.

    Args:
        epoch: How many owners there have been, itself included.
        token: A random word, another for each owner.
        machine: Who sees its lock file: `machine_id`.
        host: Name of the machine, for people.
        pid: Process id there.
        beat: Counted up while it works.
        start: When the process began, in that system's ticks; empty where that is not known.
    """

    epoch: Annotated[int, Field(ge=0, lt=1_000_000)]
    token: _Word
    machine: _Word
    host: _Word
    pid: _Count
    beat: _Count = 0
    start: _Word = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def tag(self) -> dict[str, str]:
        """The tag that says so."""
        return {f"{LEASE_TAG}{self.epoch}": json.dumps(asdict(self))}


def holder_in(tags: Mapping[str, str]) -> Holder | None:
    """The last owner that a run's tags name; None for a run that has none. What is no owner is left out."""
    found = []
    for key, text in tags.items():
        if key.startswith(LEASE_TAG):
            with suppress(foreign.Malformed):  # not written by us
                found.append(foreign.record(Holder, key, text))
    return max(found, key=lambda holder: holder.epoch, default=None)


class Lease:
    """This process's ownership of one run.

    Args:
        store: Where the run is.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        pid, word = os.getpid(), uuid.uuid4().hex[:16]
        self.holder = Holder(1, word, _here(store), platform.node() or "?", pid, 0, process_start(pid))
        self._run_id = ""
        self._seen_s = now_s()
        self._looking = threading.Lock()
        self._lost: LeaseLost | None = None

    def claim(self, run_id: str, last: Holder | None) -> None:
        """Write the epoch after `last`, wait, and read back; the caller holds the run's lock.

        Raises:
            MechdiffError: Another process was quicker, or came later.
        """
        self._run_id = run_id
        current = self._current()
        if current is not None and (last is None or current.token != last.token):
            raise _alive(run_id, current)
        self.holder = replace(self.holder, epoch=1 if current is None else current.epoch + 1)
        self._write()
        if self._store.sqlite_path is None:  # else the lock keeps everybody out
            time.sleep(2 * _trusted_s())
        self._seen_s = now_s()
        if (now := self._current()) is None or now.token != self.holder.token:
            raise _alive(run_id, now)

    @contextmanager
    def kept(self, run_id: str, lock: FileLock | None = None) -> Iterator[None]:
        """Count up in the run's tag while the context is open.

        Args:
            run_id: Of the run, whose tags name this lease already.
            lock: The run's lock, if it is held already.
        """
        self._run_id = run_id
        done = threading.Event()
        beating = threading.Thread(target=self._beat, args=(done,), daemon=True, name="mechdiff-lease")
        with nullcontext() if lock is not None else _locked(self._store, run_id):
            _kept.add(self.holder.token)
            beating.start()
            try:
                yield
            finally:
                done.set()
                _kept.discard(self.holder.token)
                if lock is not None:
                    _release(lock)

    def demand(self) -> None:
        """Make sure that this process still owns the run; called before everything that is made or changed.

        Raises:
            LeaseLost: Another process has taken it over.
            MechdiffError: The store does not say.
        """
        if self._is_stale():
            with self._looking:
                if self._is_stale():  # no other thread has looked meanwhile
                    with suppress(LeaseLost):
                        self._look()
        if self._lost is not None:
            raise self._lost

    def loss(self) -> LeaseLost | None:
        """What says that another process owns the run by now, if that is known."""
        try:
            self.demand()
        except LeaseLost as lost:
            return lost
        except MechdiffError:  # the store does not say
            return None
        return None

    def _is_stale(self) -> bool:
        return self._lost is None and now_s() - self._seen_s > _trusted_s()

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(LEASE_S / 4):
            try:
                self._look()
                self.holder = replace(self.holder, beat=self.holder.beat + 1)
                self._write()
            except LeaseLost:
                return
            except MechdiffError as error:
                _log.debug("The lease of run %s could not be renewed: %s", self._run_id, error)

    def _look(self) -> None:
        before = now_s()
        last = self._current()
        if last is not None and last.token != self.holder.token and last.epoch >= self.holder.epoch:
            self._lost = LeaseLost(
                f"Run {self._run_id} was taken over by {last} while this process stood still; let that one "
                "finish."
            )
            raise self._lost
        self._seen_s = before

    def _current(self) -> Holder | None:
        with self._store.errors():
            return holder_in(self._store.client.get_run(self._run_id).data.tags)

    def _write(self) -> None:
        ((key, text),) = self.holder.tag.items()
        with self._store.errors():
            self._store.client.set_tag(self._run_id, key, text)


@contextmanager
def taken_over(store: Store, run: Run) -> Iterator[Lease]:
    """Ownership of a run that another process left, while the context is open.

    Raises:
        MechdiffError: Its owner is alive, or somebody else is taking it over.
    """
    run_id: str = run.info.run_id
    with ExitStack() as stack:
        lock = _lock(store, run_id)
        last = holder_in(run.data.tags)
        _acquire(store, lock, run_id, last)
        stack.callback(_release, lock)
        lease = Lease(store)
        if last is not None and not _is_near(store, last):
            last = _watched(store, run_id, last)
        elif last is not None and _is_process(store, run, last):
            raise _alive(run_id, last)
        lease.claim(run_id, last)
        stack.pop_all()  # `kept` lets the lock go
        with lease.kept(run_id, lock):
            yield lease


def is_alive(store: Store, run: Run) -> bool | None:
    """Whether a run's owner is at work; None where that cannot be told at once."""
    last = holder_in(run.data.tags)
    if last is None or not _is_near(store, last):
        return None
    lock = _lock(store, run.info.run_id)
    if not Path(lock.lock_file).exists():
        return _is_process(store, run, last)
    try:
        with lock.acquire(timeout=0):
            return _is_process(store, run, last)
    except Timeout:
        return True


def now_s() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps where there is one."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


def _trusted_s() -> float:
    """For how long an owner need not look again."""
    return LEASE_S / 30


def _here(store: Store) -> str:
    with store.errors():
        return machine_id(lock_file(store.uri, "run"))  # beside which, or below, all locks of its runs are


def _is_near(store: Store, holder: Holder) -> bool:
    """Whether the lock file tells if an owner is dead."""
    return store.sqlite_path is not None or holder.machine == _here(store)


def _is_process(store: Store, run: Run, holder: Holder) -> bool:
    """Whether an owner is at work though nobody holds its lock: temporary files may be cleaned away."""
    is_over = run.info.status not in ("RUNNING", "SCHEDULED")
    if is_over or not holder.start or holder.machine != _here(store):
        return False
    if holder.pid == os.getpid():
        return holder.token in _kept
    return process_start(holder.pid) == holder.start


def _watched(store: Store, run_id: str, last: Holder) -> Holder:
    """The last owner, once it has shown no sign of life for `LEASE_S` seconds."""
    _log.warning("Run %s was written by %s; watching for %g s whether it still is.", run_id, last, LEASE_S)
    since = now_s()
    while now_s() - since < LEASE_S:
        time.sleep(_POLL_S)
        with store.errors():
            current = holder_in(store.client.get_run(run_id).data.tags)
        if current != last:
            raise _alive(run_id, current)
    return last


def _alive(run_id: str, holder: Holder | None) -> MechdiffError:
    who = "another process" if holder is None else str(holder)
    return MechdiffError(
        f"Run {run_id} is being written by {who}; wait for it, or stop it, then resume the run."
    )


def _lock(store: Store, run_id: str) -> FileLock:
    file = run_lock_file(store.uri, run_id)
    with store.errors():
        file.parent.mkdir(exist_ok=True)
    return FileLock(file, thread_local=False)


def _acquire(store: Store, lock: FileLock, run_id: str, holder: Holder | None) -> None:
    with store.errors():
        try:
            lock.acquire(timeout=0)
        except Timeout as error:  # which is an OSError, too
            raise _alive(run_id, holder) from error


@contextmanager
def _locked(store: Store, run_id: str) -> Iterator[None]:
    """Hold the lock of a run that nobody else knows yet."""
    lock = _lock(store, run_id)
    _acquire(store, lock, run_id, None)
    try:
        yield
    finally:
        _release(lock)


def _release(lock: FileLock) -> None:
    """Let go, and leave no file behind; filelock takes a lock that was unlinked meanwhile for none."""
    file = Path(lock.lock_file)
    with suppress(OSError):
        file.unlink(missing_ok=True)
    lock.release()
    if file.parent.name.endswith(".running"):
        with suppress(OSError):
            file.parent.rmdir()
