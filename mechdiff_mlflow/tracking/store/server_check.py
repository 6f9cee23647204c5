"""Checks of a tracking server or store: what was found, and what to do about it."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow.entities import LoggedModelStatus, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store import database
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.server import (
    SEARCH,
    SERVER_ANSWER_S,
    ask_server,
    is_answer_of_mlflow,
    login_name,
)
from mechdiff_mlflow.tracking.store.store import PLACE_TAG, Store, open_store, prepare_process, uri_of

PREFIX = "mechdiff-server-check"
"""Beginning of the names of what is made to try a store, and deleted again."""
_PROBE_BYTES = 256 * 1024
_PROXY = "mlflow server --serve-artifacts --artifacts-destination PLACE, then new experiments"


class Level(str, Enum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"
    SKIP = "skip"
    """Cannot be seen from here, or another check failed first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the check."""

    check: str  # what was looked at
    level: Level
    seen: str  # with values and without secrets
    remedy: str = ""  # empty when all is well


def check_store(tracking_uri: str | None = None) -> list[Finding]:
    """Look at the store that `open_store` would open, without creating or migrating it.

    On a server, and in a database whose tables are up to date, a scratch experiment, run and registered model
    are made and deleted again.

    Raises:
        MechdiffError: The URI is of a kind that we do not use.
    """
    prepare_process()
    uri = uri_of(tracking_uri)
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme in ("http", "https"):
        return list(_server(uri))
    if scheme in ("sqlite", "postgresql", "mysql", "mssql"):
        return list(_database(uri))
    raise MechdiffError(
        f"{redact(uri)!r} is neither an MLflow server nor a database; give server-check its http:// address."
    )


def _server(uri: str) -> Iterator[Finding]:
    try:
        answer, version = ask_server(uri), ask_server(uri, "GET", "/version")
        is_open = is_answer_of_mlflow(_ask_as_nobody(uri))
    except (MlflowException, requests.RequestException) as error:
        yield _unreachable(uri, str(error))
        return
    status, name = answer.status_code, login_name(uri)
    refused = status in (requests.codes.unauthorized, requests.codes.forbidden)
    if not refused and not is_answer_of_mlflow(answer):
        seen = f"what answers at {redact(uri)} (HTTP {status}) is no MLflow server"
        yield Finding("reachable", Level.FAIL, seen, "check host, port and path of the address")
        return
    yield Finding("reachable", Level.OK, f"{redact(uri)} answers")
    if refused:
        seen = f"user {name!r} is refused" if name else "no user is given and one is needed"
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        yield Finding("login", Level.FAIL, f"{seen} (HTTP {status})", remedy)
    else:
        yield Finding("login", Level.OK, f"as {name}" if name else "none given, none needed")
        yield _version(version.text.strip() if version.ok else "")
    yield from _exposure(uri, is_open)
    remedy = "on the server's machine: mechdiff server-check --tracking-uri DATABASE"
    yield Finding("store migrations", Level.SKIP, "cannot be seen through HTTP", remedy)
    if refused:
        yield Finding("permissions, artifacts", Level.SKIP, "not tried before the login")
    else:
        yield from _round_trips(open_store(uri))


def _unreachable(uri: str, text: str) -> Finding:
    if "CERTIFICATE_VERIFY_FAILED" in text or "SSLError" in text:
        remedy = "have it signed by a known authority, or name its file in MLFLOW_TRACKING_SERVER_CERT_PATH"
        return Finding("reachable", Level.FAIL, f"the certificate of {redact(uri)} is not trusted", remedy)
    seen = f"nothing answers at {redact(uri)} within {SERVER_ANSWER_S} s"
    return Finding(
        "reachable", Level.FAIL, seen, "start the server, and check address, firewall and reverse proxy"
    )


def _ask_as_nobody(uri: str) -> requests.Response:
    """The answer to a search without credentials from anywhere, .netrc included."""
    parts = urlsplit(uri)
    return requests.post(
        parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() + SEARCH,
        json={"max_results": 1},
        timeout=SERVER_ANSWER_S,
        verify=get_default_host_creds(uri).verify,
        auth=lambda request: request,
    )


def _version(theirs: str) -> Finding:
    """Compares major and minor numbers with the server's; servers may be newer than clients."""
    ours = str(mlflow.__version__)
    server, client = ([int(n) for n in text.split(".")[:2] if n.isdigit()] for text in (theirs, ours))
    if len(server) != len(client):
        seen = f"the server does not say, client {ours}"
        return Finding("version", Level.WARN, seen, "let the reverse proxy pass /version on")
    seen = f"server {theirs}, client {ours}"
    if server[0] != client[0]:
        return Finding("version", Level.FAIL, seen, "upgrade the older one")
    if server < client:
        remedy = f"upgrade the server, or pip install mlflow=={theirs} here"
        return Finding("version", Level.WARN, seen, remedy)
    return Finding("version", Level.OK, seen)


