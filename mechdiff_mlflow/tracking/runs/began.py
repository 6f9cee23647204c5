"""Which commands this user began on this machine: a local file for each, which no store can forge.

Whoever may write to a store may give a run any tags. So a command's tag names a local record with a random
secret and carries an HMAC of the command under that secret; `resume` goes on by itself only where both fit.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from mechdiff_mlflow.tracking.store.user_cache import cache_root

_NAME = re.compile("[0-9a-f]{32}")
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Began:
    """What this machine knows of a command that was begun on it.

    Args:
        secret: Hex.
        who: The user's login to the store, or of the system.
        trusts: Whether its pair's spec said `trust_remote_code: true`.
        run_id: Its top run; empty until that is made.
    """

    secret: str
    who: str
    trusts: bool
    run_id: str = ""

    def proof(self, command: str) -> str:
        """HMAC-SHA256 of a command's text, in hex."""
        return hmac.new(bytes.fromhex(self.secret), command.encode(), hashlib.sha256).hexdigest()


_BEGAN = TypeAdapter(Began)


def begin(command: str, who: str, *, trusts: bool) -> tuple[str, str]:
    """Note that a command begins; the name of its record, and the proof to put into its run's tag.

    Where nothing can be written there is no record, and who resumes the run has to say that it is wanted.
    """
    name, began = secrets.token_hex(16), Began(secrets.token_hex(32), who, trusts)
    _write(name, began)
    return name, began.proof(command)


def bind(name: str, run_id: str) -> None:
    """Note which run a command got, so that its tag proves nothing on another."""
    if (began := _read(name)) is not None:
        _write(name, replace(began, run_id=run_id))


def forget(name: str) -> None:
    """Delete a record: its command is finished, or begun anew under another."""
    if _NAME.fullmatch(name):
        with suppress(OSError):
            (_folder() / f"{name}.json").unlink()


def proven(name: str, command: str, proof: str, run_id: str) -> Began | None:
    """The record of a command, if it was begun here and is the command of that run."""
    began = _read(name)
    if began is None or began.run_id not in ("", run_id):
        return None
    return began if hmac.compare_digest(began.proof(command).encode(), proof.encode()) else None


def _folder() -> Path:
    return cache_root() / "began"


def _read(name: str) -> Began | None:
    if _NAME.fullmatch(name) is None:
        return None
    try:
        with (_folder() / f"{name}.json").open("rb") as file:
            began = _BEGAN.validate_json(file.read(_MAX_BYTES), strict=True)
        return began if re.fullmatch("[0-9a-f]{64}", began.secret) else None
    except (OSError, ValidationError):
        return None


def _write(name: str, began: Began) -> None:
    with suppress(OSError):
        _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        part = _folder() / f".{name}"
        descriptor = os.open(
            part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0), 0o600
        )
        with open(descriptor, "wb") as file:
            file.write(_BEGAN.dump_json(began))
        os.replace(part, _folder() / f"{name}.json")
