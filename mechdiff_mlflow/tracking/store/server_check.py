"""What is wrong with a tracking server or store, check by check, and what to do about it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, urlsplit

import mlflow
from mlflow.entities import Experiment, ViewType
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store import database, http_check
from mechdiff_mlflow.tracking.store.check_result import Finding, Level
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.scratch import Scratch
from mechdiff_mlflow.tracking.store.store import PLACE_TAG, Store, open_store, prepare_process, uri_of

_MAX_EXPERIMENTS = 50_000
_PROXY = "mlflow server --serve-artifacts --artifacts-destination PLACE, then new experiments"


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
    found = list(http_check.check_http(uri))
    yield from found
    if len(found) == 1:
        return
    remedy = "on the server's machine: mechdiff server-check --tracking-uri DATABASE"
    yield Finding("store migrations", Level.SKIP, "cannot be seen through HTTP", remedy)
    if any(one.check == "login" and one.level is Level.FAIL for one in found):
        yield Finding("permissions, artifacts, aliases", Level.SKIP, "not tried before the login")
    else:
        yield from _round_trips(open_store(uri))


def _database(uri: str) -> Iterator[Finding]:
    try:
        schema = database.schema_of(uri, redact(uri))
    except MechdiffError as error:
        yield Finding("reachable", Level.FAIL, str(error))
        return
    if schema.found is None:
        seen = f"{redact(uri)} holds no tables of MLflow yet"
        yield Finding(
            "reachable", Level.WARN, seen, "the first command that logs makes them, e.g. mechdiff run"
        )
        return
    yield Finding("reachable", Level.OK, f"{redact(uri)} opens")
    if schema.found != schema.head:
        yield _outdated(schema, redact(uri))
        return
    yield Finding("store migrations", Level.OK, f"at {schema.head}, as MLflow {mlflow.__version__} wants it")
    if not uri.startswith("sqlite"):
        yield Finding(
            "authentication",
            Level.WARN,
            "whoever has the database's password may do everything",
            "for more than one person: an MLflow server with --app-name basic-auth",
        )
        yield _database_encryption(uri)
    if schema.now is not None:
        yield http_check.skew(time.time() - schema.now)
    store = open_store(uri)
    if store.sqlite_path is not None:
        yield _places(store)
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
    moved = _moved(store)
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


def _moved(store: Store) -> dict[Path, list[Experiment]]:
    """The experiments whose artifacts are where a store lay that was copied or moved, by that folder."""
    found: dict[Path, list[Experiment]] = {}
    for experiment in _experiments(store):
        if (old := store.moved_from(experiment)) is not None:
            found.setdefault(old, []).append(experiment)
    return found


def _experiments(store: Store) -> list[Experiment]:
    with store.errors():
        return list(store.client.search_experiments(ViewType.ALL, max_results=_MAX_EXPERIMENTS))


def _places(store: Store) -> Finding:
    """Whether a SQLite store's artifacts are in its folder."""
    assert store.sqlite_path is not None
    folder = store.sqlite_path.parent
    if moved := _moved(store):
        seen = "; ".join(
            f"of {', '.join(e.name for e in experiments[:5])}{' …' * (len(experiments) > 5)} in {old}"
            for old, experiments in moved.items()
        )
        remedy = store.command("server-check", "--rebase")
        return Finding("artifact places", Level.FAIL, f"the store was copied or moved: {seen}", remedy)
    outside = [
        f"{e.name} in {e.artifact_location}"
        for e in _experiments(store)
        if e.name != "Default"
        and not (
            is_local_uri(e.artifact_location)
            and Path(local_file_uri_to_path(e.artifact_location)).resolve().is_relative_to(folder.resolve())
        )
    ]
    if outside:
        seen = f"outside {folder}: {'; '.join(outside[:5])}{' …' * (len(outside) > 5)}"
        return Finding("artifact places", Level.WARN, seen, "copy and back them up beside the store")
    return Finding("artifact places", Level.OK, f"all in {folder}")


