"""Locks between the processes of one machine, let go by the system when their holder dies."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.redaction import redact

_WAIT_S = 300


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
    """Where the lock of store `uri` lies: beside a SQLite file, else in the temp files, one for each user.

    Linux does not let one user open another's file there, whatever its mode (fs.protected_regular).
    """
    if uri.startswith("sqlite:///"):
        return Path(f"{uri.removeprefix('sqlite:///')}.{purpose}.lock")
    user = getattr(os, "getuid", lambda: 0)()  # one user's temp files are their own on Windows
    digest = hashlib.sha256(redact(uri).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"mechdiff-{purpose}-{user}-{digest}.lock"


def run_lock_file(uri: str, run_id: str) -> Path:
    """Where the lock lies that a run's owner holds while it is at work."""
    if uri.startswith("sqlite:///"):
        return Path(f"{uri.removeprefix('sqlite:///')}.running", f"{run_id}.lock")
    return lock_file(uri, f"run-{run_id}")


def machine_of(lock: Path) -> str:
    """A name of whoever shares a lock file, kept in a file beside it.

    Raises:
        OSError: That file cannot be read or made.
    """
    file = lock.with_suffix(".machine")
    known = file.read_text(encoding="ascii") if file.is_file() and not file.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{32}", known):
        return known
    fresh = uuid.uuid4().hex
    part = file.with_suffix(f".{fresh}")
    part.write_text(fresh, encoding="ascii")
    os.replace(part, file)  # whole or not at all
    return fresh
