"""A real SQLite store for each test, and none of MLflow's globals left behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import torch

from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.tracking.runs.tracker import RUN_ID_VARIABLE, Tracker
from mechdiff_mlflow.tracking.store import store as store_module
from mechdiff_mlflow.tracking.store.store import Store, open_store
from mechdiff_mlflow.tracking.store.user_cache import CACHE_VARIABLE

D = 6


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store, made once: MLflow's migrations take two seconds."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    open_store(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (*store_module._PROCESS_SETTINGS, "MLFLOW_TRACKING_URI", RUN_ID_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(None)


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Store:
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    return open_store(f"sqlite:///{folder / 'mlflow.db'}")


@pytest.fixture
def tracker(store: Store) -> Tracker:
    return Tracker(store, "demo")


def make_map(seed: int = 0, alpha: float = 1.0, dtype: torch.dtype = torch.float64) -> AffineMap:
    """A small map with everything a real one has; another for each seed."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    meta = {"pair": "demo", "site": "L3/attn_out", "solver": "reduced_rank", "k": 2, "pair_fingerprint": "f1"}
    meta |= {"selection": []}
    return AffineMap(randn(D), randn(D), Weight.low_rank(randn(D, 2), randn(2, D), 1.0), alpha, meta)


def flip_byte(path: Path, at: int = -40) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
