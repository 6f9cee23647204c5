"""What `mechdiff server-check` says of good and bad servers and stores."""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from click.testing import CliRunner
from mlflow.entities import ViewType
from mlflow.store.db import utils as mlflow_db
from mlflow.tracking import MlflowClient
from team.postgres import Postgres, free_port
from team.server import NAME, Server, serve
from team.tls_proxy import tls_proxy

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.tracking.store import server_check
from mechdiff_mlflow.tracking.store.server_check import PREFIX, Finding, Level, check_store
from mechdiff_mlflow.tracking.store.store import open_store


@pytest.fixture(scope="session")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server without auth whose clients are to write artifacts themselves."""
    folder = tmp_path_factory.mktemp("careless")
    words = [
        "--no-serve-artifacts",
        "--allowed-hosts",
        "*",
        "--backend-store-uri",
        f"sqlite:///{folder}/x.db",
    ]
    with serve(folder, words, {}) as uri:
        yield uri


@pytest.fixture
def as_ann(team: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in team.login("ann").items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loopback address gets a name, as a server elsewhere has one."""
    original = socket.getaddrinfo

    def look_up(host: str, *rest: object, **more: object) -> object:
        return original("127.0.0.1" if host == NAME else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def checked(uri: str | None = None) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_store(uri)}


def failed(findings: dict[str, Finding]) -> list[str]:
    return [check for check, finding in findings.items() if finding.level is Level.FAIL]


@pytest.mark.usefixtures("as_ann")
def test_a_good_server_passes_and_is_left_as_it_was(team: Server, here: Path) -> None:
    before = {file for file in (team.folder / "artifacts").rglob("*") if file.is_file()}
    found = checked()
    assert failed(found) == []
    assert found.keys() == {
        *("reachable", "login", "version", "authentication", "encryption", "store migrations"),
        *("permissions", "artifact proxy", "registry", "cleaned up"),
    }
    passed = {check for check, finding in found.items() if finding.level is Level.OK}
    assert passed == found.keys() - {"store migrations"}
    assert found["store migrations"].level is Level.SKIP
    assert "ann" in found["login"].seen
    assert all(finding.remedy for finding in found.values() if finding.level in (Level.WARN, Level.FAIL))

    client = MlflowClient(team.uri_of("ann"))
    assert not [e for e in client.search_experiments(ViewType.ACTIVE_ONLY) if e.name.startswith(PREFIX)]
    assert not [m for m in client.search_registered_models() if m.name.startswith(PREFIX)]
    assert {file for file in (team.folder / "artifacts").rglob("*") if file.is_file()} == before
    assert not list(here.iterdir())


@pytest.mark.usefixtures("as_ann")
def test_the_table_and_the_json_say_the_same_without_secrets(team: Server) -> None:
    table = CliRunner().invoke(cli, ["server-check"])
    found = CliRunner().invoke(cli, ["server-check", "--json", "--tracking-uri", team.uri_of("ann")])
    assert (table.exit_code, found.exit_code) == (0, 0), table.output + found.output
    report = json.loads(found.output)
    assert report["ok"] is True
    assert report["uri"] == team.uri.replace("://", "://***@")
    assert [line.split()[0].lower() for line in table.output.splitlines() if "→" not in line] == [
        check["level"] for check in report["checks"]
    ]
    assert team.passwords["ann"] not in table.output + found.output


def test_a_server_without_auth_or_proxy_is_told_off(careless: str, here: Path) -> None:
    found = checked(careless)
    assert failed(found) == ["artifact proxy"]
    assert "off: clients are to write to" in found["artifact proxy"].seen
    assert "--artifacts-destination" in found["artifact proxy"].remedy
    assert found["authentication"].level is Level.WARN  # on loopback it is one person's own
    assert not list(here.iterdir()), "nothing is written where the server says"


@pytest.mark.usefixtures("by_name")
def test_a_server_elsewhere_without_auth_fails(careless: str) -> None:
    uri = careless.replace("127.0.0.1", NAME)
    found = checked(uri)
    assert failed(found) == ["authentication", "artifact proxy"]
    assert f"anybody who reaches {NAME} may" in found["authentication"].seen
    assert "--app-name basic-auth" in found["authentication"].remedy
    result = CliRunner().invoke(cli, ["server-check", "--tracking-uri", uri])
    assert result.exit_code == 1
    assert "FAIL  authentication" in result.output
    assert f"Error: {uri} fails authentication, artifact proxy" in result.output


@pytest.mark.usefixtures("by_name", "as_ann")
def test_a_password_may_not_cross_the_network_in_the_clear(careless: str) -> None:
    found = checked(careless.replace("127.0.0.1", NAME))
    assert "encryption" in failed(found)
    assert "readable" in found["encryption"].seen


