"""Commands that are killed and repeated, not resumed: import and report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from test_bundles import bundle, saved
from tracking.servers import Server

from faults.commands import Place, mechdiff
from faults.harness import RUN, World, killed_at_point, spread, steps_of
from faults.snapshot import active_runs

NAMES = ("toy-L2-attn_out", "toy-L3-resid_post")


@pytest.fixture(scope="module")
def manifest(world: World) -> Path:
    """Two hand-made winners."""
    folder = world.folder / "winners"
    folder.mkdir()
    saved(folder, bundle("procrustes", layer=2), "a.pt")
    saved(folder, bundle("ridge", hook="resid_post", layer=3), "b.pt")
    winners = {"L2_attn_out": {"path": "a.pt", "alpha": 0.3}, "L3_resid_post": {"path": "b.pt", "alpha": 0.7}}
    (folder / "manifest.json").write_text(json.dumps({"pair": "toy", "winners": winners}))
    return folder / "manifest.json"


def forget(client: MlflowClient, experiment: str) -> None:
    """Delete what commands made, so that the next begins anew."""
    if client.get_experiment_by_name(experiment) is not None:
        for run in active_runs(client, experiment):
            client.delete_run(run.info.run_id)
    for name in NAMES:
        for found in client.search_registered_models(f"name = '{name}'"):
            client.delete_registered_model(found.name)


def reports(client: MlflowClient, experiment: str) -> list[Run]:
    """The report runs of an experiment."""
    return [run for run in active_runs(client, experiment) if run.data.tags["mechdiff.kind"] == "report"]


def imported_once(place: Place, experiment: str) -> None:
    """Three finished runs, and one version of each map, with the alias, whose files are right."""
    client = MlflowClient(place.uri)
    runs = list(active_runs(client, experiment))
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    for name in NAMES:
        [version] = client.search_model_versions(f"name = '{name}'")
        assert client.get_model_version_by_alias(name, "champion").version == version.version
        mechdiff(place, "fetch", f"{name}@champion", "-o", "map.pt")


@pytest.mark.parametrize("where", ["sqlite", "server"])
def test_an_import_killed_anywhere_and_repeated_is_made_once(
    world: World, server: Server, new_place: Callable[..., Place], experiment: str, manifest: Path, where: str
) -> None:
    place = new_place(server.url if where == "server" else "")
    words = ("import", str(manifest))
    client = MlflowClient(place.uri)
    forget(client, experiment)
    points = steps_of(world, words, place, experiment)
    imported_once(place, experiment)
    for point in spread(points, 3, seed=8):
        forget(client, experiment)
        killed_at_point(world, words, place, point, experiment)
        mechdiff(place, *world.words(words, experiment))
        imported_once(place, experiment)


def test_an_import_that_is_over_is_not_made_again_when_the_alias_is_elsewhere(
    world: World, place: Place, experiment: str, manifest: Path
) -> None:
    words = world.words(("import", str(manifest)), experiment)
    mechdiff(place, *words)
    mechdiff(place, "maps", "demote", NAMES[0])
    mechdiff(place, *words)
    imported_once(place, experiment)
    mechdiff(place, *words, "--alias", "other")
    assert len(list(active_runs(MlflowClient(place.uri), experiment))) == 3


@pytest.mark.parametrize("where", ["sqlite", "server"])
def test_a_report_killed_anywhere_and_repeated_is_one_run(
    world: World, server: Server, new_place: Callable[..., Place], experiment: str, where: str
) -> None:
    place = new_place(server.url if where == "server" else "")
    client = MlflowClient(place.uri)
    mechdiff(place, *world.words(RUN, experiment))
    words = ("report",)
    points = steps_of(world, words, place, experiment)
    for point in spread(points, 3, seed=9):
        for run in reports(client, experiment):
            client.delete_run(run.info.run_id)
        killed_at_point(world, words, place, point, experiment)
        mechdiff(place, *world.words(words, experiment))
        [run] = reports(client, experiment)
        assert run.info.status == "FINISHED", point
        names = [file.path for file in client.list_artifacts(run.info.run_id)]
        assert {"mechdiff-report.md", "mechdiff-report.html"} <= set(names)


def test_a_half_upload_that_a_server_kept_is_removed_by_who_finishes_the_run(
    world: World, server: Server, new_place: Callable[..., Place], experiment: str, manifest: Path
) -> None:
    place = new_place(server.url)
    words = ("import", str(manifest))
    forget(MlflowClient(place.uri), experiment)
    points = steps_of(world, words, place, experiment)
    forget(MlflowClient(place.uri), experiment)
    half = next(point for point, name in points.items() if point.kind == "half" and name == "map.pt")
    before = set(server.folder.rglob("models/*/artifacts"))
    killed_at_point(world, words, place, half, experiment)
    [folder] = set(server.folder.rglob("models/*/artifacts")) - before
    part = folder / ".artifact.uploading.x1"
    part.write_bytes(b"half")
    mechdiff(place, *world.words(words, experiment))
    imported_once(place, experiment)
    assert (folder / "map.pt").is_file()
    assert not list(folder.glob(".artifact.uploading.*"))