def _exposure(uri: str, is_open: bool) -> Iterator[Finding]:
    """Who may change what is on a server, and whether others can read what goes there."""
    parts = urlsplit(uri)
    host = parts.hostname or ""
    is_here = host == "localhost" or host.startswith("127.") or host == "::1"
    remedy = "for more than one person: mlflow server --app-name basic-auth"
    if not is_open:
        yield Finding("authentication", Level.OK, "who gives no credentials is refused")
    elif is_here:
        yield Finding("authentication", Level.WARN, "none: whoever reaches it may do everything", remedy)
    else:
        seen = f"anybody who reaches {host} may read, change and delete everything"
        yield Finding("authentication", Level.FAIL, seen, remedy)
    remedy = "a reverse proxy with TLS before the server, and its https:// address here"
    if is_here:
        yield Finding("encryption", Level.OK, "the connection does not leave this machine")
    elif parts.scheme == "https":
        yield Finding("encryption", Level.OK, "https")
    elif login_name(uri):
        yield Finding("encryption", Level.FAIL, "http: the password crosses the network readable", remedy)
    else:
        yield Finding("encryption", Level.WARN, "http: whoever is on the way can read and change all", remedy)


def _database(uri: str) -> Iterator[Finding]:
    shown = redact(uri)
    try:
        found, head, is_known = database.schema_of(uri, shown)
    except MechdiffError as error:
        yield Finding("reachable", Level.FAIL, str(error))
        return
    if found is None:
        remedy = "the first command that logs makes them, e.g. mechdiff run"
        yield Finding("reachable", Level.WARN, f"{shown} holds no tables of MLflow yet", remedy)
        return
    yield Finding("reachable", Level.OK, f"{shown} opens")
    if found != head:
        if is_known:
            seen = f"at {found}, MLflow {mlflow.__version__} wants {head}"
            remedy = f"copy the database, then: mlflow db upgrade {shlex.quote(shown)}"
        else:
            seen = f"at {found}, which MLflow {mlflow.__version__} does not know: a newer one made it"
            remedy = "pip install --upgrade mlflow"
        yield Finding("store migrations", Level.FAIL, seen, remedy)
        return
    yield Finding("store migrations", Level.OK, f"at {head}, as MLflow {mlflow.__version__} wants it")
    store = open_store(uri)
    if store.sqlite_path is not None:
        yield _places(store, store.sqlite_path.parent)
    yield from _round_trips(store)