@pytest.mark.usefixtures("by_name", "as_ann")
def test_a_server_behind_tls_passes_when_its_certificate_is_trusted(
    team: Server, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tls_proxy(team.uri, NAME, tmp_path_factory.mktemp("tls")) as (port, certificate):
        uri = f"https://{NAME}:{port}"
        strange = checked(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
        found = checked(uri)
    assert failed(strange) == list(strange) == ["reachable"]
    assert "is not trusted" in strange["reachable"].seen
    assert failed(found) == []
    assert found["encryption"].seen == "https"
    assert found["artifact proxy"].level is Level.OK


@pytest.mark.usefixtures("as_ann")
def test_wrong_credentials_fail_and_the_rest_is_still_looked_at(
    team: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-this-one")
    found = checked()
    assert failed(found) == ["login"]
    assert "user 'ann' is refused (HTTP 401)" in found["login"].seen
    assert "MLFLOW_TRACKING_USERNAME" in found["login"].remedy
    assert found["authentication"].level is Level.OK
    assert not [finding for finding in found.values() if "not-this-one" in finding.seen]


def test_no_credentials_fail(team: Server) -> None:
    found = checked(team.uri)
    assert failed(found) == ["login"]
    assert "no user is given and one is needed" in found["login"].seen


def test_a_server_that_is_down_is_the_only_line() -> None:
    found = checked(f"http://ann:secret@127.0.0.1:{free_port()}")
    assert failed(found) == ["reachable"] == list(found)
    assert "secret" not in found["reachable"].seen


@pytest.mark.parametrize(
    ("server", "level"),
    [("3.17.0", "ok"), ("9.1.0", "FAIL"), ("3.2.1", "warn"), ("3.999.0", "ok"), ("", "warn")],
)
def test_versions_are_compared(server: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_check.mlflow, "__version__", "3.17.2")
    assert server_check._version(server).level.value == level


def test_a_sqlite_store_is_checked_and_left_as_it_was(here: Path) -> None:
    store = open_store(f"sqlite:///{here}/mlflow.db")
    found = checked()
    assert {finding.level for finding in found.values()} == {Level.OK}
    assert found.keys() >= {"store migrations", "permissions", "artifacts", "registry"}
    assert [e.name for e in store.client.search_experiments(ViewType.ACTIVE_ONLY)] == ["Default"]
    assert {file.name for file in here.iterdir() if not file.name.endswith(".lock")} == {"mlflow.db"}


def test_no_store_is_made_by_looking(here: Path) -> None:
    found = checked()
    assert found["reachable"].level is Level.WARN
    assert list(found) == ["reachable"]
    assert not list(here.iterdir())


def test_a_sqlite_store_at_an_old_schema_fails_and_is_not_migrated(here: Path) -> None:
    path = here / "old.db"
    before = _old_store(path)
    found = checked(f"sqlite:///{path}")
    assert failed(found) == ["store migrations"]
    assert found["store migrations"].seen.startswith(f"at {before}, MLflow")
    assert f"mlflow db upgrade sqlite:///{path}" in found["store migrations"].remedy
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchone() == (before,)


def _old_store(path: Path) -> str:
    """A store one migration behind; where it is."""
    config = mlflow_db._get_alembic_config(f"sqlite:///{path}")
    scripts = mlflow_db.ScriptDirectory.from_config(config)
    before = str(scripts.get_revision(scripts.get_current_head()).down_revision)
    engine = mlflow_db.create_sqlalchemy_engine(f"sqlite:///{path}")
    mlflow_db.InitialBase.metadata.create_all(engine)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, before)
        connection.exec_driver_sql(
            "INSERT INTO experiments (experiment_id, name, lifecycle_stage) VALUES (1, 'mine', 'active')"
        )
    engine.dispose()
    return before


def test_stores_of_the_future_and_broken_ones_fail(here: Path) -> None:
    open_store(f"sqlite:///{here}/mlflow.db")
    shutil.copy("mlflow.db", "broken.db")
    with closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        database.commit()
    with closing(sqlite3.connect("broken.db")) as database:
        database.execute("DROP TABLE alembic_version")
        database.commit()
    assert "a newer one made it" in checked("sqlite:///mlflow.db")["store migrations"].seen
    # Nothing is in it, so the first command that logs makes it anew.
    assert "holds no tables of MLflow yet" in checked("sqlite:///broken.db")["reachable"].seen


def test_a_database_is_checked_directly(database: Postgres, team: Server, here: Path) -> None:
    found = checked(database.uri("mlflow"))
    assert failed(found) == []
    assert found["store migrations"].level is Level.OK
    assert "which only this machine sees" in found["artifacts"].seen
    assert not list(here.iterdir())
    assert failed(checked(database.uri("no-such"))) == ["reachable"]
    wrong = checked(database.uri("mlflow").replace(database.password, "pw-wrong"))
    assert "password authentication failed" in wrong["reachable"].seen
    assert "pw-wrong" not in wrong["reachable"].seen
