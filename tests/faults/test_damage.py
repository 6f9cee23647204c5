"""Artifacts that were truncated, or had a bit flipped, in the store: noticed by whoever reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from faults.commands import Place, error_of, mechdiff
from faults.conftest import damage
from faults.harness import RUN, World
from faults.snapshot import active_runs

NAME = "toy-L2-attn_out"


@pytest.fixture
def promoted(world: World, place: Place) -> Place:
    """A place where a map was fitted and patched."""
    mechdiff(place, *world.words(RUN))
    return place


def run_id(place: Place, kind: str) -> str:
    [found] = [run for run in active_runs(MlflowClient(place.uri)) if run.data.tags["mechdiff.kind"] == kind]
    return str(found.info.run_id)


def only(place: Place, name: str) -> Path:
    [found] = (place.folder / "mlartifacts").rglob(name)
    return found


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize("name", ["map.pt", "probe.safetensors"])
def test_a_damaged_map_is_neither_promoted_nor_fetched(promoted: Place, name: str, how: str) -> None:
    mechdiff(promoted, "promote", run_id(promoted, "fit"))
    mechdiff(promoted, "fetch", f"{NAME}@champion", "-o", "good.pt")
    damage(only(promoted, name), how)
    for words in (
        ("fetch", f"runs:/{run_id(promoted, 'fit')}", "-o", "bad.pt"),
        ("promote", run_id(promoted, "fit"), "--alias", "other"),
    ):
        # What was fetched before is still right, wherever it is kept.
        clean = Place(promoted.folder, promoted.uri, {**promoted.environment, "MECHDIFF_CACHE": "new-cache"})
        said = error_of(mechdiff(clean, *words, code=1))
        assert name in said, said
        assert "changed" in said or "damaged" in said or "incomplete" in said, said
    assert not (promoted.folder / "bad.pt").exists()


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_table_is_not_reported(world: World, place: Place, how: str) -> None:
    mechdiff(place, *world.words(("sweep", "--sites", "L2/attn_out", "--ranks", "1,full", "--targets", "9")))
    report = ("report", "--pair", str(world.pair), "--experiment", "toy")
    mechdiff(place, *report, "--out", "good.md")
    damage(only(place, "least_ranks.json"), how)
    said = error_of(mechdiff(place, *report, "--out", "bad.md", code=1))
    assert "least_ranks.json" in said
    assert not (place.folder / "bad.md").exists()
