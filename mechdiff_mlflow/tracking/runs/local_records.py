"""Local records of the commands that this user began on this machine, which no store can forge.

Whoever may write to a store may give a run any tags. So a command's tag names a local record with a random
secret and carries an HMAC of the command under that secret; `resume` goes on by itself only where both fit.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from mechdiff_mlflow.tracking.store.user_cache import cache_root

_NAME = re.compile("[0-9a-f]{32}")
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class LocalRecord:
    """What this machine knows of a command that was begun on it.

    Args:
        secret: Hex.
        who: The user's login to the store, or of the system.
        trusts: Whether its pair's spec said `trust_remote_code: true`.
        run_id: Its top run; empty until that is made.
    """

    secret: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    who: str
    trusts: bool
    run_id: str = ""

    def proof(self, command: str) -> str:
        """HMAC-SHA256 of a command's text, in hex."""
        return hmac.new(bytes.fromhex(self.secret), command.encode(), hashlib.sha256).hexdigest()


_ADAPTER = TypeAdapter(LocalRecord)


def begin(command: str, who: str, *, trusts: bool) -> tuple[str, str]:
    """Note that a command begins; the name of its record, and the proof to put into its run's tag.

    Where nothing can be written there is no record, and who resumes the run has to say that it is wanted.
    """
    name, record = secrets.token_hex(16), LocalRecord(secrets.token_hex(32), who, trusts)
    _write(name, record)
    return name, record.proof(command)


def bind(name: str, run_id: str) -> None:
    """Note which run a command got, so that its tag proves nothing on another."""
    if (record := _read(name)) is not None:
        _write(name, replace(record, run_id=run_id))


def forget(name: str) -> None:
    """Delete a record: its command is finished, or begun anew under another."""
    if _NAME.fullmatch(name):
        with suppress(OSError):
            _path(name).unlink()


def proven(name: str, command: str, proof: str, run_id: str) -> LocalRecord | None:
    """The record of a command, if it was begun here and is the command of that run."""
    record = _read(name)
    if record is None or record.run_id not in ("", run_id):
        return None
    return record if hmac.compare_digest(record.proof(command).encode(), proof.encode()) else None


def _path(name: str) -> Path:
    return cache_root() / "began" / f"{name}.json"


def _read(name: str) -> LocalRecord | None:
    if _NAME.fullmatch(name) is None:
        return None
    try:
        with _path(name).open("rb") as file:
            return _ADAPTER.validate_json(file.read(_MAX_BYTES), strict=True)
    except (OSError, ValidationError):
        return None


def _write(name: str, record: LocalRecord) -> None:
    path = _path(name)
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:  # which only its user reads
            part.write(_ADAPTER.dump_json(record))
        os.replace(part.name, path)
