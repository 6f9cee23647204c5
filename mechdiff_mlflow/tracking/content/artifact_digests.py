"""Which artifacts were sent for a run: their digests, kept in a tag and checked when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.digests import file_sha256
from mechdiff_mlflow.tracking.content.keys import ARTIFACTS_TAG
from mechdiff_mlflow.tracking.content.records import MAX_TAG_CHARS


@dataclass(frozen=True, slots=True)
class Sent:
    """A file that was sent.

    Args:
        sha256: Hex digest.
        size: In bytes.
    """

    sha256: str
    size: int


def files_of(folder: Path) -> dict[str, Sent]:
    """Every file below a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): Sent(file_sha256(path), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def digest_tag(sent: Mapping[str, Sent]) -> dict[str, str]:
    """The tag that says what was sent; of more files than a tag holds, as many as it does."""
    listed: dict[str, str] = {}
    room = MAX_TAG_CHARS - 2
    for path, file in sent.items():
        room -= len(json.dumps({path: file.sha256})) + 1
        if room < 0:
            break
        listed[path] = file.sha256
    return {ARTIFACTS_TAG: json.dumps(listed)} if listed else {}


def sent_digest(tags: Mapping[str, str], name: str) -> str | None:
    """The SHA-256 of an artifact, by the tags of its run; None where they do not say."""
    try:
        found = json.loads(tags.get(ARTIFACTS_TAG, "{}")).get(name)
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def check_read(path: Path, name: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Make sure that a downloaded artifact is what was logged, as far as the run's tags say.

    Raises:
        MechdiffError: It is another.
    """
    expected = sent_digest(tags, name)
    if expected is not None and file_sha256(path) != expected:
        raise MechdiffError(
            f"{name} of run {run_id} is not what was logged; the store's files were changed or damaged, so "
            "restore them from a backup, or delete that run and repeat it."
        )