def rebase(tracking_uri: str | None = None) -> list[Path]:
    """Have a SQLite store that was copied or moved say that its artifacts are in its present folder.

    Returns: The folders where it said they are.

    Raises:
        MechdiffError: It is no SQLite store, or the artifacts were not copied or moved along.
    """
    store = open_store(tracking_uri)
    if store.sqlite_path is None:
        raise MechdiffError(
            f"{store.shown} is no SQLite file, and only such a store moves with its artifacts."
        )
    moved = store.moved(store.experiments())
    for old, experiments in moved.items():
        for experiment in experiments:
            there = Path(local_file_uri_to_path(experiment.artifact_location))
            here = store.sqlite_path.parent / there.relative_to(old)
            if there.exists() and not here.exists():
                raise MechdiffError(
                    f"The artifacts of experiment {experiment.name!r} are in {there} still; copy them to "
                    f"{here}, then try again."
                )
    with store.errors():
        for old in moved:
            database.rebase(store.sqlite_path, old, PLACE_TAG)
    return list(moved)


def _places(store: Store, folder: Path) -> Finding:
    """Whether a SQLite store's artifacts are in its folder."""
    experiments = store.experiments()
    if moved := store.moved(experiments):
        seen = "; ".join(
            f"of {_listed([e.name for e in some], ', ')} in {old}" for old, some in moved.items()
        )
        remedy = store.command("server-check", "--rebase")
        return Finding("artifact places", Level.FAIL, f"the store was copied or moved: {seen}", remedy)
    outside = [
        f"{e.name} in {e.artifact_location}"
        for e in experiments
        if e.name != "Default" and not _is_below(e.artifact_location, folder)
    ]
    if outside:
        seen = f"outside {folder}: {_listed(outside, '; ')}"
        return Finding("artifact places", Level.WARN, seen, "copy and back them up beside the store")
    return Finding("artifact places", Level.OK, f"all in {folder}")


def _is_below(uri: str, folder: Path) -> bool:
    return is_local_uri(uri) and Path(local_file_uri_to_path(uri)).resolve().is_relative_to(folder.resolve())


def _listed(words: list[str], between: str) -> str:
    return between.join(words[:5]) + " …" * (len(words) > 5)


def _round_trips(store: Store) -> list[Finding]:
    with store.retries.one_attempt():  # what does not answer at once is a finding
        return list(_tries(store))


def _tries(store: Store) -> Iterator[Finding]:
    scratch = _Scratch(store)
    mine = "ask the server's administrator" if store.is_server else "check the permissions of the store"
    try:
        made = _try("permissions", scratch.runs, mine)
        yield made
        if made.level is Level.OK:
            yield _artifacts(store, scratch)
            yield _try("registry", scratch.registry, mine)
    finally:
        left = scratch.remove()
    if left:
        yield Finding("cleaned up", Level.WARN, f"still there: {'; '.join(left)}", "have them deleted")
    elif made.level is Level.OK:
        seen = f"{scratch.name} is deleted; `mlflow gc` removes its last traces"
        yield Finding("cleaned up", Level.OK, seen)


