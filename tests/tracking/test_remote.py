"""Maps by name from a real server, which alone can reach its store; then without the server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.registry.fetch import CachedAnswer, fetch, load_map
from mechdiff_mlflow.tracking.registry.moves import history
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.registry.promotion import promote
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import open_store

from .conftest import flip_byte, make_map
from .servers import Server, serving

NAME = "demo-L3-attn_out"
PARAMS = {"pair": "demo", "layer": 3, "hook": "attn_out", "alpha": 1.0}


@pytest.fixture
def server(tmp_path: Path, empty_database: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    with serving(folder) as running:
        yield running


def logged(uri: str, seed: int) -> str:
    record = RunRecord(kind="fit", name="fit", params=PARAMS, map=make_map(seed))
    return Tracker(open_store(uri), "demo").log(record)


def mechdiff(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, list(words), prog_name="mechdiff")
    return result.exit_code, " ".join(result.output.split())


def test_maps_by_name_from_a_server_and_then_without_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    first = logged(server.url, 1)
    store = open_store(server.url)
    promote(store, first, policy=PromotionPolicy(force=True))
    assert store.client.get_run(first).info.artifact_uri.startswith("mlflow-artifacts:")
    champion = f"{NAME}@champion"
    for name in (champion, f"{NAME}/1", f"runs:/{first}", first):
        for suffix in (".pt", ".safetensors"):
            out = tmp_path / f"map{suffix}"
            code, shown = mechdiff("fetch", name, "-o", str(out))
            assert (code, "Warning" in shown) == (0, False), shown
            assert AffineMap.load(out) == make_map(1)
            out.unlink()
    promote(store, logged(server.url, 2), policy=PromotionPolicy(force=True))
    assert load_map(champion) == make_map(2)  # the cache knows 1 and is not believed while there is a server
    code, shown = mechdiff("fetch", champion, "-o", "map.pt", "--offline")
    assert (code, AffineMap.load("map.pt")) == (0, make_map(2)), shown
    assert "Warning: Offline" in shown
    for name, words in (
        (f"{NAME}@second", "has no alias 'second'; it has champion"),
        (f"{NAME}/9", "has no version 9; it has 1, 2"),
        ("demo-L3-atn_out@champion", f"there is {NAME}"),
    ):
        code, shown = mechdiff("fetch", name, "-o", "none.pt")
        assert (code, words in shown) == (1, True), shown
    assert [m.target for m in history(store, NAME)] == [1, 2]

    server.stop()
    code, shown = mechdiff("fetch", champion, "-o", "map.pt")
    assert (code, AffineMap.load("map.pt")) == (0, make_map(2)), shown
    assert f"Warning: {server.url} does not answer; this is the cached answer of" in shown
    assert f"when {champion} meant {NAME}/2" in shown
    with pytest.warns(CachedAnswer, match="may mean another map by now"):
        assert load_map(f"models:/{champion}") == make_map(2)
    for name in (f"{NAME}/1", first):
        code, shown = mechdiff("fetch", name, "-o", "one.safetensors")
        assert (code, AffineMap.load("one.safetensors")) == (0, make_map(1)), shown
    code, shown = mechdiff("fetch", f"{NAME}@second", "-o", "map.pt")
    assert code == 1
    assert "No tracking server answers" in shown

    for cached in (tmp_path / "cache").rglob("map.pt"):
        flip_byte(cached)
    Path("map.pt").unlink()
    code, shown = mechdiff("fetch", champion, "-o", "map.pt")
    assert code == 1
    assert "the cached map is damaged" in shown
    shutil.rmtree(tmp_path / "cache" / "maps")
    assert "is not in the cache any more" in mechdiff("fetch", champion, "-o", "map.pt", "--offline")[1]
    assert not Path("map.pt").exists()


def test_a_cache_of_answers_belongs_to_one_store(tmp_path: Path, empty_database: Path) -> None:
    uris = []
    for seed, folder in ((1, tmp_path / "a"), (2, tmp_path / "b")):
        folder.mkdir()
        shutil.copy(empty_database, folder / "mlflow.db")
        uris.append(f"sqlite:///{folder / 'mlflow.db'}")
        promote(open_store(uris[-1]), logged(uris[-1], seed), policy=PromotionPolicy(force=True))
    load_map(f"{NAME}@champion", tracking_uri=uris[0])
    with pytest.raises(MechdiffError, match=r"was never fetched on this machine; fetch it once without"):
        load_map(f"{NAME}@champion", tracking_uri=uris[1], offline=True)
    with pytest.warns(CachedAnswer):
        assert load_map(f"{NAME}@champion", tracking_uri=uris[0], offline=True) == make_map(1)


def test_a_broken_answer_is_no_answer(tmp_path: Path, empty_database: Path) -> None:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    promote(open_store(uri), logged(uri, 1), policy=PromotionPolicy(force=True))
    fetch(f"{NAME}@champion", tmp_path / "map.pt", tracking_uri=uri)
    [answer] = (tmp_path / "cache" / "answers").iterdir()
    answer.write_text('{"label": "x", "sha256": "../../../etc", "asked": ""}')
    with pytest.raises(MechdiffError, match="which is none; promote its run again"):
        load_map(f"{NAME}@champion", tracking_uri=uri, offline=True)
    answer.write_text("[")
    with pytest.raises(MechdiffError, match="was never fetched"):
        load_map(f"{NAME}@champion", tracking_uri=uri, offline=True)
