"""The files of a model on a real server: what is asked of it, and what is noticed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.content.artifact_files import StoredFiles
from mechdiff_mlflow.tracking.flavour import log_model
from mechdiff_mlflow.tracking.store.store import open_store

from .conftest import flip_byte, make_map
from .servers import serving

N_FILES = 5
"""Of a model: MLmodel, map, probe, card, environment."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "mlflow.db")
    with serving(folder) as running:
        yield running.url, folder / "artifacts"


def test_a_map_costs_a_request_a_file_and_one_for_each_change(
    server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(server[0])
    experiment_id = store.experiment("counted")
    run_id = store.client.create_run(experiment_id).info.run_id
    asked: list[str] = []
    send = requests.Session.send

    def noting(self: requests.Session, request: requests.PreparedRequest, **options: object) -> object:
        asked.append(f"{request.method} {str(request.url).rpartition('/')[2]}")
        return send(self, request, **options)  # type: ignore[arg-type]

    log_model(make_map(), "first", store=store, run_id=run_id, experiment_id=experiment_id)
    monkeypatch.setattr(requests.Session, "send", noting)
    log_model(make_map(1), "second", store=store, run_id=run_id, experiment_id=experiment_id)
    puts = [what for what in asked if what.startswith("PUT") or "artifacts" in what]
    assert len(puts) == N_FILES
    assert [what for what in asked if what.startswith("GET")] == [
        f"GET {name}" for name in ("map.pt", "probe.safetensors", "MLmodel")
    ]
    # Made, READY, an output of its run.
    assert len(asked) == N_FILES + 3 + 3
    assert [model.sha256 for model in flavour.maps_of(store, run_id)] == [
        make_map(seed).sha256() for seed in (0, 1)
    ]


@pytest.mark.parametrize("name", flavour.NEEDED_FILES)
def test_a_server_that_keeps_other_bytes_is_found_out(
    server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store, artifacts = open_store(server[0]), server[1]
    run_id = store.client.create_run(store.experiment(f"damaged-{name}")).info.run_id
    send = StoredFiles.send

    def damaging(files: StoredFiles, folder: Path, **_: Any) -> None:
        before = set(artifacts.rglob(name))
        send(files, folder)
        [stored] = set(artifacts.rglob(name)) - before
        flip_byte(stored)

    monkeypatch.setattr(StoredFiles, "send", damaging)
    with pytest.raises(MechdiffError, match=f"gave back another {name} than was sent"):
        log_model(make_map(), "x", store=store, run_id=run_id)
    [model] = store.client.search_logged_models([store.experiment(f"damaged-{name}")])
    assert model.status == "FAILED"


def test_files_on_this_machine_are_read_where_they_lie(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    store = open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    sent = tmp_path / "sent"
    sent.mkdir()
    (sent / "a.txt").write_text("one")
    files = StoredFiles(store, (tmp_path / "there").as_uri())
    files.send(sent)
    digest = hashlib.sha256(b"one").hexdigest()
    assert files.require_same({"a.txt": digest}, tmp_path / "unused") == tmp_path / "there"
    assert not (tmp_path / "unused").exists()
    with pytest.raises(MechdiffError, match=r"another b\.txt than was sent"):
        files.require_same({"b.txt": digest}, tmp_path / "unused")
