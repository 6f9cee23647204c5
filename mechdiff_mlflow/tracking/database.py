"""Creating and migrating a SQLite store exactly once, however many processes come first.

MLflow itself creates the tables without a lock: several processes that open a new file together fail, and can
leave it half-created for good.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import sqlalchemy.exc
from mlflow.exceptions import MlflowException
from mlflow.store.db import utils as mlflow_db
from mlflow.tracking import MlflowClient

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.locks import file_lock, lock_file


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


def initialise_sqlite(path: Path, client: MlflowClient) -> None:
    """Create the tables of the store in `path`, or bring older ones up to this MLflow's, under a lock.

    Before a migration the file is copied to `<name>.before-<revision>`.

    Raises:
        MechdiffError: The file is not a usable MLflow database.
    """
    try:
        with file_lock(lock_file(f"sqlite:///{path}", "open")):
            try:
                client.search_experiments(max_results=1)
            except MlflowException as error:
                if "out-of-date database schema" not in str(error):
                    raise
                _migrate(path)
                client.search_experiments(max_results=1)
    except (MlflowException, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error) as error:
        raise MechdiffError(_what_is_wrong(path, str(error))) from error
    except OSError as error:
        raise MechdiffError(
            f"The store {path} cannot be opened for writing ({error.strerror}); check its permissions."
        ) from error


def _migrate(path: Path) -> None:
    engine = mlflow_db.create_sqlalchemy_engine_with_retry(f"sqlite:///{path}")
    try:
        revision = mlflow_db._get_schema_version(engine)
        copy = path.with_name(f"{path.name}.before-{revision}")
        with closing(sqlite3.connect(path)) as old, closing(sqlite3.connect(copy)) as new:
            old.backup(new)
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
            f"The store {path} is half-created, as happens when several programs open a new one at once; "
            "move it away, then try again."
        )
    if "readonly" in text or "unable to open" in text:
        return f"The store {path} cannot be opened for writing; check its permissions."
    return f"The store {path} cannot be opened: {' '.join(text.split())[:300]}."
