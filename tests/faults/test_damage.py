"""Artifacts that were truncated, or had a bit flipped, in the store: noticed by whoever reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from faults.commands import Place, error_of, mechdiff
from faults.conftest import CELLS
from faults.harness import RUN, World
from faults.snapshot import active_runs

NAME = "toy-L2-attn_out"


@pytest.fixture(scope="module")
def kept(world: World) -> Place:
    """A place where a map was fitted, patched and promoted, and a sweep was made."""
    place = world.place("damage")
    mechdiff(place, *world.words(RUN, "one"), "--promote", "--force")
    mechdiff(place, *world.words(CELLS))
    return place


@contextmanager
def damaged(path: Path, how: str) -> Iterator[None]:
    """A file cut to its half, or with one bit of its midst flipped, for as long as the context is open."""
    good = path.read_bytes()
    bad = bytearray(good)
    if how == "truncated":
        del bad[len(bad) // 2 :]
    else:
        bad[len(bad) // 2] ^= 1
    path.write_bytes(bad)
    try:
        yield
    finally:
        path.write_bytes(good)


def of_kind(place: Place, kind: str, experiment: str = "one") -> tuple[str, Path]:
    """Id of the one run of a kind, and the folder of its artifacts."""
    client = MlflowClient(place.uri)
    [run] = [r for r in active_runs(client, experiment) if r.data.tags["mechdiff.kind"] == kind]
    return run.info.run_id, Path(run.info.artifact_uri.removeprefix("file://"))


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize("name", ["map.pt", "probe.safetensors"])
def test_a_damaged_map_is_neither_promoted_nor_fetched(kept: Place, name: str, how: str) -> None:
    fit, folder = of_kind(kept, "fit")
    [file] = [
        path
        for path in (folder.parents[1] / "models").rglob(name)
        if MlflowClient(kept.uri).get_logged_model(path.parents[1].name).source_run_id == fit
    ]
    # What was fetched before is still right, wherever it is kept: so into another cache.
    place = replace(kept, environment={**kept.environment, "MECHDIFF_CACHE": f"cache-{name}-{how}"})
    with damaged(file, how):
        for words in (
            ("fetch", f"{NAME}@champion", "-o", "bad.pt"),
            ("fetch", f"runs:/{fit}", "-o", "bad.pt"),
            ("promote", fit, "--alias", "other"),
        ):
            said = error_of(mechdiff(place, *words, code=1))
            assert f"{name} has changed since it was saved" in said, said
    assert not (place.folder / "bad.pt").exists()
    mechdiff(place, "fetch", f"{NAME}@champion", "-o", "good.pt")


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_table_is_not_reported(world: World, kept: Place, how: str) -> None:
    report = ("report", "--pair", str(world.pair), "--experiment", "toy")
    _, folder = of_kind(kept, "sweep", "toy")
    with damaged(folder / "least_ranks.json", how):
        said = error_of(mechdiff(kept, *report, "--out", "bad.md", code=1))
        assert "least_ranks.json" in said
        assert not (kept.folder / "bad.md").exists()
    mechdiff(kept, *report, "--out", "good.md")
