"""One PostgreSQL and one team server for the tests here that a process runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from team.postgres import Postgres, postgres
from team.server import ADMIN, Server, team_server

from mechdiff_mlflow.tracking.store import store as store_module
from mechdiff_mlflow.tracking.store.user_cache import CACHE_VARIABLE


@pytest.fixture(scope="session")
def database() -> Iterator[Postgres]:
    with postgres() as running:
        yield running


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory, database: Postgres) -> Iterator[Server]:
    """The server with three users: the admin, and ann and bob, who may read what is not theirs."""
    with (
        team_server(tmp_path_factory.mktemp("server"), database) as server,
        pytest.MonkeyPatch.context() as now,
    ):
        for name, value in server.login(ADMIN).items():
            now.setenv(name, value)
        for name in ("ann", "bob"):
            server.add_user(name)
        now.undo()
        yield server


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory of its own, without MLflow settings; none are left behind."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name in store_module._PROCESS_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    mlflow.set_tracking_uri(None)