def _try(check: str, attempt: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(check, Level.OK, attempt())
    except MechdiffError as error:
        return Finding(check, Level.FAIL, str(error), remedy)


def _artifacts(store: Store, scratch: _Scratch) -> Finding:
    if not store.is_server:
        found = _try("artifacts", scratch.artifacts, "check the folder's permissions")
        if found.level is Level.OK and store.sqlite_path is None:
            seen = f"in {scratch.artifact_uri}, which only this machine sees"
            remedy = "for more than one person: an MLflow server on this database, with --app-name basic-auth"
            return Finding(found.check, Level.WARN, seen, remedy)
        return found
    scheme = urlsplit(scratch.artifact_uri).scheme or "file"
    if scheme == "file":  # trying it would write here and prove nothing
        seen = f"off: clients are to write to {scratch.artifact_uri}, a path of the server's machine"
        return Finding("artifact proxy", Level.FAIL, seen, _PROXY)
    remedy = "check --artifacts-destination, and the body size that the reverse proxy lets pass"
    found = _try("artifact proxy", scratch.artifacts, remedy)
    if found.level is Level.OK and scheme != "mlflow-artifacts":
        seen = f"off: clients reach {scheme}:// themselves, and need its credentials; {found.seen}"
        return Finding(found.check, Level.WARN, seen, _PROXY)
    return found


class _Scratch:
    """An experiment, a run, a logged model and a registered map under a name that nobody else uses.

    Its methods `runs`, `artifacts` and `registry`, in this order, say what they saw or raise `MechdiffError`.
    """

    def __init__(self, store: Store) -> None:
        self.name = f"{PREFIX}-{secrets.token_hex(4)}"
        self.artifact_uri = ""
        """Where the run's artifacts go."""
        self._store, self._client = store, store.client
        self._undo: list[tuple[str, Callable[[], object]]] = []
        self._run_id = self._model_id = ""

    def runs(self) -> str:
        """Make the experiment, a run with a param, a metric and a tag, and a logged model."""
        client, name = self._client, self.name
        experiment_id = self._store.experiment(name)
        self._undo.append((f"experiment {name}", lambda: client.delete_experiment(experiment_id)))
        with self._store.errors():
            run = client.create_run(experiment_id, run_name=name)
            self._run_id, self.artifact_uri = run.info.run_id, run.info.artifact_uri
            self._undo.append((f"run {self._run_id}", lambda: client.delete_run(self._run_id)))
            metric = Metric("checked", 1.0, int(time.time() * 1000), 0)
            client.log_batch(self._run_id, [metric], [Param("check", name)], [RunTag("check", name)])
            client.set_terminated(self._run_id)
            self._model_id = client.create_logged_model(experiment_id, name, self._run_id).model_id
            undo = (f"logged model {self._model_id}", lambda: client.delete_logged_model(self._model_id))
            self._undo.append(undo)
            client.finalize_logged_model(self._model_id, LoggedModelStatus.READY)
        return "may make an experiment, a run and a logged model"

    def artifacts(self) -> str:
        """Send a file to the run's artifacts, get it back and delete it."""
        content = os.urandom(_PROBE_BYTES)
        with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder, self._store.errors():
            sent, back = Path(folder, "probe.bin"), Path(folder, "back")
            sent.write_bytes(content)
            back.mkdir()
            place = get_artifact_repository(self.artifact_uri, tracking_uri=self._store.uri)
            self._undo.append(("file probe.bin", lambda: place.delete_artifacts("probe.bin")))
            place.log_artifact(str(sent))
            found = Path(place.download_artifacts("probe.bin", str(back))).read_bytes()
            self._undo.pop()[1]()
        if found != content:
            raise MechdiffError(f"The {len(content)} bytes sent came back as {len(found)} others.")
        return f"{_PROBE_BYTES // 1024} KiB came back as they were sent"

    def registry(self) -> str:
        """Register a version of a model, point an alias at it and take that away."""
        client, name = self._client, self.name
        # A database's registry looks logged models up in MLflow's default store, not in this one.
        at_server = {"source": f"models:/{self._model_id}", "model_id": self._model_id}
        source = at_server if self._store.is_server else {"source": self.artifact_uri}
        with self._store.errors():
            client.create_registered_model(name)
            self._undo.append((f"registered model {name}", lambda: client.delete_registered_model(name)))
            number = client.create_model_version(name, run_id=self._run_id, **source).version
            client.set_model_version_tag(name, number, "check", name)
            client.set_registered_model_alias(name, "checked", number)
            client.delete_registered_model_alias(name, "checked")
        return "may register a model, and set and take away an alias"

    def remove(self) -> list[str]:
        """Delete everything again, the youngest first; what could not be deleted."""
        left = []
        for what, undo in reversed(self._undo):
            try:
                with self._store.errors():
                    undo()
            except MechdiffError as error:
                left.append(f"{what} ({error})")
        if self.artifact_uri and not self._store.is_server and is_local_uri(self.artifact_uri):
            # <root>/<experiment>/<run>/artifacts, of which the root may be new too
            folder = Path(local_file_uri_to_path(self.artifact_uri)).parents[1]
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                folder.parent.rmdir()
        return left
