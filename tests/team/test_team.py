"""Two people, two processes, one server with auth on PostgreSQL."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner, Result
from mlflow.server.auth.client import AuthServiceClient
from mlflow.tracking import MlflowClient
from team.postgres import Postgres, free_port, postgres
from team.server import Server

from mechdiff_mlflow.cli import cli

ROOT = Path(__file__).parents[2]
CHAMPION = "toy-L3-attn_out@champion"


class Person:
    """Somebody with a folder, a cache and credentials of their own."""

    def __init__(self, server: Server, name: str, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")
        }
        self.environment |= {"MECHDIFF_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        self.environment |= {"OMP_NUM_THREADS": "1", **server.login(name)}

    def start(self, *words: str) -> subprocess.Popen[str]:
        self.folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, "-m", "mechdiff_mlflow", *words],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


class Promoted(NamedTuple):
    """What ann promoted."""

    run: str
    output: str


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output + errors


@pytest.fixture(scope="session")
def promoted(team: Server, toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Promoted:
    """Ann runs the main job and promotes its map, her password in the address."""
    ann = Person(team, "ann", tmp_path_factory.mktemp("ann"))
    main_job = ("run", "--pair", str(toy), "--layer", "3", "--alpha", "1", "--promote", "--force")
    output = finish(ann.start(*main_job, "--tracking-uri", team.uri_of("ann")))
    client = _client_of(team, "ann")
    experiment = client.get_experiment_by_name("toy")
    runs = client.search_runs([experiment.experiment_id], "tags.`mechdiff.kind` = 'fit'")
    return Promoted(runs[0].info.run_id, output)


def _client_of(team: Server, name: str) -> MlflowClient:
    return MlflowClient(team.uri_of(name))


@pytest.fixture
def as_bob(team: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in team.login("bob").items():
        monkeypatch.setenv(name, value)


def mechdiff(*words: str, code: int) -> Result:
    result = CliRunner().invoke(cli, list(words), prog_name="mechdiff")
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def sentence(*words: str) -> str:
    """What a failing command says; exactly one line."""
    said = mechdiff(*words, code=1).output
    assert said.startswith("Error: ")
    assert len(said.splitlines()) == 1
    return said


def test_the_binaries_that_pip_installs_make_a_postgresql() -> None:
    with postgres(of_wheel=True) as server, closing(server.connect()) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT version()")
        assert "PostgreSQL" in cursor.fetchone()[0]


def test_two_people_promote_and_fetch_at_once(team: Server, promoted: Promoted, tmp_path: Path) -> None:
    """Ann moves another alias while bob, who cannot see the server's folder, fetches what she promoted."""
    ann, bob = Person(team, "ann", tmp_path / "ann"), Person(team, "bob", tmp_path / "bob")
    promoting = ann.start("promote", promoted.run, "--alias", "staging")
    fetching = bob.start("fetch", CHAMPION, "-o", "map.pt")
    said, _ = finish(fetching), finish(promoting)

    fetched = hashlib.sha256((tmp_path / "bob" / "map.pt").read_bytes()).hexdigest()
    model = _client_of(team, "ann").get_registered_model("toy-L3-attn_out")
    version = _client_of(team, "ann").get_model_version(model.name, model.aliases["champion"])
    on_server = {hashlib.sha256(f.read_bytes()).hexdigest() for f in team.folder.rglob("map.pt")}
    assert fetched == version.tags["mechdiff.sha256"]
    assert fetched in on_server
    assert fetched in said
    assert model.aliases == {"champion": "1", "staging": "1"}


def test_runs_and_artifacts_are_on_the_server(team: Server, promoted: Promoted, database: Postgres) -> None:
    with closing(database.connect("mlflow")) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT status, artifact_uri FROM runs WHERE run_uuid = %s", (promoted.run,))
        status, place = cursor.fetchone()
    assert status == "FINISHED"
    assert place.startswith("mlflow-artifacts:")


