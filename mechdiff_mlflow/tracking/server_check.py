"""What is wrong with a tracking server or store, check by check, and what to do about it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from urllib.parse import parse_qs, urlsplit

import mlflow

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking import database, http_check
from mechdiff_mlflow.tracking.check_result import Finding, Level
from mechdiff_mlflow.tracking.redaction import redact
from mechdiff_mlflow.tracking.scratch import Scratch
from mechdiff_mlflow.tracking.store import Store, open_store, prepare_process, uri_of

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
    yield from _round_trips(open_store(uri))


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
