from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner, Result

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.tracking.store.store import open_store

Invoke = Callable[..., Result]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh `mlflow.db`: making its tables takes MLflow seconds, so it is made once and copied."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A working directory with an empty store, without MLflow settings of its own."""
    shutil.copy(empty_store, tmp_path)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mechdiff(here: Path) -> Invoke:
    """Calls the command line as a user in `here` would, and expects an exit code."""

    def invoke(*words: str, code: int = 0) -> Result:
        result = CliRunner().invoke(cli, list(words), prog_name="mechdiff")
        assert result.exit_code == code, result.output + repr(result.exception)
        assert "Traceback" not in result.output
        return result

    return invoke


@pytest.fixture
def client(here: Path) -> mlflow.MlflowClient:
    """The store that commands in `here` write to."""
    return mlflow.MlflowClient(f"sqlite:///{here / 'mlflow.db'}")
