"""Opening the store that runs and winners live in: a SQLite file, a database or an MLflow server."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import requests
from mlflow.entities import Experiment, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store import database
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.retries import DirectClient, Retries, RetryingClient, full_disk, is_away
from mechdiff_mlflow.tracking.store.server import (
    ask_server,
    is_answer_of_mlflow,
    not_allowed,
    with_utf8_login,
)

PLACE_TAG = "mechdiff.store"
"""Tag of an experiment in a SQLite store: the path of the store when it was first written to."""
_log = logging.getLogger(__name__)
_MAX_EXPERIMENTS = 50_000
_said: set[str] = set()
"""Stores of which it was said that they were copied."""
_URI_VARIABLE = "MLFLOW_TRACKING_URI"
T = TypeVar("T")
_REFUSED = re.compile(r"endpoint (?P<endpoint>\S+) failed with error code (?P<status>401|403)\b")

# The user's own settings win; these are what MLflow does when nothing is set.
_PROCESS_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Or each process asks a server whether it could fetch one file in several pieces.
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow would cut long values with only a warning in the log.
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


class StoreUnreachable(MechdiffError):
    """No server answers, or not any more."""


class StoreFull(MechdiffError):
    """The disk of a store has no room, perhaps not even for the status of a run."""


class RunTakenOver(MechdiffError):
    """Another process has taken the run over."""


class NotAllowed(MechdiffError):
    """A server does not let this account do that."""


@dataclass(frozen=True, slots=True)
class Store:
    """An opened, working tracking store and the model registry that belongs to it."""

    uri: str  # absolute, secrets included: print `shown` instead
    client: MlflowClient | RetryingClient = field(repr=False)
    sqlite_path: Path | None = None  # the database file of a SQLite store
    retries: Retries = field(default_factory=Retries, repr=False)
    seen: dict[str, Mapping[str, str]] = field(default_factory=dict, repr=False, compare=False)
    """Tags of experiments that were asked for by name, by id."""

    def __post_init__(self) -> None:
        if not isinstance(self.client, RetryingClient):
            object.__setattr__(self, "client", RetryingClient(self.client, self.retries))

    @property
    def shown(self) -> str:
        """The URI without its secrets."""
        return redact(self.uri)

    def command(self, *words: object) -> str:
        """A command of ours to type, quoted for a shell, on this store; see `command_on`."""
        is_default = self.sqlite_path == Path.cwd() / "mlflow.db" and not os.environ.get(_URI_VARIABLE)
        return command_on(None if is_default else self.uri, *words)

    @property
    def is_server(self) -> bool:
        """Whether runs go to an MLflow server over HTTP."""
        return self.uri.startswith(("http://", "https://"))

    def experiment(self, name: str, tags: Mapping[str, str] | None = None) -> str:
        """The id of experiment `name`, made with `tags` if there is none, artifacts beside a SQLite file.

        Raises:
            MechdiffError: The name is empty or Default, belongs to a deleted experiment, or the store was
                copied or moved.
        """
        if not name.strip() or name == "Default":
            raise MechdiffError(
                f"Experiment {name!r} cannot be used, as MLflow decides where its artifacts go by who opened "
                "the store first; name another with --experiment."
            )
        with self.errors():
            found = self.client.get_experiment_by_name(name)
            if found is None:
                place = {} if self.sqlite_path is None else {PLACE_TAG: str(self.sqlite_path)}
                place |= tags or {}
                try:
                    create = partial(self.client.create_experiment, name, self._artifact_root(name), place)
                    made = str(self.retries.once(create, lambda: self._id_of(name)))
                    self.seen[made] = place
                    return made
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = self.client.get_experiment_by_name(name)  # another process was quicker
        if found is None or found.lifecycle_stage == "deleted":
            which = "" if found is None else f" -x {found.experiment_id}"
            raise MechdiffError(
                f"Experiment {name!r} was deleted in {self.shown}; bring it back with "
                f"`mlflow experiments restore{which}` or name another with --experiment."
            )
        self.require_place(found)
        self.seen[str(found.experiment_id)] = found.tags
        return str(found.experiment_id)

    def require_place(self, experiment: Experiment | str) -> None:
        """Make sure that what is written into an experiment, or the one of an id, goes where the store is.

        A SQLite store says in absolute paths where its artifacts are, and so does a copy of it. What this
        compares with is noted when an experiment is first written to.

        Raises:
            MechdiffError: The store was copied or moved since.
        """
        if self.sqlite_path is None:
            return
        with self.errors():
            if isinstance(experiment, str):
                experiment = self.client.get_experiment(experiment)
            if (old := self.moved_from(experiment)) is not None:
                raise MechdiffError(
                    f"The store {self.sqlite_path} was copied or moved from {old}, and experiment "
                    f"{experiment.name!r} still keeps its artifacts there ({experiment.artifact_location}); "
                    f"run {self.command('server-check', '--rebase')} to have them here, then run this again."
                )
            if PLACE_TAG not in experiment.tags:
                place = str(self.sqlite_path)
                self.client.set_experiment_tag(experiment.experiment_id, PLACE_TAG, place)

    def say_if_moved(self, place: Path) -> None:
        """Warn, once, before files outside of the store's folder are read because it was copied or moved."""
        if self.sqlite_path is None or self.uri in _said or place.is_relative_to(self.sqlite_path.parent):
            return
        _said.add(self.uri)
        for old in self.moved(self.experiments()):
            _log.warning(
                f"The store {self.sqlite_path} was copied or moved from {old}, and its artifacts are "
                f"still read there; run {self.command('server-check', '--rebase')} to have them here."
            )

    def every(self, search: Callable[[str | None], PagedList[T]]) -> Iterator[T]:
        """What `search` finds, asked for page by page as it is taken, by the token of each page."""
        token = None
        while True:
            with self.errors():
                found = search(token)
            yield from found
            token = found.token
            if not token:
                return

    def experiments(self) -> list[Experiment]:
        """Every experiment, deleted ones too."""
        with self.errors():
            return list(self.client.search_experiments(ViewType.ALL, max_results=_MAX_EXPERIMENTS))

    def moved(self, experiments: Iterable[Experiment]) -> dict[Path, list[Experiment]]:
        """The experiments whose artifacts are where this store lay before, by that folder."""
        found: dict[Path, list[Experiment]] = {}
        for experiment in experiments:
            if (old := self.moved_from(experiment)) is not None:
                found.setdefault(old, []).append(experiment)
        return found

    def moved_from(self, experiment: Experiment) -> Path | None:
        """The folder in which the store lay when it noted the places of artifacts; None for its present one.

        Places outside the store's folder were chosen by somebody, and stay.
        """
        if self.sqlite_path is None or not is_local_uri(experiment.artifact_location):
            return None
        artifacts = Path(local_file_uri_to_path(experiment.artifact_location))
        if noted := experiment.tags.get(PLACE_TAG):
            old = Path(noted)
            is_ours = artifacts.is_relative_to(old.parent)
        else:  # before that was noted: known by where our artifacts are, and that no other store is meant
            root = Path(local_file_uri_to_path(self._artifact_root(experiment.name) or ""))
            if artifacts.parts[-2:] != root.parts[-2:]:
                return None
            old = artifacts.parents[1] / self.sqlite_path.name
            is_ours = not old.parent.exists() or old.exists()
        if not is_ours or (old.exists() and old.samefile(self.sqlite_path)):
            return None
        return None if old.parent == self.sqlite_path.parent else old.parent

    def experiment_id(self, name: str) -> str:
        """The id of the existing experiment `name`.

        Raises:
            MechdiffError: There is none; lists those there are.
        """
        with self.errors():
            if (found := self._id_of(name)) is not None:
                return found
            there = self.client.search_experiments(ViewType.ACTIVE_ONLY, max_results=20)
        names = ", ".join(experiment.name for experiment in there) or "none"
        raise MechdiffError(f"There is no experiment {name!r} in {self.shown}; it has {names}.")

    def _id_of(self, name: str) -> str | None:
        found = self.client.get_experiment_by_name(name)
        return None if found is None or found.lifecycle_stage == "deleted" else str(found.experiment_id)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns what MLflow and the network raise into one sentence for the user, without secrets."""
        try:
            yield
        except (MlflowException, requests.RequestException, OSError) as error:
            if (reason := full_disk(error)) is not None:
                raise StoreFull(
                    f"The store {self.shown} could not be written: {reason}; make room on its disk, then "
                    "finish with mechdiff resume, or run this again where that finds nothing."
                ) from error
            text = " ".join(str(error).partition("[SQL: ")[0].split())
            text = redact(text.replace(self.uri, self.shown))
            if self.is_server and is_away(error):
                raise StoreUnreachable(
                    f"The tracking server {self.shown} stopped answering; start it, then run this again."
                ) from error
            if refused := _REFUSED.search(text):
                what = refused["endpoint"].removeprefix("/api/2.0/mlflow/")
                raise NotAllowed(not_allowed(self.uri, int(refused["status"]), what)) from error
            answer = error.response if isinstance(error, requests.HTTPError) else None
            if self.is_server and answer is not None and answer.status_code in (401, 403):
                raise NotAllowed(not_allowed(self.uri, answer.status_code, "artifacts")) from error
            if isinstance(error, OSError):
                raise MechdiffError(
                    f"The store {self.shown} could not be read or written: {text[:300]}."
                ) from error
            raise MechdiffError(f"The store {self.shown} refused: {text[:500].rstrip('.')}.") from error

    def _artifact_root(self, experiment: str) -> str | None:
        if self.sqlite_path is None:
            return None
        slug = re.sub(r"[^\w.-]+", "-", experiment).strip(".-")[:60]  # a file name has 255 bytes
        if slug != experiment:
            slug = f"{slug}-{hashlib.sha256(experiment.encode()).hexdigest()[:8]}"
        return (self.sqlite_path.parent / "mlartifacts" / slug).as_uri()


def open_store(tracking_uri: str | None = None) -> Store:
    """Open, and if need be create or migrate, the store at `tracking_uri`.

    Without one, MLFLOW_TRACKING_URI counts, else `mlflow.db` in the working directory, which is also where
    `mlflow ui` looks. Any number of processes may open a new store at once.

    Raises:
        MechdiffError: The URI is of a kind we do not use, the server does not answer, or the database is
            unusable.
    """
    prepare_process()
    uri = uri_of(tracking_uri)
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        _check_server(uri)
        return Store(uri, DirectClient(uri))
    if scheme.startswith("databricks"):
        return Store(uri, DirectClient(uri))
    if scheme == "sqlite":
        path = database.sqlite_path(uri)
        return Store(f"sqlite:///{path}", database.open_sqlite(path), path)
    if scheme.split("+")[0] in ("postgresql", "mysql", "mssql"):
        return Store(uri, database.open_database(uri, redact(uri)))
    raise MechdiffError(
        f"Tracking URI {redact(uri)!r} is a directory or of an unknown kind; MLflow keeps registered maps in "
        "a database, so use sqlite:///mlflow.db or the http:// address of an MLflow server."
    )


def command_on(uri: str | None, *words: object) -> str:
    """A command of ours to type, quoted for a shell, with the store at `uri` unless that holds secrets."""
    place = ["--tracking-uri", uri] if uri and redact(uri) == uri else []
    return shlex.join(["mechdiff", *map(str, words), *place])


def uri_of(tracking_uri: str | None = None) -> str:
    """The URI that counts: the given one, MLFLOW_TRACKING_URI, or `mlflow.db` in the working directory."""
    uri = tracking_uri or os.environ.get(_URI_VARIABLE) or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    return with_utf8_login(uri.rstrip("/")) if uri.startswith(("http://", "https://")) else uri


def prepare_process() -> None:
    """Set what our processes want of MLflow, where the user has not decided otherwise."""
    for name, value in _PROCESS_SETTINGS.items():
        os.environ.setdefault(name, value)
    for chatty in ("mlflow.store.model_registry.abstract_store", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # It logs the traceback of what it raises, which is the user's to hear of once.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _check_server(uri: str) -> None:
    try:
        answer = ask_server(uri)
    except (MlflowException, requests.RequestException) as error:
        raise StoreUnreachable(
            f"No tracking server answers at {redact(uri)}; start one with `mlflow server --port "
            f"{urlsplit(uri).port or 5000}`, or set MLFLOW_TRACKING_URI to one that runs, or unset it to use "
            "./mlflow.db."
        ) from error
    if answer.status_code in (401, 403):
        raise MechdiffError(not_allowed(uri, answer.status_code))
    if not is_answer_of_mlflow(answer):
        raise MechdiffError(
            f"What answers at {redact(uri)} (HTTP {answer.status_code}) is not an MLflow tracking server; "
            "check host, port and path of MLFLOW_TRACKING_URI."
        )
