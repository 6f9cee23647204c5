"""What a journal keeps is used again, to the bit, and only if it is whole."""

from __future__ import annotations

import os
import resource
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from asking import SITES, answers, assert_same, replacements, some_map

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.workers import Journal, LocalWorkers
from mechdiff_mlflow.experiments.workers.tasks import Task, Tensors
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Position, Rank
from mechdiff_mlflow.spec.sites import Site


def journal(pair: Pair, folder: Path, **options: object) -> Journal:
    return Journal(LocalWorkers(pair), folder, version="1", **options)  # type: ignore[arg-type]


def forwards(pair: Pair) -> int:
    total = 0
    for side in pair.sides:
        with side.engine() as engine:
            total += engine.n_forwards
    return total


def score(workers: Journal, maps: dict[Site, dict[str, AffineMap]] | None = None) -> None:
    workers.score(workers.pair.prompts_of("val"), Position.DECISION, maps or replacements())


@pytest.mark.parametrize("in_memory", [True, False])
def test_numbers_are_the_same_with_a_journal_without_and_from_it(
    small_batches: Pair, tmp_path: Path, in_memory: bool
) -> None:
    expected = answers(LocalWorkers(small_batches))
    first = journal(small_batches, tmp_path / "kept", in_memory=in_memory)
    assert_same(answers(first), expected)
    assert first.n_found == 0
    assert first.n_computed > 10
    before = forwards(small_batches)
    again = journal(small_batches, tmp_path / "kept", in_memory=in_memory)
    assert_same(answers(again), expected)
    assert (again.n_found, again.n_computed) == (first.n_computed, 0)
    assert forwards(small_batches) == before
    again.discard()
    assert not (tmp_path / "kept").exists()


def test_a_study_is_the_same_with_a_journal_and_from_it(small_batches: Pair, tmp_path: Path) -> None:
    cells = [Cell(SITES[0], "procrustes_scaled", "update", Rank(k), Alpha.parse("0.5,1")) for k in (2, None)]

    def study(workers: Journal | None) -> list[pd.DataFrame]:
        now = Study(small_batches, Protocol(permutations=2), workers=workers)
        records = now.patch([fit.to_patch for fit in now.fit(cells)])
        return [record.per_prompt for record in records]

    expected = study(None)
    for _ in range(2):
        for found, table in zip(study(journal(small_batches, tmp_path)), expected, strict=True):
            pd.testing.assert_frame_equal(found, table, check_exact=True)


class Interrupted(LocalWorkers):
    """This process, which dies before its n-th task."""

    def __init__(self, pair: Pair, n: int) -> None:
        super().__init__(pair)
        self._left = n

    def run(self, task: Task, shards: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensors]]:
        for index, result in super().run(task, shards):
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            yield index, result


def test_after_an_interruption_only_the_rest_is_computed(small_batches: Pair, tmp_path: Path) -> None:
    expected = answers(LocalWorkers(small_batches))
    total = journal(small_batches, tmp_path / "whole")
    answers(total)
    for n in (1, 2, 7):
        folder = tmp_path / str(n)
        with pytest.raises(KeyboardInterrupt):
            answers(Journal(Interrupted(small_batches, n), folder, version="1"))
        rest = journal(small_batches, folder)
        assert_same(answers(rest), expected)
        assert rest.n_computed == total.n_computed - n
        assert rest.n_found == n


def damage_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def damage_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def rename(path: Path) -> None:
    path.rename(path.with_stem(f"{path.stem[:-1]}{'0' if path.stem[-1] != '0' else '1'}"))


def damage_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES = (damage_tail, damage_bit, damage_header, damage_link, rename)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_computed_again(small_batches: Pair, tmp_path: Path, damage: object) -> None:
    expected = answers(LocalWorkers(small_batches))
    answers(journal(small_batches, tmp_path))
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    damage(path)  # type: ignore[operator]
    again = journal(small_batches, tmp_path)
    with pytest.warns(UserWarning, match=r"is damaged \(.+\); it is computed again"):
        assert_same(answers(again), expected)
    assert again.n_computed == 1
    assert path.read_bytes() == whole


def test_what_was_being_written_is_no_entry(small_batches: Pair, tmp_path: Path) -> None:
    score(journal(small_batches, tmp_path))
    n = len(list(tmp_path.glob("*.safetensors")))
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    (tmp_path / ".abc.part").write_bytes(b"half")
    again = journal(small_batches, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(again)
    assert (again.n_computed, again.n_found) == (1, n - 1)


def test_all_that_numbers_depend_on_is_in_the_key(toy: Path, small_batches: Pair, tmp_path: Path) -> None:
    def computed(pair: Pair, maps: dict[Site, dict[str, AffineMap]], version: str = "1") -> int:
        workers = Journal(LocalWorkers(pair), tmp_path, version=version)
        score(workers, maps)
        return workers.n_computed

    maps = replacements()
    n = computed(small_batches, maps)
    assert n > 1
    assert computed(small_batches, replacements()) == 0
    meta = {**maps, SITES[0]: {k: m.with_meta(note="x") for k, m in maps[SITES[0]].items()}}
    assert computed(small_batches, meta) == 0, "what a map says of itself changes no number"
    other_alpha = {**maps, SITES[2]: {"one": some_map(2, 0.70001)}}
    assert computed(small_batches, other_alpha) == n
    renamed = {**maps, SITES[2]: {"two": some_map(2, 0.7)}}
    assert computed(small_batches, renamed) == 0, "nor does what it is called"
    assert computed(small_batches, {**maps, SITES[2]: {"one": some_map(3, 0.7)}}) == n
    assert computed(small_batches, maps, version="2") == n
    spec = PairSpec.load(str(toy))
    doubled = load_pair(spec, dtype="float64", options=EngineOptions(batch_size=4))
    assert computed(doubled, maps) == n
    assert computed(load_pair(spec, options=EngineOptions(batch_size=5)), maps) > 0
    plant = load_pair(PairSpec.load(str(toy)).model_copy(update={"system": "x"}))
    assert plant.fingerprint != small_batches.fingerprint
    assert computed(plant, maps) > 0


def test_a_full_disk_stops_with_what_to_do_and_keeps_the_rest(small_batches: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    workers = journal(small_batches, folder)
    prompts = small_batches.prompts_of("val")
    workers.capture("base", prompts, Position.DECISION, SITES)
    n_kept = len(list(folder.glob("*.safetensors")))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))
    try:
        with pytest.raises(MechdiffError, match=r"cannot be kept in .*kept \(.+\); make room there.*STAGING"):
            score(workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(list(folder.glob("*.safetensors"))) == n_kept
    assert not list(folder.glob("*.part")), "nothing half-written is left"
    assert not list(folder.glob(".*.part"))
    rest = journal(small_batches, folder)
    rest.capture("base", prompts, Position.DECISION, SITES)
    assert rest.n_computed == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_said(small_batches: Pair, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(MechdiffError, match="cannot be kept"):
        score(journal(small_batches, tmp_path / "kept"))


def test_a_file_in_place_of_the_folder_is_said(small_batches: Pair, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(MechdiffError, match="cannot be kept"):
        score(journal(small_batches, tmp_path / "kept"))


def test_others_cannot_read_what_is_kept(small_batches: Pair, tmp_path: Path) -> None:
    score(journal(small_batches, tmp_path / "kept"))
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    assert np.all([stat.S_IMODE(p.stat().st_mode) == 0o600 for p in (tmp_path / "kept").iterdir()])
