"""Artifacts as the store has them: digests of what was sent, and whether that is what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from mechdiff_mlflow.digests import file_sha256
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.keys import ARTIFACTS_TAG
from mechdiff_mlflow.tracking.records import MAX_TAG_CHARS
from mechdiff_mlflow.tracking.store import Store


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


def check_stored(store: Store, run_id: str, artifact_uri: str, sent: Mapping[str, Sent]) -> None:
    """Make sure that the artifacts of a run are what was sent.

    Where their folder is on this machine they are read; of others the sizes are asked for.

    Raises:
        MechdiffError: One is missing or another.
    """
    root = _local(artifact_uri)
    if root is not None:
        found = {path: root / path for path in sent}
        wrong = [
            path
            for path, file in found.items()
            if not file.is_file() or file_sha256(file) != sent[path].sha256
        ]
    else:
        sizes: dict[str, int] = {}
        with store.errors():
            for folder in sorted({str(PurePosixPath(path).parent) for path in sent}):
                listed = store.client.list_artifacts(run_id, None if folder == "." else folder)
                sizes |= {item.path: int(item.file_size or 0) for item in listed if not item.is_dir}
        wrong = [path for path, file in sent.items() if sizes.get(path) != file.size]
    if wrong:
        raise MechdiffError(
            f"The store {store.shown} does not hold {wrong[0]} of run {run_id} as it was sent; check its "
            "disk, then resume the run."
        )


def check_read(path: Path, name: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Make sure that a downloaded artifact is what was logged, as far as the run's tags say.

    Raises:
        MechdiffError: It is another.
    """
    try:
        digests = json.loads(tags.get(ARTIFACTS_TAG, "{}"))
        expected = digests.get(name)
    except (ValueError, AttributeError):
        expected = None
    if expected is not None and file_sha256(path) != expected:
        raise MechdiffError(
            f"{name} of run {run_id} is not what was logged; the store's files were changed or damaged, so "
            "restore them from a backup, or delete that run and repeat it."
        )


def _local(artifact_uri: str) -> Path | None:
    parts = urlsplit(artifact_uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(artifact_uri) if not parts.scheme else None
