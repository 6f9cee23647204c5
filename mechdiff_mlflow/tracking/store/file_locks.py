"""Locks between the processes of one machine, let go by the system when their holder dies."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store.redaction import redact

_WAIT_S = 300
_STAT_FIELDS = 20
"""Of /proc/PID/stat after the name, from the state to the start."""


@contextmanager
def file_lock(file: Path) -> Iterator[None]:
    """Hold the lock `file`, waiting for whoever has it.

    Raises:
        MechdiffError: Another process held it for five minutes.
        OSError: The file cannot be made.
    """
    try:
        with FileLock(file, timeout=_WAIT_S):
            yield
    except Timeout as error:
        raise MechdiffError(
            f"Another process has held {file} for {_WAIT_S} s; stop it, then try again."
        ) from error


def lock_file(uri: str, purpose: str) -> Path:
    """Path of the lock of store `uri`: beside a SQLite file, else in the temp files, one for each user.

    Linux does not let one user open another's file there, whatever its mode (fs.protected_regular).
    """
    if uri.startswith("sqlite:///"):
        return Path(f"{uri.removeprefix('sqlite:///')}.{purpose}.lock")
    user = getattr(os, "getuid", lambda: 0)()  # one user's temp files are their own on Windows
    digest = hashlib.sha256(redact(uri).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"mechdiff-{purpose}-{user}-{digest}.lock"


def run_lock_file(uri: str, run_id: str) -> Path:
    """Path of the lock that a run's owner holds while it is at work."""
    if uri.startswith("sqlite:///"):
        return Path(f"{uri.removeprefix('sqlite:///')}.running", f"{run_id}.lock")
    return lock_file(uri, f"run-{run_id}")


def machine_id(lock: Path) -> str:
    """32 hex digits that only processes share for which `lock` is one lock: same boot, container and folder.

    Nothing of it is kept in a file, which a copied folder or disk image would carry to another machine.

    Raises:
        OSError: The lock's folder cannot be looked at.
    """
    where = lock.parent.stat()
    parts = [
        # Without a boot id, as on macOS and Windows, the address of a network card.
        _first_line("/proc/sys/kernel/random/boot_id") or f"{uuid.getnode():012x}",
        _first_line("/etc/machine-id"),
        platform.node(),
        _link("/proc/self/ns/pid"),
        f"{where.st_dev}:{where.st_ino}",
        lock.name,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def process_start(pid: int) -> str:
    """When process `pid` of this machine began, in the system's ticks; empty if it is dead or none can say.

    A process id is given again to another process; together with this it is not.
    """
    fields = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()  # the name before may have anything
    return "" if len(fields) < _STAT_FIELDS or fields[0] in "ZX" else fields[_STAT_FIELDS - 1]


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
