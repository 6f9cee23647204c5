"""A disk that is full or read-only, memory that runs out, and a clock that jumps."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults import conditions
from faults.commands import Command, Place, error_of, mechdiff
from faults.conftest import CELLS
from faults.harness import World, has_children, only_parent
from faults.snapshot import Snapshot, snapshot


def assert_stopped(command: Command, place: Place, *words: str) -> None:
    """It ended with one sentence, and nothing in the store looks alive or done."""
    assert command.wait() == 1, command.output
    assert "Traceback" not in command.output
    sentence = error_of(command.output)
    assert sentence.endswith("."), command.output
    assert any(word in sentence for word in words), sentence
    statuses = snapshot(place.uri, artifacts=False).statuses
    assert "RUNNING" not in statuses, statuses
    assert only_parent(place.uri).info.status == "FAILED"


def assert_resumed(place: Place, right: Snapshot) -> None:
    mechdiff(place, "resume", only_parent(place.uri).info.run_id)
    assert snapshot(place.uri).differences(right) == []


def test_no_room_for_large_files(world: World, right: Snapshot, place: Place) -> None:
    """The parent's page of figures is larger than what a file may be; the database is not."""
    command = Command(place, *world.words(CELLS), before=conditions.small_files)
    assert_stopped(command, place, "File too large")
    assert_resumed(place, right)


@pytest.fixture
def small_disk(place: Place) -> Iterator[Callable[[], None]]:
    """Puts the artifacts on a file system of 64 KiB; what is called grows it."""
    folder = place.folder / "mlartifacts"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(world: World, right: Snapshot, place: Place, small_disk: Callable[[], None]) -> None:
    assert_stopped(Command(place, *world.words(CELLS)), place, "No space left on device")
    small_disk()
    assert_resumed(place, right)


def test_artifacts_that_may_not_be_written(world: World, right: Snapshot, place: Place) -> None:
    folder = place.folder / "mlartifacts"
    folder.mkdir(mode=0o500)
    command = Command(place, *world.words(CELLS), before=conditions.no_override)
    assert_stopped(command, place, "Permission denied")
    folder.chmod(0o700)
    assert_resumed(place, right)


def test_a_database_that_may_not_be_written(world: World, place: Place) -> None:
    files = [place.folder / "mlflow.db", place.folder]
    for file in files:
        os.chmod(file, 0o500)
    try:
        # What the command prints goes to a file that is there already.
        command = Command.__new__(Command)
        os.chmod(place.folder, 0o700)
        command.__init__(place, *world.words(CELLS), before=_locked)  # type: ignore[misc]
        assert command.wait() == 1, command.output
        assert "Traceback" not in command.output
        assert str(place.folder / "mlflow.db") in error_of(command.output)
    finally:
        os.chmod(place.folder, 0o700)
        os.chmod(place.folder / "mlflow.db", 0o600)


def _locked() -> None:
    os.chmod(Path.cwd(), 0o500)
    conditions.no_override()


def test_memory_that_runs_out_makes_chunks_smaller_and_no_number_wrong(
    world: World, right: Snapshot, place: Place
) -> None:
    command = Command(place, *world.words(CELLS), before=conditions.little_memory)
    assert command.wait() == 0, command.output
    assert "Memory ran out" in command.output
    found = snapshot(place.uri)
    assert found.statuses == right.statuses
    for name, run in found.runs.items():
        wanted = {(key, step): value for key, step, value in right.runs[name].metrics}
        metrics = {(key, step): value for key, step, value in run.metrics}
        assert metrics == pytest.approx(wanted, rel=1e-3, abs=1e-6), name


def test_memory_for_not_even_one_prompt_is_a_sentence_and_resumable(
    world: World, right: Snapshot, place: Place
) -> None:
    command = Command(place, *world.words(CELLS), before=conditions.no_memory)
    assert_stopped(command, place, "does not fit in memory", "do not fit in memory")
    assert_resumed(place, right)


@pytest.mark.parametrize("clock", [conditions.clock_behind, conditions.clock_jumps])
def test_a_clock_that_is_wrong_breaks_no_lease(
    world: World, right: Snapshot, place: Place, clock: Callable[[], None]
) -> None:
    command = Command(place, *world.words(CELLS), before=None)
    command.wait_for(has_children(place.uri, 1))
    run_id = only_parent(place.uri).info.run_id
    other = Command(place, "resume", run_id, before=clock)
    assert other.wait() == 1, other.output
    assert f"process {command.pid}" in error_of(other.output)
    assert command.is_alive, "it was over too soon to show anything"
    command.kill()
    command.wait()
    again = Command(place, "resume", run_id, before=clock)
    assert again.wait() == 0, again.output
    assert snapshot(place.uri).differences(right) == []
