"""Creating and migrating a SQLite store exactly once, however many processes come first or are killed.

MLflow itself creates the tables without a lock and commits every statement: several processes that open a new
file together fail, and these or a killed one leave it half-created for good. Here a lock lets one in, and all
that it does is one transaction of SQLite. What others left half-created is made anew while it holds nothing.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import sqlalchemy
import sqlalchemy.exc
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils as mlflow_db
from mlflow.store.db.base_sql_model import Base

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store.file_locks import file_lock, lock_file
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.retries import DirectClient, full_disk

_QUIET_S = 5.0
"""How long a half-created file must lie unchanged before it counts as left: MLflow may be at work on it."""
_BUSY_S = 60.0
_OWN = {"alembic_version": "0", "experiments": "name <> 'Default'", "workspaces": "name <> 'default'"}
"""Tables that MLflow fills itself, and which of their rows are somebody's."""


def schema_of(uri: str, shown: str) -> tuple[str | None, str, bool]:
    """The migration that the store at `uri` is at, the one this MLflow wants, and whether it knows the first.

    The store is only read, and None stands for one without tables; `shown` is its URI without secrets.

    Raises:
        MechdiffError: It cannot be opened, or is no store of MLflow.
    """
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
    else:
        with _database_errors(uri, shown):
            engine = mlflow_db.create_sqlalchemy_engine(uri)
            try:
                found = mlflow_db._get_schema_version(engine)
            finally:
                engine.dispose()
    return found, str(mlflow_db._get_latest_schema_revision()), found is None or _is_known(found)


def _is_known(revision: str) -> bool:
    """Whether this MLflow has that migration."""
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


def open_sqlite(path: Path) -> DirectClient:
    """A client of the store in `path`, its tables created or brought up to this MLflow's under a lock.

    Before a migration the file is copied to `<name>.before-<revision>`: MLflow migrates some stores unasked.

    Raises:
        MechdiffError: The file is not a usable MLflow database.
    """
    uri = f"sqlite:///{path}"
    try:
        with file_lock(lock_file(uri, "open")):
            revision = _revision(path)
            if revision is None:
                _create(path)
            elif revision != mlflow_db._get_latest_schema_revision():
                _migrate(path, revision)
            return DirectClient(uri)
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, CommandError) as error:
        raise MechdiffError(_what_is_wrong(path, str(error))) from error
    except OSError as error:
        if full_disk(error) is not None:
            raise MechdiffError(_what_is_wrong(path, str(error))) from error
        raise MechdiffError(
            f"The store {path} cannot be opened for writing ({error.strerror}); check its permissions."
        ) from error


def open_database(uri: str, shown: str) -> DirectClient:
    """A client of the store in another database than SQLite; `shown` is its URI without secrets.

    Raises:
        MechdiffError: The database cannot be reached, or its driver is not installed.
    """
    with _database_errors(uri, shown), file_lock(lock_file(uri, "open")):
        return DirectClient(uri)


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
    """The migration that a store is at; None for one to be made, as it holds nothing that would be lost."""
    if not path.exists():
        return None
    with closing(sqlite3.connect(path)) as database:
        found = _revision_in(database)
        is_made = found is not None and (
            found == mlflow_db._get_latest_schema_revision() or not _is_known(found)
        )
        if not is_made and _holds_nothing(database):
            return None
    if found is None:
        raise sqlite3.OperationalError("no such table: alembic_version")
    return found


def _revision_in(database: sqlite3.Connection) -> str | None:
    if "alembic_version" not in _tables(database):
        return None
    row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


def _tables(database: sqlite3.Connection) -> list[str]:
    found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return [name for (name,) in found if not name.startswith("sqlite_")]


def _holds_nothing(database: sqlite3.Connection) -> bool:
    """Whether there are only tables of MLflow's, and in them only what it puts there itself."""
    known = {*Base.metadata.tables, *mlflow_db.InitialBase.metadata.tables, *_OWN}
    for table in _tables(database):
        rows = f'SELECT 1 FROM "{table}" WHERE {_OWN.get(table, "1")} LIMIT 1'
        if table.removeprefix("_alembic_tmp_") not in known or database.execute(rows).fetchone():
            return False
    return True


