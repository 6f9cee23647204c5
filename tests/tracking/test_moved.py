"""Stores that were copied or moved: nothing goes into the folder that they came from."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from mechdiff_mlflow.cli.group import cli
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.registry.fetch import load_map
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.registry.promotion import promote
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.server_check import Level, check_store
from mechdiff_mlflow.tracking.store.store import PLACE_TAG, Store, open_store
from tracking.conftest import make_map

ANY = PromotionPolicy(allow_pair_mismatch=True)


def log(store: Store, seed: int = 0, experiment: str = "demo") -> str:
    """A run with a map and a file."""
    params = {"pair": "p", "layer": 1, "hook": "attn_out", "alpha": 1.0, "seed": seed}
    record = RunRecord(
        kind="import",
        name=f"r{seed}",
        params=params,
        tags={"imported_from": "x"},
        texts={"a.txt": "a"},
        map=make_map(seed),
    )
    with Tracker(store, experiment).run("import", f"top {seed}") as run:
        return run.log(record)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def places(store: Store) -> tuple[Level, str]:
    [found] = [one for one in check_store(store.uri) if one.check == "artifact places"]
    return found.level, found.seen + found.remedy


@pytest.mark.parametrize("tagged", [True, False], ids=["noted", "made before that was noted"])
@pytest.mark.parametrize("take", [shutil.copytree, shutil.move], ids=["copied", "moved"])
def test_a_copied_or_moved_store_is_refused_until_it_is_rebased(
    store: Store, tmp_path: Path, take: Callable[[Path, Path], object], tagged: bool
) -> None:
    run_id = log(store)
    promote(store, run_id, name="n", policy=ANY)
    if not tagged:
        client = MlflowClient(store.uri)
        client._tracking_client.store.delete_experiment_tag(store.experiment_id("demo"), PLACE_TAG)
    old, new = tmp_path / "store", tmp_path / "new place"
    take(old, new)
    before = files(old) if old.exists() else None
    there = open_store(f"sqlite:///{new / 'mlflow.db'}")
    inside = files(new)
    for write in (
        lambda: log(there, 1),
        lambda: promote(there, run_id, name="other", policy=ANY),
        lambda: Tracker(there, "demo", resume=run_id).run("run", "x").__enter__(),
    ):
        with pytest.raises(
            MechdiffError, match=r"was copied or moved from .* mechdiff server-check --rebase"
        ):
            write()
    assert (files(old) if old.exists() else None) == before
    assert {k for k in files(new) if not k.endswith(".lock")} == {
        k for k in inside if not k.endswith(".lock")
    }
    level, said = places(there)
    assert level is Level.FAIL
    assert f"demo in {old}" in said
    assert "server-check --rebase" in said
    shown = CliRunner().invoke(cli, ["server-check", "--rebase", "--tracking-uri", there.uri])
    assert shown.exit_code == 0, shown.output
    if old.exists():
        shutil.rmtree(old)
    assert load_map("n@champion", store=there).sha256() == load_map(f"runs:/{run_id}", store=there).sha256()
    log(there, 1)
    promote(there, run_id, name="other", policy=ANY)
    assert places(there)[0] is Level.OK
    assert not old.exists()


def test_what_is_read_from_where_a_store_was_copied_from_is_said_once(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = log(store)
    load_map(f"runs:/{run_id}", store=store)
    assert "copied or moved" not in caplog.text
    shutil.rmtree(tmp_path / "cache")  # or it is not read at all
    shutil.copytree(tmp_path / "store", tmp_path / "it's new")
    there = open_store(f"sqlite:///{tmp_path}/it's new/mlflow.db")
    assert load_map(f"runs:/{run_id}", store=there) == make_map(0)
    assert f"was copied or moved from {tmp_path / 'store'}, and its artifacts are still" in caplog.text
    shutil.rmtree(tmp_path / "cache")
    load_map(f"runs:/{run_id}", store=there)
    assert caplog.text.count("copied or moved") == 1
    words = shlex.split(caplog.text.partition("; run ")[2].partition(" to have them here")[0])
    assert CliRunner().invoke(cli, words[1:]).exit_code == 0
    caplog.clear()
    shutil.rmtree(tmp_path / "cache")
    load_map(f"runs:/{run_id}", store=open_store(there.uri))
    assert "copied or moved" not in caplog.text


def test_artifacts_that_were_left_behind_are_asked_for(store: Store, tmp_path: Path) -> None:
    log(store)
    (tmp_path / "new").mkdir()
    shutil.copy(tmp_path / "store" / "mlflow.db", tmp_path / "new")
    shown = CliRunner().invoke(
        cli, ["server-check", "--rebase", "--tracking-uri", f"sqlite:///{tmp_path}/new/mlflow.db"]
    )
    assert shown.exit_code == 1
    assert f"copy them to {tmp_path / 'new' / 'mlartifacts' / 'demo'}" in " ".join(shown.output.split())


def test_places_that_somebody_chose_stay(store: Store, tmp_path: Path) -> None:
    (tmp_path / "disk" / "mlartifacts").mkdir(parents=True)
    chosen = {
        "a": "s3://bucket/a",
        "b": (tmp_path / "disk" / "mlartifacts" / "b").as_uri(),
        "c": str(tmp_path / "disk/c"),
    }
    for name, place in chosen.items():
        store.client.create_experiment(name, place)
        store.experiment(name)
    level, said = places(store)
    assert level is Level.WARN
    assert all(f"{name} in " in said for name in chosen)
    shutil.copytree(tmp_path / "store", tmp_path / "new")
    there = open_store(f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}")
    for name, place in chosen.items():
        there.experiment(name)
        assert there.client.get_experiment_by_name(name).artifact_location.endswith(
            place.removeprefix("file://")
        )
    log(there, 3, "b")
    assert list((tmp_path / "disk").rglob("map.pt"))


def test_an_experiment_of_mlflows_own_is_noted_when_it_is_first_used(store: Store, tmp_path: Path) -> None:
    MlflowClient(store.uri).create_experiment("theirs", str(tmp_path / "store" / "mlruns" / "7"))
    log(store, 0, "theirs")
    shutil.copytree(tmp_path / "store", tmp_path / "new")
    with pytest.raises(MechdiffError, match="was copied or moved"):
        log(open_store(f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"), 1, "theirs")


def test_a_link_to_a_store_is_the_store(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "store")
    linked = open_store(f"sqlite:///{tmp_path / 'link' / 'mlflow.db'}")
    log(linked, 0, "by the link")
    log(linked, 1)
    log(store, 2, "by the link")
    assert places(linked)[0] is Level.OK
