"""Who writes a run: one process at a time, and a process that was taken for dead does not go on.

An owner announces itself in the run's tag `mechdiff.lease.<epoch>` and counts up in it every quarter of
`LEASE_S` seconds while it works; it also holds a lock file of its machine, which the system lets go when it
dies. Whoever takes a run over writes the next epoch. On the same machine, and with a SQLite store on all that
see its file, the lock decides at once; elsewhere an owner counts as dead when its tag has not changed for
`LEASE_S` seconds of the observer's own clock. No clock of another machine is read.

The epoch fences: before every request that matters an owner that has not been able to count for half of
`LEASE_S` reads the tags again, and stops when it finds a higher epoch. What an owner may still have under way
when it is fenced does no harm, because both write the same: see `runs`.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from filelock import FileLock, Timeout
from mlflow.entities import Run
from pydantic import Field

from mechdiff_mlflow import foreign
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.locks import run_lock_file
from mechdiff_mlflow.tracking.store import Store
from mechdiff_mlflow.tracking.turns import RunBoard, promoting_machine, turn

LEASE_TAG = "mechdiff.lease."
LEASE_S = 60.0
_POLL_S = 1.0

_log = logging.getLogger(__name__)


class LeaseLost(MechdiffError):
    """Another process has taken the run over."""


@dataclass(frozen=True, slots=True)
class Holder:
    """An owner of a run, as its tag says.

    Args:
        epoch: How many owners there have been, itself included.
        token: A random word, another for each owner.
        machine: Whose lock file it holds; empty where everybody sees the lock file.
        host: Name of the machine, for people.
        pid: Process id there, for people.
        beat: Counted up while it works.
    """

    epoch: Annotated[int, Field(ge=0, lt=1 << 53)]
    token: str
    machine: str
    host: str
    pid: Annotated[int, Field(ge=0, lt=1 << 53)]
    beat: Annotated[int, Field(ge=0, lt=1 << 53)] = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def tag(self) -> dict[str, str]:
        """The tag that says so."""
        return {f"{LEASE_TAG}{self.epoch}": json.dumps(asdict(self))}


def holder_in(tags: Mapping[str, str]) -> Holder | None:
    """The last owner that a run's tags name; None for a run that has none."""
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
        epoch: One more than the last owner's.
    """

    def __init__(self, store: Store, epoch: int = 1) -> None:
        self._store = store
        machine = "" if store.sqlite_path is not None else promoting_machine(store)
        self.holder = Holder(epoch, uuid.uuid4().hex[:16], machine, platform.node() or "?", os.getpid())
        self._run_id = ""
        self._seen_s = now_s()
        self._lost: LeaseLost | None = None

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
            beating.start()
            try:
                yield
            finally:
                done.set()
                if lock is not None:
                    _release(lock)

    def demand(self) -> None:
        """Make sure that this process still owns the run.

        Raises:
            LeaseLost: Another process has taken it over.
        """
        if self._lost is None and now_s() - self._seen_s > LEASE_S / 2:
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

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(LEASE_S / 4):
            try:
                self._look()
                self.holder = replace(self.holder, beat=self.holder.beat + 1)
                ((key, text),) = self.holder.tag.items()
                with self._store.errors():
                    self._store.client.set_tag(self._run_id, key, text)
            except LeaseLost:
                return
            except MechdiffError as error:
                _log.debug("The lease of run %s could not be renewed: %s", self._run_id, error)

    def _look(self) -> None:
        before = now_s()
        with self._store.errors():
            tags = self._store.client.get_run(self._run_id).data.tags
        last = holder_in(tags)
        if last is not None and last.token != self.holder.token and last.epoch >= self.holder.epoch:
            self._lost = LeaseLost(
                f"Run {self._run_id} was taken over by {last} while this process stood still; let that one "
                "finish."
            )
            raise self._lost
        self._seen_s = before


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
        if last is not None and last.machine and last.machine != lease.holder.machine:
            last = _watched(store, run_id, last)
        queue = nullcontext() if store.sqlite_path else turn(RunBoard(store, run_id), lease.holder.machine)
        with queue, store.errors():
            current = holder_in(store.client.get_run(run_id).data.tags)
            if current is not None and (last is None or current.token != last.token):
                raise _alive(run_id, current)  # quicker
            lease.holder = replace(lease.holder, epoch=1 if current is None else current.epoch + 1)
            ((key, text),) = lease.holder.tag.items()
            store.client.set_tag(run_id, key, text)
        stack.pop_all()  # `kept` lets the lock go
        with lease.kept(run_id, lock):
            yield lease


def is_alive(store: Store, run: Run, watched: Callable[[str], bool] | None = None) -> bool | None:
    """Whether a run's owner is at work; None where that cannot be told at once.

    Args:
        store: Where the run is.
        run: As it is.
        watched: Whether the tag of the run with this id changed while it was watched; asked for owners on
            other machines.
    """
    last = holder_in(run.data.tags)
    if last is None:
        return None
    is_near = last.machine == ("" if store.sqlite_path is not None else promoting_machine(store))
    if not is_near:
        return None if watched is None else watched(run.info.run_id)
    lock = _lock(store, run.info.run_id)
    if not Path(lock.lock_file).exists():
        return False
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def now_s() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps where there is one."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if boot is None else time.clock_gettime(boot)


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
