import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlflow
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import kills
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.spec.digests import file_sha256
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.registry import moves, versions
from mechdiff_mlflow.tracking.registry.compare import diff
from mechdiff_mlflow.tracking.registry.fetch import fetch, load_map, resolve
from mechdiff_mlflow.tracking.registry.moves import Move, history
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.registry.promotion import demote, promote, rollback
from mechdiff_mlflow.tracking.registry.versions import get_version, list_versions, list_winners
from mechdiff_mlflow.tracking.runs.tracker import OpenRun, Tracker
from mechdiff_mlflow.tracking.store import user_cache as cache
from mechdiff_mlflow.tracking.store.store import RunTakenOver, Store, open_store

from .conftest import D, flip_byte, make_map

NAME = "demo-L3-attn_out"
PARAMS = {"pair": "demo", "layer": 3, "hook": "attn_out", "k": 2, "solver": "reduced_rank"}
METRICS = {
    "KL_raw": 3.8,
    "KL_mapped": 2.5,
    "drop_pct": 34.2,
    "ci/drop_pct_low": 30.1,
    "ci/drop_pct_high": 38.0,
    "skill_pct": 30.0,
    "ci/skill_pct_low": 25.0,
    "ci/skill_pct_high": 35.0,
}
UNFORCED = PromotionPolicy()
FORCED = PromotionPolicy(force=True)


