"""Creating and migrating a SQLite store exactly once, however many processes come first.

MLflow itself creates the tables without a lock: several processes that open a new file together fail, and can
leave it half-created for good.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy
import sqlalchemy.exc
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils as mlflow_db
from mlflow.tracking import MlflowClient

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.locks import file_lock, lock_file
from mechdiff_mlflow.tracking.redaction import redact


@dataclass(frozen=True, slots=True)
class Schema:
    """How far a store's tables are migrated.

    Args:
        found: The migration it is at; None when it has no tables yet.
        head: The one that this MLflow wants.
        known: Whether this MLflow knows `found`.
        now: The database's clock in Unix seconds, None when it is this machine's.
    """

    found: str | None
    head: str
    known: bool
    now: float | None = None


def schema_of(uri: str, shown: str) -> Schema:
    """The state of the store at `uri`, which is only read; `shown` is its URI without secrets.

    Raises:
        MechdiffError: It cannot be opened, or is no store of MLflow.
    """
    head = str(mlflow_db._get_latest_schema_revision())
    if uri.startswith("sqlite"):
        path = sqlite_path(uri)
        try:
            found = _revision(path)
            if found is not None:
                with closing(sqlite3.connect(path)) as database:
                    (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
                if verdict != "ok":
                    raise MechdiffError(f"The store {path} is damaged ({verdict}); restore it from a backup.")
        except sqlite3.Error as error:
            raise MechdiffError(_what_is_wrong(path, str(error))) from error
        return Schema(found, head, _is_known(found))
    with _database_errors(uri, shown):
        engine = mlflow_db.create_sqlalchemy_engine(uri)
        try:
            found = mlflow_db._get_schema_version(engine)
            now = None
            if engine.dialect.name == "postgresql":
                with engine.connect() as connection:
                    clock = sqlalchemy.text("SELECT EXTRACT(EPOCH FROM CURRENT_TIMESTAMP)")
                    now = float(connection.execute(clock).scalar_one())
        finally:
            engine.dispose()
    return Schema(found, head, _is_known(found), now)


def _is_known(revision: str | None) -> bool:
    """Whether this MLflow has that migration."""
    if revision is None:
        return True
    try:
        ScriptDirectory.from_config(mlflow_db._get_alembic_config("")).get_revision(revision)
    except CommandError:
        return False
    return True


def sqlite_path(uri: str) -> Path:
    """The absolute path of the file that a `sqlite:///…` URI names.

    Raises:
        MechdiffError: The URI names no file, has options, or its directory is missing.
    """
    prefix, _, rest = uri.partition(":///")
    if not rest or prefix != "sqlite" or rest == ":memory:":
        raise MechdiffError(f"Tracking URI {uri!r} names no file; write sqlite:///mlflow.db.")
    if "?" in rest:
        raise MechdiffError(f"Tracking URI {uri!r} has options after `?`; leave them out.")
    path = Path(rest).absolute()
    if not path.parent.is_dir():
        raise MechdiffError(f"The directory {path.parent} of the store does not exist; create it first.")
    return path


def open_sqlite(path: Path) -> MlflowClient:
    """A client of the store in `path`, its tables created or brought up to this MLflow's under a lock.

    Before a migration the file is copied to `<name>.before-<revision>`: MLflow migrates some stores unasked.

    Raises:
        MechdiffError: The file is not a usable MLflow database.
    """
    uri = f"sqlite:///{path}"
    try:
        with file_lock(lock_file(uri, "open")):
            revision = _revision(path)
            if revision is not None and revision != mlflow_db._get_latest_schema_revision():
                _migrate(path, revision)
            return MlflowClient(uri)  # which creates the tables
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, CommandError) as error:
        raise MechdiffError(_what_is_wrong(path, str(error))) from error
    except OSError as error:
        raise MechdiffError(
            f"The store {path} cannot be opened for writing ({error.strerror}); check its permissions."
        ) from error


def open_database(uri: str, shown: str) -> MlflowClient:
    """A client of the store in another database than SQLite; `shown` is its URI without secrets.

    Raises:
        MechdiffError: The database cannot be reached, or its driver is not installed.
    """
    with _database_errors(uri, shown), file_lock(lock_file(uri, "open")):
        return MlflowClient(uri)


@contextmanager
def _database_errors(uri: str, shown: str) -> Iterator[None]:
    """Turns what a database's driver raises into one sentence without secrets."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MechdiffError(
            f"The store {shown} needs the Python package {error.name}; install it, or use an MLflow server."
        ) from error
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
        text = redact(" ".join(str(error).split()).replace(uri, shown))[:300]
        raise MechdiffError(f"The store {shown} cannot be opened: {text}.") from error


def _revision(path: Path) -> str | None:
    """Which migration the store is at; None for a file that holds nothing yet."""
    if not path.exists():
        return None
    with closing(sqlite3.connect(path)) as database:
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            return None
        if "alembic_version" not in tables:
            raise sqlite3.OperationalError("no such table: alembic_version")
        row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    if row is None:
        raise sqlite3.OperationalError("no such table: alembic_version is empty")
    return str(row[0])


def _migrate(path: Path, revision: str) -> None:
    copy = path.with_name(f"{path.name}.before-{revision}")
    with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(copy)) as new:
        old.backup(new)
    engine = mlflow_db.create_sqlalchemy_engine_with_retry(f"sqlite:///{path}")
    try:
        mlflow_db._upgrade_db(engine)
    finally:
        engine.dispose()


def _what_is_wrong(path: Path, text: str) -> str:
    if "Can't locate revision" in text:
        return f"The store {path} was made by a newer MLflow; upgrade MLflow or use another store."
    if "file is not a database" in text:
        return f"{path} is not a SQLite database; move it away or name another file in MLFLOW_TRACKING_URI."
    if "already exists" in text or "no such table" in text or "duplicate column" in text:
        return (
            f"The store {path} is half-created, as happens when several programs open a new one at once, or "
            "no MLflow store; move it away, then try again."
        )
    if "readonly" in text or "unable to open" in text:
        return f"The store {path} cannot be opened for writing; check its permissions."
    return f"The store {path} cannot be opened: {' '.join(text.split())[:300]}."
