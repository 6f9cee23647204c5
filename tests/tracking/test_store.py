import http.server
import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import requests
import sqlalchemy
from alembic import command
from alembic.script import ScriptDirectory
from hypothesis import given
from hypothesis import strategies as st
from mlflow.store.db import utils as mlflow_db
from mlflow.tracking import MlflowClient

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.retries import Retries
from mechdiff_mlflow.tracking.store.store import Store, StoreUnreachable, open_store

SECRET = st.text(alphabet="abcdefghijklmnopqrstuvwxyzABC123!$~._-", min_size=6, max_size=12)


@given(SECRET, SECRET)
def test_redacted_uris_hold_no_secret(password: str, token: str) -> None:
    password, token = f"pw{password}wp", f"tk{token}kt"
    shown = redact(
        f"postgresql+psycopg2://ann:{password}@db.example:5432/x?sslmode=require&api_token={token}"
    )
    assert password not in shown
    assert token not in shown
    assert "db.example:5432/x?sslmode=require" in shown


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://ann:se/cret@db.example/x",  # which SQLAlchemy takes
        "http://ann:se@cret@host:5000",  # which requests takes
        "postgresql://db.example/x?user=ann&password=se%2Fcret",
        "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3Dse%2Fcret",
        "could not connect to 'mysql://ann:se/cret@db/x', retrying mysql://ann:cret@db/y?ssl=1",
    ],
)
def test_unusual_secrets_are_redacted_too(uri: str) -> None:
    assert "cret" not in redact(uri)


@pytest.mark.parametrize(
    "uri", ["sqlite:////a/b@c.db", "http://localhost:5000/x", "./mlruns", "models:/x@champion at http://h:50"]
)
def test_uris_without_secrets_stay_as_they_are(uri: str) -> None:
    assert redact(uri) == uri


def test_the_store_is_in_the_working_directory_unless_told(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    assert open_store().uri == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_the_environment_names_the_store(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(empty_database, tmp_path / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert open_store().sqlite_path == tmp_path / "other.db"


def test_opening_sets_the_switches_but_the_users_win(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "9")
    open_store(store.uri)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "9"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("./mlruns", "a directory or of an unknown kind"),
        ("file:///tmp/mlruns", "a directory or of an unknown kind"),
        ("sqlite:///no/such/dir/x.db", "does not exist; create it first"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///x.db?mode=ro", "has options"),
    ],
)
def test_unusable_uris_say_what_to_write(uri: str, words: str) -> None:
    with pytest.raises(MechdiffError, match=words):
        open_store(uri)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("not a database, but long enough to have a header " * 9)
    with pytest.raises(MechdiffError, match="is not a SQLite database; move it away"):
        open_store("sqlite:///x.db")


def test_an_absent_server_fails_within_seconds() -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: nothing answers here
        port = taken.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(MechdiffError) as caught:
            open_store(f"http://ann:secret@127.0.0.1:{port}")
    assert time.monotonic() - start < 10
    assert f"mlflow server --port {port}" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@contextmanager
def _answering(status: int, body: bytes) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, b"{}", "wants to know who you are"),
        (404, b"<html>", r"\(HTTP 404\) is not an MLflow tracking server"),
        (200, b"<html>", r"\(HTTP 200\) is not an MLflow tracking server"),
    ],
)
def test_servers_of_other_kinds_are_told_apart(status: int, body: bytes, words: str) -> None:
    with _answering(status, body) as uri, pytest.raises(MechdiffError, match=words):
        open_store(uri)


def test_artifacts_lie_beside_the_database_whatever_the_directory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    experiment = store.client.get_experiment(store.experiment("a pair/π"))
    assert experiment.artifact_location.startswith((tmp_path / "store" / "mlartifacts" / "a-pair").as_uri())
    assert store.experiment("a pair/π") == experiment.experiment_id


def test_directories_may_have_blanks_and_umlauts(tmp_path: Path, empty_database: Path) -> None:
    folder = tmp_path / "größe 1"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    store = open_store(f"sqlite:///{folder / 'mlflow.db'}")
    run = store.client.create_run(store.experiment("x"))
    store.client.log_text(run.info.run_id, "hello", "a.txt")
    assert [f.read_text() for f in folder.rglob("a.txt")] == ["hello"]


def test_experiments_with_the_same_slug_keep_apart(store: Store) -> None:
    places = {
        store.client.get_experiment(store.experiment(n)).artifact_location for n in ("a/b", "a b", "a-b")
    }
    assert len(places) == 3


@pytest.mark.parametrize("name", ["Default", "", " "])
def test_the_default_experiment_is_not_used(store: Store, name: str) -> None:
    with pytest.raises(MechdiffError, match="name another with --experiment"):
        store.experiment(name)


def test_a_deleted_experiment_says_how_to_restore_it(store: Store) -> None:
    experiment_id = store.experiment("gone")
    store.client.delete_experiment(experiment_id)
    with pytest.raises(MechdiffError, match=f"restore -x {experiment_id}"):
        store.experiment("gone")


def test_an_unknown_experiment_lists_the_known(store: Store) -> None:
    store.experiment("here")
    with pytest.raises(MechdiffError, match=r"no experiment 'there' .* it has here"):
        store.experiment_id("there")


def _touch(uri: str, start: "multiprocessing.Event", results: "multiprocessing.Queue[str]") -> None:  # type: ignore[valid-type]
    start.wait()
    try:
        results.put(open_store(uri).experiment("shared"))
    except BaseException as error:
        results.put(repr(error))


