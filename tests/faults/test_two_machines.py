"""An owner that stands still on one machine, while another machine takes its run over."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable

import pytest
from tracking.servers import Server

from faults import conditions
from faults.commands import Command, Place, error_of
from faults.conftest import CELLS
from faults.harness import World, has_children, only_parent, with_environment
from faults.snapshot import Snapshot, snapshot


@pytest.fixture
def machines(server: Server, new_place: Callable[..., Place]) -> list[Place]:
    """Two that share nothing but the server: each has lock files of its own."""
    places = [new_place(server.url) for _ in range(2)]
    for place in places:
        (place.folder / "tmp").mkdir()
    return [with_environment(place, TMPDIR=str(place.folder / "tmp")) for place in places]


def test_who_stood_still_does_not_touch_what_another_has_finished(
    world: World, right: Snapshot, machines: list[Place], experiment: str
) -> None:
    here, there = machines
    still = Command(here, *world.words(CELLS, experiment), before=conditions.short_timeout)
    still.wait_for(has_children(here.uri, 1, experiment))
    still.kill(signal.SIGSTOP)
    run_id = only_parent(here.uri, experiment).info.run_id
    other = Command(there, "resume", run_id, before=conditions.short_timeout)
    assert other.wait() == 0, other.output
    assert snapshot(there.uri, experiment).differences(right) == []
    assert still.is_alive, "it was over too soon to show anything"
    still.kill(signal.SIGCONT)
    assert still.wait() == 1, still.output
    assert "was taken over by process" in error_of(still.output)
    assert snapshot(there.uri, experiment).differences(right) == []


def test_an_owner_on_another_machine_that_works_is_left_alone(
    world: World, right: Snapshot, machines: list[Place], experiment: str
) -> None:
    here, there = machines
    slow = Command(here, *world.words(CELLS, experiment), before=conditions.slow_start)
    slow.wait_for(has_children(here.uri, 0, experiment))
    run_id = only_parent(here.uri, experiment).info.run_id
    # Nothing in the temporary files tells machines apart, or a copy of them would be taken for the first.
    shutil.copytree(here.folder / "tmp", there.folder / "tmp", dirs_exist_ok=True)
    other = Command(there, "resume", run_id, before=conditions.short_timeout)
    assert other.wait() == 1, other.output
    assert f"process {slow.pid}" in error_of(other.output)
    assert slow.wait() == 0, slow.output
    assert snapshot(there.uri, experiment).differences(right) == []
