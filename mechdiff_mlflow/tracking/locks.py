"""Locks between the processes of one machine, let go by the system when their holder dies."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mechdiff_mlflow.errors import MechdiffError

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
    """Where the lock of store `uri` lies: beside a SQLite file, else in the temp files."""
    if uri.startswith("sqlite:///"):
        return Path(f"{uri.removeprefix('sqlite:///')}.{purpose}.lock")
    digest = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"mechdiff-{purpose}-{digest}.lock"