class Patch:
    """Fits a map in one run and measures it in another, as `mechdiff run` does."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def __call__(self, seed: int = 0, alpha: float = 1.0, **changes: Any) -> str:
        with self.tracker.run("run", "L3/attn_out") as run:
            self.fit = run.log(RunRecord(kind="fit", name="fit", params=PARAMS, map=make_map(seed)))
            record = RunRecord(
                kind="patch",
                name="patch",
                params={**PARAMS, "alpha": alpha},
                metrics=METRICS,
                tags={"selection_leak": "false"},
                map_run=self.fit,
            )
            return run.log(replace(record, **changes), under=self.fit)


@pytest.fixture
def patched(tracker: Tracker) -> Patch:
    return Patch(tracker)


def stored(store: Store, name: str = "map.pt") -> list[Path]:
    assert store.sqlite_path is not None
    return sorted(store.sqlite_path.parent.rglob(name))


def test_a_promoted_map_is_had_by_name(store: Store, patched: Patch, tmp_path: Path) -> None:
    run_id = patched(alpha=0.3)
    version = promote(store, run_id, why="best of the sweep")
    assert (version.name, version.number, version.aliases) == (NAME, 1, ("champion",))
    assert (version.run_id, version.is_verified) == (run_id, True)
    wanted = make_map().with_alpha(0.3)
    for reference in (f"{NAME}@champion", f"models:/{NAME}@champion", f"models:/{NAME}/1", f"{NAME}/1"):
        assert load_map(reference, store=store) == wanted
    assert load_map(f"models:/{NAME}@champion", tracking_uri=store.uri) == wanted
    x = torch.randn(3, D)
    mlflow.set_tracking_uri(store.uri)
    served = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    assert (served.predict(x.numpy()) == wanted(x).numpy()).all()
    file = mlflow.artifacts.download_artifacts(f"models:/{NAME}@champion/map.pt", dst_path=str(tmp_path))
    assert AffineMap.load(file) == wanted


def test_the_version_says_where_it_comes_from(store: Store, patched: Patch) -> None:
    run_id = patched(alpha=0.3)
    version = promote(store, run_id)
    expected = {
        "pair": "demo",
        "layer": "3",
        "hook": "attn_out",
        "k": "2",
        "alpha": "0.3",
        "drop_pct": "34.2",
    }
    expected |= {"ci/drop_pct_low": "30.1", "pair_fingerprint": "f1", "mechdiff.run_id": run_id}
    assert expected.items() <= version.tags.items()
    assert version.tags["code_version"].startswith("0.1.0")
    page = store.client.get_model_version(NAME, "1")
    assert "| drop_pct | 34.2 | 30.1 to 38 |" in page.description
    assert f'load_map("models:/{NAME}@champion")' in page.description
    # The UI's links between version and logged model, both ways.
    model = store.client.get_logged_model(version.source.removeprefix("models:/"))
    assert f'"name": "{NAME}", "version": "1"' in model.tags["mlflow.modelVersions"]
    assert {m.key: m.value for m in model.metrics} == METRICS


def test_a_map_measured_at_its_own_alpha_is_not_copied(store: Store, patched: Patch) -> None:
    promote(store, patched(alpha=1.0))
    assert len(stored(store)) == 1


def test_promoting_again_changes_nothing(store: Store, patched: Patch) -> None:
    run_id = patched(alpha=0.3)
    assert promote(store, run_id) == promote(store, run_id)
    assert len(list_versions(store, NAME)) == len(history(store, NAME)) == 1


def test_a_fit_is_promoted_with_the_numbers_of_its_only_patch(store: Store, patched: Patch) -> None:
    run_id = patched(alpha=0.3)
    version = promote(store, patched.fit)
    assert (version.run_id, version.tags["drop_pct"], version.tags["alpha"]) == (run_id, "34.2", "0.3")


def test_a_fit_with_several_patches_must_be_told_which(
    store: Store, tracker: Tracker, patched: Patch
) -> None:
    first = patched()
    second = tracker.log(RunRecord(kind="patch", name="p2", metrics=METRICS, map_run=patched.fit))
    with pytest.raises(MechdiffError, match="patched several times") as caught:
        promote(store, patched.fit)
    assert first in str(caught.value)
    assert second in str(caught.value)


def test_only_finished_runs_with_maps_are_promoted(store: Store, tracker: Tracker, patched: Patch) -> None:
    plain = tracker.log(RunRecord(kind="patch", name="p"))
    with pytest.raises(MechdiffError, match=f"Run {plain} has no map"):
        promote(store, plain)
    with pytest.raises(MechdiffError, match="RUNNING and only FINISHED"), tracker.run("fit", "f") as run:
        promote(store, run.run_id)
    with pytest.raises(MechdiffError, match="FAILED and only FINISHED"):
        promote(store, run.run_id)
    with pytest.raises(MechdiffError, match="not found"):
        promote(store, "0" * 32)
    run_id = patched()
    store.client.delete_run(run_id)
    with pytest.raises(MechdiffError, match="deleted and only FINISHED"):
        promote(store, run_id)
    assert list_winners(store) == []


def test_names_come_from_the_run_or_the_user(store: Store, tracker: Tracker, patched: Patch) -> None:
    nameless = tracker.log(RunRecord(kind="fit", name="f", map=make_map(), params={"layer": 3}))
    with pytest.raises(MechdiffError, match="no param 'hook' to name the map by; use --name"):
        promote(store, nameless)
    assert promote(store, nameless, name="mine", policy=FORCED).name == "mine"
    with pytest.raises(MechdiffError, match="cannot be registered as 'a/b'"):
        promote(store, nameless, name="a/b")
    with pytest.raises(MechdiffError, match="Alias 'latest' is not possible"):
        promote(store, nameless, alias="latest")


def test_somebody_elses_model_is_left_alone(store: Store, patched: Patch) -> None:
    store.client.create_registered_model(NAME)
    with pytest.raises(MechdiffError, match="that is no map exists already"):
        promote(store, patched())


def test_unknown_names_aliases_and_versions_say_what_there_is(store: Store, patched: Patch) -> None:
    with pytest.raises(MechdiffError, match="there is none yet"):
        load_map("demo-L3-atn_out@champion", store=store)
    promote(store, patched())
    with pytest.raises(MechdiffError, match=f"registered as 'demo-L3-atn_out'; there is {NAME}"):
        load_map("demo-L3-atn_out@champion", store=store)
    with pytest.raises(MechdiffError, match="no alias 'best'; it has champion"):
        load_map(f"{NAME}@best", store=store)
    with pytest.raises(MechdiffError, match="no version 7; it has 1"):
        load_map(f"{NAME}/7", store=store)
    with pytest.raises(MechdiffError, match="is not the name of a map; write NAME@alias"):
        load_map("what/is/this", store=store)
    with pytest.raises(MechdiffError, match=r"Cannot read the map gone\.pt"):
        load_map("gone.pt", store=store)


def test_runs_and_logged_models_name_maps_too(store: Store, tracker: Tracker, patched: Patch) -> None:
    run_id = patched()
    [logged] = flavour.maps_of(store, patched.fit)
    assert load_map(f"runs:/{patched.fit}", store=store) == make_map()
    assert load_map(f"models:/{logged.model_id}", store=store) == make_map()
    with pytest.raises(MechdiffError, match=f"at α=1 and .* promote {run_id} to have it so, or name"):
        load_map(f"runs:/{run_id}", store=store)
    parent = store.client.get_run(patched.fit).data.tags["mlflow.parentRunId"]
    assert load_map(parent, store=store) == make_map()
    plain = tracker.log(RunRecord(kind="patch", name="p"))
    with pytest.raises(MechdiffError, match="has 0 maps; give the id of a fit run"):
        load_map(f"runs:/{plain}", store=store)


def test_a_patch_names_the_map_that_it_measured_as_it_is(store: Store, tracker: Tracker) -> None:
    params = {**PARAMS, "alpha": 0.5}
    fit = tracker.log(RunRecord(kind="fit", name="f", params=params, map=make_map(alpha=0.5)))
    patch = tracker.log(RunRecord(kind="patch", name="p", params=params, map_run=fit))
    assert load_map(patch, store=store) == make_map(alpha=0.5)


def test_changed_files_are_refused_whatever_the_alias_says(store: Store, patched: Patch) -> None:
    run_id = patched()
    version = promote(store, run_id)
    [file] = stored(store)
    flip_byte(file)
    with pytest.raises(MechdiffError, match="has changed since it was saved"):
        load_map(version.uri, store=store)
    with pytest.raises(MechdiffError, match="has changed since it was saved"):
        promote(store, run_id, alias="other")
    with pytest.raises(MechdiffError, match="has no alias 'other'"):
        get_version(store, NAME, "other")


def test_consistently_replaced_files_are_refused_too(store: Store, patched: Patch, tmp_path: Path) -> None:
    version = promote(store, patched())
    flavour.save_model(make_map(99), tmp_path / "evil")
    for name in flavour.NEEDED_FILES:
        shutil.copy(tmp_path / "evil" / name, stored(store)[0].parent / name)
    with pytest.raises(MechdiffError, match=r"but .* was registered; do not use them"):
        load_map(version.uri, store=store)


def test_unverified_versions_are_refused(store: Store, patched: Patch) -> None:
    version = promote(store, patched())
    store.client.delete_model_version_tag(NAME, "1", versions.VERIFIED_TAG)
    with pytest.raises(MechdiffError, match=f"Version {NAME}/1 was never verified"):
        load_map(version.uri, store=store)
    store.client.set_model_version_tag(NAME, "1", versions.VERIFIED_TAG, "true")
    with pytest.raises(MechdiffError, match="was never verified"):
        load_map(version.uri, store=store)


def test_digests_from_the_store_cannot_name_other_places(store: Store, patched: Patch) -> None:
    version = promote(store, patched())
    for tag in (flavour.SHA256_TAG, versions.VERIFIED_TAG):
        store.client.set_model_version_tag(NAME, "1", tag, "../../elsewhere")
    with pytest.raises(MechdiffError, match="was never verified"):
        load_map(version.uri, store=store)


def test_fetching_writes_a_copy_and_leaves_the_store_alone(
    store: Store, patched: Patch, tmp_path: Path
) -> None:
    promote(store, patched(alpha=0.3))
    files = [f for f in stored(store, "*") if f.is_file()]
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns, f.stat().st_nlink) for f in files}
    wanted = make_map().with_alpha(0.3)
    for out in (tmp_path / "a.pt", tmp_path / "a.safetensors"):
        found = fetch(f"{NAME}@champion", out, store=store)
        assert AffineMap.load(out) == wanted
        assert found.version is not None
        assert str(found.version) == f"{NAME}/1"
    assert file_sha256(tmp_path / "a.pt") == found.sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "a.safetensors", "cache", "store"]
    (tmp_path / "a.pt").write_bytes(b"mine")
    assert load_map(f"{NAME}@champion", store=store) == wanted
    after = {f: (f.read_bytes(), f.stat().st_mtime_ns, f.stat().st_nlink) for f in before}
    assert after == before


def test_the_second_fetch_reads_no_files_from_the_store(
    store: Store, patched: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, patched())
    load_map(f"{NAME}@champion", store=store)
    monkeypatch.setattr(flavour, "download", lambda *_: pytest.fail("downloaded again"))
    assert load_map(f"{NAME}@champion", store=store) == make_map()


def test_two_that_fetch_a_map_at_the_same_moment_both_get_it(
    store: Store, patched: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, patched())
    download = flavour.download

    def and_another(*args: Any) -> Path:
        monkeypatch.setattr(flavour, "download", download)
        load_map(f"{NAME}@champion", store=store)
        return download(*args)

    monkeypatch.setattr(flavour, "download", and_another)
    assert load_map(f"{NAME}@champion", store=store) == make_map()


def test_a_damaged_cache_is_replaced(store: Store, patched: Patch, tmp_path: Path) -> None:
    promote(store, patched())
    load_map(f"{NAME}@champion", store=store)
    [cached] = (tmp_path / "cache").rglob("map.pt")
    flip_byte(cached)
    assert load_map(f"{NAME}@champion", store=store) == make_map()
    assert AffineMap.load(cached) == make_map()


@pytest.mark.parametrize(
    ("out", "words"), [("a.bin", "name a .pt or"), ("no/a.pt", "does not exist; create")]
)
def test_fetch_refuses_impossible_places(store: Store, out: str, words: str) -> None:
    with pytest.raises(MechdiffError, match=words):
        fetch(f"{NAME}@champion", out, store=store)


def test_rollback_goes_back_step_by_step(store: Store, patched: Patch) -> None:
    for seed in (1, 2, 3):
        promote(store, patched(seed), why=f"seed {seed}")
    assert rollback(store, NAME, why="wrong split").number == 2
    assert rollback(store, NAME).number == 1
    with pytest.raises(MechdiffError, match="no earlier version"):
        rollback(store, NAME)
    made = history(store, NAME)
    assert [(m.action, m.source, m.target) for m in made] == [
        ("promote", None, 1),
        ("promote", 1, 2),
        ("promote", 2, 3),
        ("rollback", 3, 2),
        ("rollback", 2, 1),
    ]
    assert [m.why for m in made] == ["seed 1", "seed 2", "seed 3", "wrong split", ""]
    assert all(m.who and m.when_ms > 0 for m in made)
    assert load_map(f"{NAME}@champion", store=store) == make_map(1)


def test_rollback_checks_what_it_goes_back_to(store: Store, patched: Patch) -> None:
    promote(store, patched(1))
    [first] = stored(store)
    promote(store, patched(2))
    flip_byte(first)
    with pytest.raises(MechdiffError, match="has changed"):
        rollback(store, NAME)
    assert get_version(store, NAME, "champion").number == 2


def test_demoting_takes_the_name_away_and_rollback_gives_it_back(store: Store, patched: Patch) -> None:
    promote(store, patched())
    demote(store, NAME, why="p-hacked")
    assert list_winners(store) == []
    with pytest.raises(MechdiffError, match="has no alias 'champion'; it has none"):
        load_map(f"{NAME}@champion", store=store)
    with pytest.raises(MechdiffError, match="has no alias 'champion'"):
        demote(store, NAME)
    assert rollback(store, NAME).number == 1
    assert [m.action for m in history(store, NAME)] == ["promote", "demote", "rollback"]


def test_aliases_moved_by_others_are_in_the_history(store: Store, patched: Patch) -> None:
    for seed in (1, 2, 3):
        promote(store, patched(seed))
    store.client.set_registered_model_alias(NAME, "champion", "1")
    assert history(store, NAME)[-1] == Move("outside", 3, 1)
    promote(store, patched(4))
    assert [(m.action, m.source, m.target) for m in history(store, NAME)][2:] == [
        ("promote", 2, 3),
        ("outside", 3, 1),
        ("promote", 1, 4),
    ]


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=8))
def test_history_tells_moves_that_happened_from_those_that_a_crash_prevented(
    plan: list[tuple[int, bool]],
) -> None:
    at, announced, made = None, [], []
    for target, crashes in plan:
        if target == at:
            continue
        announced.append(Move("promote", at, target))
        if not crashes:
            made.append(announced[-1])
            at = target
    assert moves.happened(announced, at) == made


A = Move("promote", 1, 2, when_ms=10, made_ms=20)
B = Move("promote", 1, 3, when_ms=11, made_ms=21)
FIRST = Move("promote", None, 1, when_ms=1, made_ms=2)
THEN = Move("promote", 2, 4, when_ms=30, made_ms=31)


@pytest.mark.parametrize(
    ("recorded", "holder", "made"),
    [
        ([FIRST, A, B], 3, [FIRST, A, B]),
        ([FIRST, A, B], 2, [FIRST, B, A]),
        ([FIRST, A, B, THEN], 4, [FIRST, B, A, THEN]),
        ([FIRST, A, B], 1, [FIRST, A, B, Move("outside", 3, 1)]),
        ([FIRST, A, replace(THEN, source=1)], 4, [FIRST, A, Move("outside", 2, 1), replace(THEN, source=1)]),
    ],
)
def test_moves_made_at_once_are_all_in_the_history_and_none_is_taken_for_another_programs(
    recorded: list[Move], holder: int, made: list[Move]
) -> None:
    assert moves.happened(recorded, holder) == made


def test_who_was_overtaken_is_told_and_the_last_move_stays(
    store: Store, patched: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, patched(1))
    others = patched(2)
    mine = patched(3)
    move = store.client._client.set_registered_model_alias
    monkeypatch.setattr(moves, "promotion_lock", lambda _: nullcontext())  # two machines

    def and_another(name: str, alias: str, version: str) -> None:
        move(name, alias, version)
        monkeypatch.setattr(store.client._client, "set_registered_model_alias", move)
        promote(store, others)

    monkeypatch.setattr(store.client._client, "set_registered_model_alias", and_another)
    with pytest.raises(moves.MovedMeanwhile, match="went to version 2 and is at version 3 now"):
        promote(store, mine)
    assert get_version(store, NAME, "champion").run_id == others
    assert [(m.action, m.source, m.target) for m in history(store, NAME)] == [
        ("promote", None, 1),
        ("promote", 1, 2),
        ("promote", 2, 3),
    ]
    promote(store, mine)  # the remedy
    assert get_version(store, NAME, "champion").number == 2


def test_what_was_promoted_meanwhile_is_looked_at_before_the_alias_moves(
    store: Store, patched: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A better map that got the alias after the first look is not replaced by a worse one."""
    promote(store, patched(1))
    best, mine = patched(2, metrics={**METRICS, "skill_pct": 33.0}), patched(3)
    monkeypatch.setattr(moves, "promotion_lock", lambda _: nullcontext())  # two machines
    create = store.client._client.create_model_version

    def and_another(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(store.client._client, "create_model_version", create)
        promote(store, best)
        return create(*args, **options)

    monkeypatch.setattr(store.client._client, "create_model_version", and_another)
    with pytest.raises(MechdiffError, match=r"worse on the same prompts; .* skill 33.0 .* skill 30.0"):
        promote(store, mine)
    assert get_version(store, NAME, "champion").run_id == best
    assert len(history(store, NAME)) == 2


def test_a_rollback_does_not_undo_what_it_has_not_seen(
    store: Store, patched: Patch, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, patched(1))
    promote(store, patched(2))
    other = patched(3)
    monkeypatch.setattr(moves, "promotion_lock", lambda _: nullcontext())  # two machines
    look = store.client._client.get_model_version

    def and_another(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(store.client._client, "get_model_version", look)
        promote(store, other)
        return look(*args, **options)

    monkeypatch.setattr(store.client._client, "get_model_version", and_another)
    with pytest.raises(MechdiffError, match="was moved meanwhile"):
        rollback(store, NAME)
    assert get_version(store, NAME, "champion").run_id == other


def test_a_command_taken_over_at_any_time_does_not_move_the_alias(store: Store, patched: Patch) -> None:
    promote(store, patched(1))
    asked: list[int] = []
    promote(store, patched(2), here=owned_by(lambda: asked.append(1)))
    assert len(asked) >= 2
    for last in range(len(asked)):
        times: list[int] = []

        def lost(times: list[int] = times, last: int = last) -> None:
            times.append(1)
            if len(times) > last:
                raise RunTakenOver("Run r was taken over by process 7 on far.")

        with pytest.raises(RunTakenOver):
            promote(store, patched(3 + last), here=owned_by(lost))
        assert get_version(store, NAME, "champion").number == 2


def test_a_version_is_read_back_where_the_registry_has_it(
    store: Store, patched: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A registry that keeps a copy of its own: what it copied wrongly does not get the alias."""
    promote(store, patched(1))
    run_id, where = patched(2), store.client._client.get_model_version_download_uri

    def copied(*args: Any) -> str:
        shutil.copytree(Path(where(*args).removeprefix("file://")), tmp_path / "copy", dirs_exist_ok=True)
        flip_byte(tmp_path / "copy" / "map.pt")
        return str(tmp_path / "copy")

    with monkeypatch.context() as patch:
        patch.setattr(store.client._client, "get_model_version_download_uri", copied)
        with pytest.raises(MechdiffError, match="changed"):
            promote(store, run_id)
        assert get_version(store, NAME, "champion").number == 1
    assert promote(store, run_id).aliases == ("champion",)  # the remedy


def test_measurements_are_compared_only_on_prompts_of_one_digest(store: Store, patched: Patch) -> None:
    """As many prompts of the same split are other prompts where their digests differ."""
    tags = {"selection_leak": "false", "mechdiff.prompts": "p1"}
    promote(store, patched(1, tags=tags))
    better = {"metrics": {**METRICS, "skill_pct": 31.0}}
    with pytest.raises(MechdiffError, match="measured on different prompts"):
        promote(store, patched(2, tags={**tags, "mechdiff.prompts": "p2"}, **better))
    assert promote(store, patched(2, tags=tags, **better)).number == 2


def owned_by(require_owner: Callable[[], object]) -> OpenRun:
    """A command of another run, which may be taken over."""
    nothing = SimpleNamespace(written=lambda _: None, model_of=lambda _: None, require_owner=require_owner)
    return cast(OpenRun, nothing)


def test_a_command_that_was_taken_over_registers_nothing(store: Store, patched: Patch) -> None:
    calls: list[str] = []

    def lost() -> None:
        calls.append("asked")
        raise RunTakenOver("Run r was taken over by process 7 on far.")

    with pytest.raises(RunTakenOver):
        promote(store, patched(1), here=owned_by(lost))
    assert (calls, list_versions(store, NAME)) == (["asked"], [])


def test_a_record_that_is_none_is_left_out_and_disturbs_nobody(store: Store, patched: Patch) -> None:
    promote(store, patched(1))
    for n, text in enumerate(["[" * 4000, "{", "7", '{"action": [], "source": 1}', '{"when_ms": 1e400}']):
        store.client.set_model_version_tag(NAME, "1", f"mechdiff.move.champion.{n}.0123abcd", text)
    wild = Move("rollback", 7, 9, when_ms=3)
    store.client.set_model_version_tag(NAME, "1", "mechdiff.move.champion.3.0123abce", wild.text())
    promote(store, patched(2))
    assert history(store, NAME)[-1].target == 2
    assert rollback(store, NAME).number == 1


def test_moves_of_earlier_releases_are_read_from_the_registered_map(store: Store, patched: Patch) -> None:
    promote(store, patched(1))
    promote(store, patched(2))
    for version in list_versions(store, NAME):
        for n, key in enumerate(key for key in version.tags if key.startswith("mechdiff.move.")):
            fields = json.loads(version.tags[key])
            del fields["made_ms"]
            old = f"mechdiff.move.champion.{version.number + n:06d}.0123abcd"
            store.client.set_registered_model_tag(NAME, old, json.dumps(fields))
            store.client.delete_model_version_tag(NAME, str(version.number), key)
    promote(store, patched(3))
    assert [m.source for m in history(store, NAME)] == [None, 1, 2]
    assert rollback(store, NAME).number == 2


def test_winners_of_every_name_are_listed(store: Store, patched: Patch) -> None:
    promote(store, patched(1))
    promote(store, patched(2), alias="second")
    promote(store, patched(3), name="another")
    store.client.create_registered_model("not-a-map")
    found = [(str(v), v.aliases) for v in list_winners(store)]
    assert found == [("another/1", ("champion",)), (f"{NAME}/1", ("champion",)), (f"{NAME}/2", ("second",))]


@pytest.mark.parametrize(
    ("policy", "changes", "words"),
    [
        (PromotionPolicy(min_drop_pct=40), {}, "min_drop_pct: drop_pct is 34.2, at least 40"),
        (
            PromotionPolicy(min_skill_pct=5),
            {"metrics": {"KL_mapped": 1.0}},
            "min_skill_pct: no skill_pct, at least 5",
        ),
        (UNFORCED, {"metrics": {**METRICS, "ci/drop_pct_low": -1.0}}, "ci_above_zero: ci/drop_pct_low is -1"),
        (UNFORCED, {"metrics": {**METRICS, "ci/skill_pct_low": 0.0}}, "ci_above_zero: ci/skill_pct_low is 0"),
        (UNFORCED, {"metrics": {"KL_mapped": 1.0, "KL_raw": 2.0}}, "ci_above_zero: no ci/drop_pct_low"),
        (UNFORCED, {"metrics": {}}, "force: no run has measured this map"),
        (UNFORCED, {"tags": {"selection_leak": "true"}}, "allow_leak: a choice was made"),
        (UNFORCED, {"tags": {"selection_leak": "unknown"}}, "allow_leak: the map does not say"),
        (UNFORCED, {"tags": {}}, "allow_leak: the map does not say"),
        (
            UNFORCED,
            {"metrics": {**METRICS, "skill_pct": 28.0}},
            r"force: it is worse on the same prompts; the present version has drop 34.2 \[30.1, 38.0\] %, "
            r"skill 30.0 \[25.0, 35.0\] %, this one .* skill 28.0",
        ),
        (
            UNFORCED,
            {"tags": {"selection_leak": "false", "mechdiff.prompts": "p2"}, "params": {**PARAMS, "n": 9}},
            "force: they were measured on different prompts and cannot be compared",
        ),
        (
            PromotionPolicy(),
            {"params": {**PARAMS, "pair_fingerprint": "f2"}},
            "allow_pair_mismatch: .* f2, .* f1",
        ),
        (
            PromotionPolicy(),
            {"tags": {"selection_leak": "false", "pair_fingerprint": "f1", "fitted_on_pair": "f0"}},
            "allow_pair_mismatch: it was measured on pair f1 and fitted on f0",
        ),
    ],
)
def test_a_refusal_names_the_rule_and_leaves_the_alias(
    store: Store, patched: Patch, policy: PromotionPolicy, changes: dict[str, Any], words: str
) -> None:
    promote(store, patched(1))
    with pytest.raises(MechdiffError, match=words):
        promote(store, patched(2, **changes), policy=policy)
    assert get_version(store, NAME, "champion").number == 1
    assert len(list_versions(store, NAME)) == 1
    # The waiver that every refusal names works, and the history tells it.
    promote(store, patched(2, **changes), policy=policy.with_rules(force=True))
    assert get_version(store, NAME, "champion").number == 2
    assert history(store, NAME)[-1].rules.endswith("force")


def test_old_and_new_are_said(store: Store, patched: Patch) -> None:
    said: list[str] = []
    promote(store, patched(1), say=said.append)
    assert said == []
    better = {"metrics": {**METRICS, "skill_pct": 31.0}}
    promote(store, patched(2, **better), say=said.append)
    assert said.pop() == (
        f"{NAME}@champion: version 1 with drop 34.2 [30.1, 38.0] %, skill 30.0 [25.0, 35.0] % gives way to "
        "version 2 with drop 34.2 [30.1, 38.0] %, skill 31.0 [25.0, 35.0] % (on the same prompts)."
    )
    promote(store, patched(2, **better), say=said.append)  # the same map, from another run
    assert said == [f"{NAME}@champion is this very map already, version 2; nothing moves."]
    assert [m.target for m in history(store, NAME)] == [1, 2]


def test_a_map_of_the_alias_gets_the_numbers_that_it_had_not(store: Store, patched: Patch) -> None:
    promote(store, patched(1, metrics={}), policy=FORCED)
    assert promote(store, patched(1)).number == 2
    assert promote(store, patched(1)).number == 2


def test_a_map_without_a_record_of_its_choices_is_not_taken_for_clean(
    store: Store, tracker: Tracker, patched: Patch
) -> None:
    """Earlier versions tagged `selection_leak=false` whatever the map had gone through."""
    old = replace(make_map(), meta={k: v for k, v in make_map().meta.items() if k != "selection"})
    with tracker.run("run", "old") as run:
        record = RunRecord(kind="patch", name="old", params=PARAMS, metrics=METRICS, map=old)
        found = run.log(replace(record, tags={"selection_leak": "false"}))
    with pytest.raises(MechdiffError, match="allow_leak: the map does not say on which prompts"):
        promote(store, found)
    version = promote(store, found, policy=PromotionPolicy(allow_leak=True))
    assert version.tags["selection_leak"] == "unknown"
    assert "It is not known on which prompts" in store.client.get_model_version(NAME, "1").description


def test_a_policy_that_is_met_or_relaxed_lets_pass(store: Store, patched: Patch) -> None:
    promote(store, patched(1), policy=PromotionPolicy(min_drop_pct=34.2, ci_above_zero=True))
    leaking = patched(2, tags={"selection_leak": "true"}, params={**PARAMS, "pair_fingerprint": "f2"})
    harmful = patched(3, metrics={**METRICS, "ci/drop_pct_low": -9.0})
    loose = PromotionPolicy(ci_above_zero=False)
    assert promote(store, harmful, policy=loose, name="loose").number == 1
    assert str(loose) == "no ci_above_zero"
    relaxed = PromotionPolicy(allow_leak=True, allow_pair_mismatch=True)
    assert promote(store, leaking, policy=relaxed).number == 2
    with pytest.raises(MechdiffError, match="min_drop_pct is nan"):
        PromotionPolicy(min_drop_pct=float("nan"))


def test_diff_compares_settings_numbers_and_maps(store: Store, patched: Patch) -> None:
    promote(store, patched(1, alpha=0.3))
    promote(store, patched(2, alpha=0.7, metrics={**METRICS, "drop_pct": 40.0}))
    found = diff(store, f"{NAME}/1", f"{NAME}@champion")
    assert found.facts == {"alpha": ("0.3", "0.7"), "drop_pct": ("34.2", "40.0")}
    a, b = make_map(1).dense(), make_map(2).dense()
    eye = torch.eye(D, dtype=torch.float64)
    assert found.cosine_weight == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())))
    a, b = a - eye, b - eye
    assert found.cosine_update == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())))
    same = diff(store, f"{NAME}/1", f"{NAME}/1")
    assert same.facts == {}
    assert same.cosine_weight == pytest.approx(1)
    with pytest.raises(MechdiffError, match="is no registered version"):
        diff(store, f"runs:/{patched.fit}", f"{NAME}/1")


class Crash(BaseException):
    """The promoter's process is gone: nothing after this is done, not even clean-up."""


class CrashingClient:
    """A client whose process dies at the n-th call that changes something, before or after the change."""

    _CHANGING = ("create_", "set_", "log_", "finalize_", "delete_")

    def __init__(self, client: Any, at: int | None = None, after: bool = False) -> None:
        self._client, self._at, self._after = client, at, after
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return self._counted(name, method) if name.startswith(self._CHANGING) else method

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._at is not None and len(self.calls) > self._at:
                raise Crash
            self.calls.append(name)
            dying = len(self.calls) - 1 == self._at
            if dying and not self._after:
                raise Crash
            result = method(*arguments, **options)
            if dying:
                raise Crash
            return result

        return call


def test_a_promoter_killed_at_any_step_leaves_the_alias_and_is_finished_later(
    store: Store, patched: Patch
) -> None:
    promote(store, patched(0, alpha=0.3))
    counting = CrashingClient(store.client)
    promote(replace(store, client=counting), patched(1, alpha=0.3))  # type: ignore[arg-type]
    steps = counting.calls
    # The last step of all but one, which marks the move as made.
    assert steps[-2:] == ["set_registered_model_alias", "set_model_version_tag"]
    assert len(steps) >= 10
    # To die after a step is to die before the next one, but for the last.
    points = [(step, False) for step in range(len(steps))] + [(len(steps) - 1, True)]
    for seed, (step, finished_after) in enumerate(points, start=2):
        after = finished_after or step == len(steps) - 1
        before = get_version(store, NAME, "champion")
        run_id = patched(seed, alpha=0.3)
        crashing = replace(store, client=CrashingClient(store.client, step, finished_after))  # type: ignore[arg-type]
        with pytest.raises(Crash):
            promote(crashing, run_id)
        champion = get_version(store, NAME, "champion")
        assert (champion.number != before.number) == after, f"at {steps[step]}"
        expected = make_map(seed if after else seed - 1).with_alpha(0.3)
        assert load_map(f"{NAME}@champion", store=store) == expected

        finished = promote(store, run_id)
        assert "champion" in finished.aliases
        assert [v.run_id for v in list_versions(store, NAME)].count(run_id) == 1, f"at {steps[step]}"
        assert load_map(f"{NAME}@champion", store=store) == make_map(seed).with_alpha(0.3)
    made = history(store, NAME)
    assert [m.target for m in made] == list(range(1, len(points) + 3))
    assert [m.source for m in made] == [None, *range(1, len(points) + 2)]
    for model in store.client.search_logged_models([store.experiment("demo")]):
        if model.status == "READY":
            load_map(f"models:/{model.model_id}", store=store)


def test_a_promoter_ended_by_sigkill_is_finished_later(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few of the points of `benchmarks/kills.py`, which kills at all of them."""
    files = tmp_path / "store" / "mlartifacts"
    points = kills.points_of(store.uri, files)
    assert len(points) >= 20
    wanted = (
        "create_logged_model",
        "finalize_logged_model",
        "create_model_version",
        "set_registered_model_alias",
    )
    chosen = [p for p in points if p.kind == "after" and p.what in wanted]
    chosen += [p for p in points if p.kind == "file" and p.what in ("map.pt", "MLmodel")]
    assert len(chosen) >= 6
    sound: set[str] = set()
    for seed, point in enumerate(chosen, start=2):
        left = kills.kill_at(store.uri, files, point, seed, sound)
        assert left.problems == (), point
        assert left.moved == kills.moves_the_alias(point, points), point


def _promote_all(uri: str, run_ids: list[str], failures: "multiprocessing.Queue[str]") -> None:
    try:
        for run_id in run_ids:
            promote(open_store(uri), run_id)
            load_map(f"{NAME}@champion", tracking_uri=uri)
        failures.put("")
    except BaseException as error:
        failures.put(repr(error))


def test_a_promoter_waits_for_another_on_this_machine(store: Store, patched: Patch) -> None:
    promote(store, patched(1))
    run_id = patched(2)
    with ThreadPoolExecutor(1) as pool:
        with moves.promotion_lock(store):
            other = pool.submit(promote, store, run_id)
            assert wait([other], 2).not_done
            assert len(list_versions(store, NAME)) == 1
        assert other.result(60).number == 2


def test_several_promoters_take_turns(store: Store, patched: Patch) -> None:
    run_ids = [patched(seed, alpha=0.3) for seed in range(6)]
    context = multiprocessing.get_context("fork")
    failures: multiprocessing.Queue[str] = context.Queue()
    processes = [
        context.Process(target=_promote_all, args=(store.uri, run_ids[i::3], failures)) for i in range(3)
    ]
    for process in processes:
        process.start()
    assert [failures.get(timeout=60) for _ in processes] == [""] * 3
    for process in processes:
        process.join(timeout=60)
    made = list_versions(store, NAME)
    assert sorted(v.run_id for v in made) == sorted(run_ids)
    assert all(v.is_verified for v in made)
    done = history(store, NAME)
    assert [m.target for m in done] == [1, 2, 3, 4, 5, 6]
    assert [m.source for m in done] == [None, 1, 2, 3, 4, 5]


def test_the_cache_is_where_the_user_says(
    store: Store, patched: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(store, patched())
    monkeypatch.delenv(cache.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_map(f"{NAME}@champion", store=store)
    digest = resolve(store, f"{NAME}@champion").sha256
    assert (tmp_path / "xdg" / "mechdiff" / "maps" / digest / "MLmodel").is_file()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(MechdiffError, match=r"cannot be written .* MECHDIFF_CACHE"):
        load_map(f"{NAME}@champion", store=store)


def test_a_saved_directory_loads_by_its_path(tmp_path: Path) -> None:
    flavour.save_model(make_map(), tmp_path / "model")
    assert load_map(tmp_path / "model") == make_map()
    assert yaml.safe_load((tmp_path / "model" / "MLmodel").read_text())["flavors"].keys() == {
        "mechdiff",
        "python_function",
    }
    make_map().save(tmp_path / "a.safetensors")
    assert load_map(str(tmp_path / "a.safetensors")) == make_map()
    assert "MLFLOW_TRACKING_URI" not in os.environ
