"""The files that this machine keeps for a user: fetched maps by digest, and what names meant when asked."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store.database import sqlite_path

CACHE_VARIABLE = "MECHDIFF_CACHE"
STAGING_VARIABLE = "MECHDIFF_STAGING"

_STALE_S = 14 * 24 * 3600
_RUN_ID = re.compile("[0-9A-Za-z_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Answer:
    """The map that a name meant in a store."""

    label: str  # what it named, e.g. `NAME/3`
    sha256: str  # digest of the map
    asked: str  # when the store said so, in UTC


def cache_root() -> Path:
    """The user's folder for what mechdiff keeps; `MECHDIFF_CACHE` sets it."""
    if root := os.environ.get(CACHE_VARIABLE):
        return Path(root)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "mechdiff" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechdiff"


def write(path: Path, content: bytes) -> None:
    """Write a file of the cache, whole and for its user alone; if it cannot be, that is no reason to fail."""
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as folder:
            part = Path(folder, path.name)
            part.touch(mode=0o600)
            part.write_bytes(content)
            os.replace(part, path)


def entry(sha256: str) -> Path:
    """The directory for the model whose map has this digest, which the caller has checked to be one."""
    return cache_root() / "maps" / sha256


def place(uri: str) -> str:
    """A store's URI without user, password and options, a SQLite file by its absolute path."""
    parts = urlsplit(uri)
    if parts.scheme == "sqlite":
        return f"sqlite:///{sqlite_path(uri)}"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def staging(run_id: str) -> Path:
    """The directory for what a run has computed and not logged yet; `MECHDIFF_STAGING` sets its parent.

    Raises:
        MechdiffError: It is no run id; what a store says must not name other places.
    """
    if _RUN_ID.fullmatch(run_id) is None:
        raise MechdiffError(f"{run_id[:80]!r} is no run id; check the tracking server.")
    return Path(os.environ.get(STAGING_VARIABLE) or cache_root() / "staging") / run_id


def forget_old_staging() -> None:
    """Delete what runs of this user left in the cache's staging and nobody went on with for two weeks."""
    with suppress(OSError):
        for folder in (cache_root() / "staging").iterdir():
            with suppress(OSError):
                if _RUN_ID.fullmatch(folder.name) and time.time() - folder.lstat().st_mtime > _STALE_S:
                    shutil.rmtree(folder, ignore_errors=True)


def remember(uri: str, name: str, label: str, sha256: str) -> None:
    """Note what `name` means in the store `uri` now."""
    answer = Answer(label, sha256, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
    write(_answer_path(uri, name), TypeAdapter(Answer).dump_json(answer))


def recall(uri: str, name: str) -> Answer | None:
    """What `name` meant in the store `uri` when it was last asked on this machine; None if it never was."""
    try:
        return TypeAdapter(Answer).validate_json(_answer_path(uri, name).read_bytes())
    except (OSError, ValidationError):
        return None


def _answer_path(uri: str, name: str) -> Path:
    key = hashlib.sha256(f"{place(uri)}\n{name}".encode()).hexdigest()
    return cache_root() / "answers" / f"{key}.json"
