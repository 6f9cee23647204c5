"""A disk that fills up with database and artifacts on it: one sentence, and what it left is resumed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults.commands import Command, Place, error_of, mechdiff
from faults.conftest import CELLS
from faults.harness import World
from faults.snapshot import Snapshot, snapshot

LINES = 3
"""Of all that a command may print when it fails so."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def leave(folder: Path, free: int) -> None:
    """Fill the disk up to so many bytes."""
    usage = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, usage.f_bavail * usage.f_frsize - free)))


def assert_one_sentence(command: Command) -> None:
    assert command.wait() == 1, command.output
    assert "Traceback" not in command.output, command.output[:3000]
    assert len(command.output.splitlines()) <= LINES, command.output[:3000]
    said = error_of(command.output)
    assert any(words in said for words in ("disk is full", "No space left")), command.output
    assert "make room" in said, said


@pytest.mark.parametrize("free_kib", [0, 300])
def test_no_room_to_make_the_store(
    world: World, new_place: Callable[..., Place], disk: Path, free_kib: int
) -> None:
    place = new_place(f"sqlite:///{disk / 'mlflow.db'}")
    leave(disk, free_kib << 10)
    assert_one_sentence(Command(place, *world.words(CELLS)))
    (disk / "filler").unlink()
    mechdiff(place, *world.words(CELLS))


@pytest.mark.parametrize("free_kib", [0, 48, 200, 500])
def test_no_room_while_a_sweep_is_written(
    world: World, right: Snapshot, new_place: Callable[..., Place], disk: Path, free_kib: int
) -> None:
    shutil.copy(world.empty, disk / "mlflow.db")
    place = new_place(f"sqlite:///{disk / 'mlflow.db'}")
    leave(disk, free_kib << 10)
    command = Command(place, *world.words(CELLS))
    assert_one_sentence(command)
    (disk / "filler").unlink()
    if "nothing to resume" in mechdiff(place, "resume"):
        assert not free_kib
        mechdiff(place, *world.words(CELLS))
    assert snapshot(place.uri).differences(right) == []