@pytest.mark.usefixtures("as_bob")
def test_who_may_only_read_cannot_move_the_alias(team: Server, promoted: Promoted) -> None:
    said = sentence("promote", promoted.run, "--alias", "champion2")
    assert "User 'bob' has no permission for this" in said
    assert "ask its administrator for EDIT" in said
    assert "champion2" not in _client_of(team, "ann").get_registered_model("toy-L3-attn_out").aliases


@pytest.mark.usefixtures("as_bob")
def test_who_may_only_read_cannot_log_into_the_experiment(promoted: Promoted, toy: Path) -> None:
    said = sentence("fit", "--pair", str(toy), "--layer", "3", "--alpha", "1")
    assert "User 'bob' has no permission for this" in said


@pytest.mark.usefixtures("as_bob")
def test_edit_on_the_map_is_what_moving_its_alias_takes(team: Server, promoted: Promoted) -> None:
    ann = AuthServiceClient(team.uri_of("ann"))  # who made the map may grant others something on it
    right = ("bob", "registered_model", "toy-L3-attn_out")
    ann.grant_user_permission(*right, "EDIT")
    try:
        mechdiff("promote", promoted.run, "--alias", "of-bob", code=0)
    finally:
        ann.revoke_user_permission(*right)
    assert _client_of(team, "ann").get_registered_model("toy-L3-attn_out").aliases["of-bob"] == "1"
    assert "no permission" in sentence("promote", promoted.run, "--alias", "of-bob-2")


@pytest.mark.usefixtures("as_bob")
def test_a_wrong_password_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-this-one")
    said = sentence("fetch", CHAMPION, "-o", "map.pt")
    assert "does not know user 'bob' with that password" in said
    assert "MLFLOW_TRACKING_USERNAME" in said
    assert "not-this-one" not in said


def test_nobody_is_asked_who_they_are(team: Server) -> None:
    said = sentence("maps", "--tracking-uri", team.uri)
    assert "wants to know who you are (HTTP 401); set MLFLOW_TRACKING_USERNAME" in said


@pytest.mark.usefixtures("as_bob")
def test_a_server_that_is_down_is_named_within_seconds() -> None:
    start = time.monotonic()
    said = sentence("maps", "--tracking-uri", f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - start < 10
    assert "No tracking server answers at" in said


def test_no_secret_is_printed_logged_or_stored(team: Server, promoted: Promoted, database: Postgres) -> None:
    """Ann's password is nowhere in what her commands printed, in the database, or in the artifacts."""
    secrets = [team.passwords["ann"], team.passwords["admin"], database.password]
    stored = [file.read_bytes() for file in (team.folder / "artifacts").rglob("*") if file.is_file()]
    assert len(stored) > 5
    assert not [s for s in secrets if s in promoted.output or any(s.encode() in file for file in stored)]
    with closing(database.connect("mlflow")) as connection:
        assert _found(connection.cursor(), promoted.run) > 0  # what the search finds if it is there
        assert not [s for s in secrets if _found(connection.cursor(), s)]


def test_no_secret_of_a_database_is_printed_logged_or_stored(
    database: Postgres, toy: Path, here: Path
) -> None:
    uri = database.create("direct")
    said = mechdiff("fit", "--pair", str(toy), "--layer", "3", "--alpha", "1", "--tracking-uri", uri, code=0)
    said.output.index(f"postgresql+psycopg2://***@127.0.0.1:{database.port}/direct")
    assert database.password not in said.output
    stored = [file.read_bytes() for file in here.rglob("*") if file.is_file()]
    assert any(b"L3/attn_out" in file for file in stored)
    assert not any(database.password.encode() in file for file in stored)
    with closing(database.connect("direct")) as connection:
        assert _found(connection.cursor(), "L3/attn_out") > 0
        assert _found(connection.cursor(), database.password) == 0


def _found(cursor: object, text: str) -> int:
    """In how many tables a row holds `text`."""
    cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
    tables = [name for (name,) in cursor.fetchall() if re.fullmatch(r"\w+", name)]
    hits = 0
    for table in tables:
        cursor.execute(f"SELECT count(*) FROM {table} AS t WHERE t::text LIKE %s", (f"%{text}%",))
        hits += cursor.fetchone()[0] > 0
    return hits
