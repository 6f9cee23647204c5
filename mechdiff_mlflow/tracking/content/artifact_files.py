"""Files at one artifact location of a store: sent, made sure of and read in fewer requests than MLflow's."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import requests
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.utils.uri import add_databricks_profile_info_to_artifact_uri

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.digests import file_sha256
from mechdiff_mlflow.tracking.content.records import MAX_TAG_CHARS
from mechdiff_mlflow.tracking.content.tag_names import ARTIFACTS_TAG
from mechdiff_mlflow.tracking.store.store import Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sent:
    """A file that was sent."""

    sha256: str
    size: int  # bytes


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


class StoredFiles:
    """The files at a location: a URI, as the store gave it for a run or a model."""

    def __init__(self, store: Store, location: str) -> None:
        self._store, self._location = store, location
        # As MLflow's client does: there a location says which login belongs to it.
        uri = add_databricks_profile_info_to_artifact_uri(location, store.uri)
        self._files = get_artifact_repository(uri, tracking_uri=store.uri)

    def send(self, folder: Path, *, again: bool = False) -> None:
        """Put everything in `folder` there, under the same names.

        After a killed process (`again`) a server may keep a part of a file, which it does not list; so the
        place is emptied first, if it lists no others.
        """
        if again and not isinstance(self._files, LocalArtifactRepository):
            self._empty({path.relative_to(folder).as_posix() for path in folder.rglob("*")})
        self._store.retries.run(lambda: self._files.log_artifacts(str(folder)))

    def _empty(self, names: Set[str]) -> None:
        try:
            folders = [""]
            for folder in folders:
                for found in self._store.retries.run(partial(self._files.list_artifacts, folder or None)):
                    if found.path not in names:
                        return
                    folders += [found.path] if found.is_dir else []
            self._store.retries.run(self._files.delete_artifacts)
        except (MlflowException, requests.RequestException, NotImplementedError) as error:
            _log.warning("What a killed upload may have left at %s stays there: %s", self._location, error)

    def read_back(self, names: Iterable[str], folder: Path) -> Path:
        """A directory that holds the files `names`: the store's own (never change it), or `folder`."""
        if isinstance(self._files, LocalArtifactRepository):
            place = Path(self._files.artifact_dir)
            self._store.say_if_moved(place)
            return place
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            # What every kind of store implements; `download_artifacts` lists the directory first.
            self._store.retries.run(partial(self._files._download_file, name, str(folder / name)))
        return folder

    def require_same(self, sent: Mapping[str, str], folder: Path) -> Path:
        """Make sure that the stored files have the digests `sent`; where they can be read (see `read_back`).

        Raises:
            MechdiffError: One is missing or has other bytes.
        """
        back = self.read_back(sent, folder)
        for name, expected in sent.items():
            found = file_sha256(back / name) if (back / name).is_file() else "none"
            if found != expected:
                raise MechdiffError(
                    f"The store {self._store.shown} gave back another {name} than was sent (SHA-256 "
                    f"{found[:12]}, not {expected[:12]}); check its disk."
                )
        return back

    def require_present(self, sent: Mapping[str, Sent]) -> None:
        """Make sure that the stored files are there.

        On this machine their bytes are compared; elsewhere their sizes, with a request a directory.

        Raises:
            MechdiffError: One is missing or another.
        """
        if isinstance(self._files, LocalArtifactRepository):
            self.require_same({name: file.sha256 for name, file in sent.items()}, Path())
            return
        sizes: dict[str, int] = {}
        for folder in sorted({str(PurePosixPath(name).parent) for name in sent}):
            ask = partial(self._files.list_artifacts, None if folder == "." else folder)
            sizes |= {f.path: int(f.file_size or 0) for f in self._store.retries.run(ask) if not f.is_dir}
        for name, file in sent.items():
            if sizes.get(name) != file.size:
                raise MechdiffError(
                    f"The store {self._store.shown} holds {sizes.get(name, 'no')} bytes of {name} where "
                    f"{file.size} were sent; check its disk."
                )