def test_six_processes_may_open_a_new_store_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    uri = f"sqlite:///{tmp_path / 'new.db'}"
    processes = [context.Process(target=_touch, args=(uri, start, results)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert found == ["1"] * 6


def _alembic(path: Path) -> tuple[object, ScriptDirectory]:
    config = mlflow_db._get_alembic_config(f"sqlite:///{path}")
    return config, ScriptDirectory.from_config(config)


def test_an_older_store_is_migrated_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    config, scripts = _alembic(path)
    head = scripts.get_current_head()
    assert head is not None
    before = scripts.get_revision(head).down_revision
    engine = mlflow_db.create_sqlalchemy_engine_with_retry(f"sqlite:///{path}")
    mlflow_db.InitialBase.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection  # type: ignore[attr-defined]
        command.upgrade(config, before)  # type: ignore[arg-type]
        kept = "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (1, 'kept', 'active')"
        connection.execute(sqlalchemy.text(kept))
    engine.dispose()

    open_store(f"sqlite:///{path}").experiment_id("kept")
    assert _revision(path) == head
    assert _revision(tmp_path / f"old.db.before-{before}") == before
    open_store(f"sqlite:///{path}")
    assert len(list(tmp_path.glob("old.db.before-*"))) == 1


def _revision(path: Path) -> str:
    with closing(sqlite3.connect(path)) as database:
        return str(database.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def test_a_store_from_the_future_is_not_touched(tmp_path: Path, empty_database: Path) -> None:
    path = tmp_path / "future.db"
    shutil.copy(empty_database, path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        database.commit()
    with pytest.raises(MechdiffError, match="was made by a newer MLflow"):
        open_store(f"sqlite:///{path}")


def test_a_half_created_store_that_holds_a_run_is_not_touched(tmp_path: Path, empty_database: Path) -> None:
    path = tmp_path / "half.db"
    shutil.copy(empty_database, path)
    MlflowClient(f"sqlite:///{path}").create_run("0")
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE alembic_version")
        database.commit()
    before = path.read_bytes()
    with pytest.raises(MechdiffError, match=r"although it holds data; restore it from a backup"):
        open_store(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_tables_of_another_program_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE experiments (name TEXT)")
        database.execute("CREATE TABLE of_mine (x)")
        database.commit()
    before = path.read_bytes()
    with pytest.raises(MechdiffError, match="is no MLflow store"):
        open_store(f"sqlite:///{path}")
    assert path.read_bytes() == before


def _dies(make: Callable[[str], object], uri: str, at: int) -> None:
    """`make(uri)` in this process, killed before its SQL statement number `at`."""
    seen = itertools.count()

    def count(*_: object) -> None:
        if next(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", count)
    make(uri)


@pytest.mark.parametrize(
    ("make", "at"), [(open_store, 500), (open_store, 1500), (MlflowClient, 40), (MlflowClient, 1000)]
)
def test_a_store_whose_making_was_killed_is_made_anew(
    tmp_path: Path, empty_database: Path, make: Callable[[str], object], at: int
) -> None:
    path = tmp_path / "new.db"
    uri = f"sqlite:///{path}"
    process = multiprocessing.get_context("fork").Process(target=_dies, args=(make, uri, at))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    for file in tmp_path.glob("new.db*"):
        os.utime(file, (1e9, 1e9))  # long ago: nobody is at work on it
    store = open_store(uri)
    store.client.create_run(store.experiment("x"))
    with closing(sqlite3.connect(path)) as made, closing(sqlite3.connect(empty_database)) as wanted:
        schema = "SELECT type, name FROM sqlite_master ORDER BY 1, 2"
        assert made.execute(schema).fetchall() == wanted.execute(schema).fetchall()
    assert not list(tmp_path.glob("*.before-*"))


def test_a_store_that_another_program_is_making_is_left_to_it(tmp_path: Path, empty_database: Path) -> None:
    path = tmp_path / "new.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    finishing = threading.Timer(1.0, lambda: shutil.copy(empty_database, path))
    finishing.start()
    start = time.monotonic()
    open_store(f"sqlite:///{path}")
    assert time.monotonic() - start >= 1.0
    finishing.join()


def test_a_directory_without_write_permission_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(MechdiffError, match="cannot be opened for writing"):
        open_store(f"sqlite:///{folder / 'mlflow.db'}")


def test_a_server_that_goes_away_is_asked_again_but_not_for_ever(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run fails with one sentence; ending it costs one attempt, not another round of waiting."""
    attempts: list[float] = []
    with _answering(200, b'{"run": {"info": {"run_id": "r", "experiment_id": "1"}, "data": {}}}') as uri:
        gone = Store(uri, MlflowClient(uri), retries=Retries(1.0))

    def refuse(*_: object, **__: object) -> None:
        attempts.append(time.monotonic())
        raise requests.ConnectionError("refused")

    before = time.monotonic()
    with pytest.raises(StoreUnreachable, match="stopped answering; start it"), gone.errors():
        gone.client.get_run("r")
    assert time.monotonic() - before >= 1.0
    monkeypatch.setattr(store.client._client, "set_terminated", refuse)
    with pytest.raises(StoreUnreachable), Tracker(store, "demo").run("run", "r"), gone.errors():
        gone.client.get_run("r")
    assert len(attempts) == 1