def _create(path: Path) -> None:
    """Make the tables of a store that holds nothing, from the start."""
    files = [path, path.with_name(f"{path.name}-journal")]
    while path.exists() and path.stat().st_size:
        age_s = time.time() - max(file.stat().st_mtime for file in files if file.exists())
        if not 0 <= age_s < _QUIET_S:
            break
        time.sleep(_QUIET_S / 20)
    with _one_transaction(path) as database:
        if _revision_in(database) == mlflow_db._get_latest_schema_revision():
            return  # who was at work on it has finished
        if not _holds_nothing(database):
            raise sqlite3.OperationalError("no such table: alembic_version")
        for table in _tables(database):
            database.execute(f'DROP TABLE "{table}"')
        engine = _engine(database)
        mlflow_db.InitialBase.metadata.create_all(engine)
        mlflow_db._upgrade_db(engine)


def _migrate(path: Path, revision: str) -> None:
    """Bring a store up to this MLflow's tables, after a copy."""
    if not _is_known(revision):
        raise CommandError(f"Can't locate revision {revision}")
    copy = path.with_name(f"{path.name}.before-{revision}")
    with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(copy)) as new:
        old.backup(new)
    with _one_transaction(path) as database:
        mlflow_db._upgrade_db(_engine(database))


_PLACES = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}
"""Where MLflow keeps absolute places of artifacts."""


def rebase(path: Path, old: Path, place_tag: str) -> None:
    """Move the places of artifacts that the store `path` has below the folder `old` to its own folder.

    Only the database is written, whole or not at all; `place_tag` is the experiments' tag with its path.
    """
    new = path.parent
    with file_lock(lock_file(f"sqlite:///{path}", "open")), _one_transaction(path) as database:
        for before, after in ((old.as_uri(), new.as_uri()), (str(old), str(new))):
            for table, columns in _PLACES.items():
                for column in columns:
                    database.execute(
                        f"UPDATE {table} SET {column} = :after || substr({column}, length(:before) + 1) "
                        f"WHERE {column} = :before "
                        f"OR substr({column}, 1, length(:before) + 1) = :before || '/'",
                        {"before": before, "after": after},
                    )
        tags = database.execute("SELECT DISTINCT value FROM experiment_tags WHERE key = ?", (place_tag,))
        for noted in [value for (value,) in tags if Path(value).parent == old]:
            change = "UPDATE experiment_tags SET value = ? WHERE key = ? AND value = ?"
            database.execute(change, (str(path), place_tag, noted))


class _Uncommitted(sqlite3.Connection):
    """A connection on which a migration's own commits and rollbacks do nothing."""

    def commit(self) -> None:
        """Do nothing."""

    def rollback(self) -> None:
        """Do nothing."""


@contextmanager
def _one_transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """Everything in here happens at its end, or, if that raises or the process dies, not at all."""
    with closing(sqlite3.connect(path, _BUSY_S, isolation_level=None, factory=_Uncommitted)) as database:
        database.execute("BEGIN IMMEDIATE")
        yield database
        database.execute("COMMIT")


def _engine(database: sqlite3.Connection) -> sqlalchemy.Engine:
    """An engine all of whose connections are `database`: alembic opens one of its own."""
    return sqlalchemy.create_engine("sqlite://", creator=lambda: database, poolclass=sqlalchemy.StaticPool)


def _what_is_wrong(path: Path, text: str) -> str:
    if (reason := full_disk(text)) is not None:
        return f"The store {path} could not be opened: {reason}; make room on its disk, then run this again."
    if "Can't locate revision" in text:
        return f"The store {path} was made by a newer MLflow; upgrade MLflow or use another store."
    if "file is not a database" in text:
        return f"{path} is not a SQLite database; move it away or name another file in MLFLOW_TRACKING_URI."
    if "already exists" in text or "no such table" in text or "duplicate column" in text:
        return (
            f"{path} is no MLflow store, or one whose tables another program left half-made although it "
            f"holds data; restore it from a backup (such as {path.name}.before-…), or name another file."
        )
    if "readonly" in text or "unable to open" in text:
        return f"The store {path} cannot be opened for writing; check its permissions."
    return f"The store {path} cannot be opened: {' '.join(text.split())[:300]}."