def _outdated(schema: database.Schema, shown: str) -> Finding:
    if not schema.known:
        seen = f"at {schema.found}, which MLflow {mlflow.__version__} does not know: a newer one made it"
        return Finding("store migrations", Level.FAIL, seen, "pip install --upgrade mlflow")
    seen = f"at {schema.found}, MLflow {mlflow.__version__} wants {schema.head}"
    remedy = f"copy the database, then: mlflow db upgrade {shlex.quote(shown)}"
    return Finding("store migrations", Level.FAIL, seen, remedy)


def _database_encryption(uri: str) -> Finding:
    parts = urlsplit(uri)
    if http_check.is_loopback(parts.hostname or "localhost"):
        return Finding("encryption", Level.OK, "the connection does not leave this machine")
    mode = parse_qs(parts.query).get("sslmode", ["prefer"])[0]
    if mode in ("require", "verify-ca", "verify-full"):
        return Finding("encryption", Level.OK, f"sslmode={mode}")
    remedy = "append ?sslmode=verify-full (PostgreSQL) or your driver's equivalent to the URI"
    return Finding("encryption", Level.WARN, f"the URI does not insist on TLS to {parts.hostname}", remedy)


def _round_trips(store: Store) -> list[Finding]:
    with store.patience.one_attempt():  # what does not answer at once is a finding
        return list(_tries(store))


def _tries(store: Store) -> Iterator[Finding]:
    scratch = Scratch(store)
    mine = "ask the server's administrator" if store.is_server else "check the permissions of the store"
    try:
        made = _try("permissions", scratch.runs, mine)
        yield made
        if made.level is Level.OK:
            yield _artifacts(store, scratch)
            registered = _try("registry", scratch.registry, mine)
            yield registered
            if registered.level is Level.OK:
                yield _try("aliases", scratch.aliases, "upgrade the server: aliases are MLflow 2.3 and later")
            else:
                yield Finding("aliases", Level.SKIP, "no version to point at")
        else:
            yield Finding("artifacts, registry, aliases", Level.SKIP, "no run to try them with")
    finally:
        left = scratch.remove()
    if left:
        yield Finding("cleaned up", Level.WARN, f"still there: {'; '.join(left)}", "have them deleted")
    elif made.level is Level.OK:
        seen = f"{scratch.name} is deleted; `mlflow gc` removes its last traces"
        yield Finding("cleaned up", Level.OK, seen)


def _artifacts(store: Store, scratch: Scratch) -> Finding:
    name = "artifact proxy" if store.is_server else "artifacts"
    if store.is_server and scratch.artifact_scheme == "file":
        # Trying it would write here and prove nothing.
        return Finding(
            name,
            Level.FAIL,
            f"off: clients are to write to {scratch.artifact_place}, a path of the server's machine",
            _PROXY,
        )
    remedy = "check --artifacts-destination, and the body size that the reverse proxy lets pass"
    found = _try(name, scratch.artifacts, remedy if store.is_server else "check the folder's permissions")
    if found.level is Level.OK and store.is_server and scratch.artifact_scheme != "mlflow-artifacts":
        place = f"{scratch.artifact_scheme}://"
        seen = f"off: clients reach {place} themselves, and need its credentials; {found.seen}"
        return Finding(name, Level.WARN, seen, _PROXY)
    if found.level is Level.OK and not store.is_server and store.sqlite_path is None:
        seen = f"in {PurePosixPath(scratch.artifact_place).parent.parent}, which only this machine sees"
        return Finding(name, Level.WARN, seen, "for more than one person: an MLflow server on this database")
    return found


def _try(check: str, attempt: Callable[[], str], remedy: str) -> Finding:
    try:
        return Finding(check, Level.OK, attempt())
    except MechdiffError as error:
        return Finding(check, Level.FAIL, str(error), remedy)
