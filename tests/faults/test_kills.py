"""Commands that are killed, and resumed."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from faults.commands import Command, Place, error_of, mechdiff
from faults.conftest import CELLS
from faults.harness import (
    RUN,
    World,
    has_children,
    killed_at_point,
    only_parent,
    resumed,
    spread,
    steps_of,
    undisturbed,
)
from faults.snapshot import Snapshot, snapshot


def test_a_sweep_killed_anywhere_is_finished_by_resuming_it(
    world: World, right: Snapshot, new_place: Callable[..., Place]
) -> None:
    points = steps_of(world, CELLS, new_place())
    # Then the parent has nothing but what it was made with.
    first = next(point for point, name in points.items() if (point.kind, name) == ("after", "create_run"))
    for point in (first, *spread(points, 3, seed=3)):
        place = new_place()
        killed_at_point(world, CELLS, place, point)
        outcome = resumed(world, CELLS, place, right, str(point))
        assert outcome.problems == [], outcome.how


def test_a_fit_and_its_patch_killed_anywhere_are_finished_by_resuming(
    world: World, new_place: Callable[..., Place]
) -> None:
    right = undisturbed(world, RUN, new_place())
    points = steps_of(world, RUN, new_place())
    for point in spread(points, 2, seed=4):
        place = new_place()
        killed_at_point(world, RUN, place, point)
        outcome = resumed(world, RUN, place, right, str(point))
        assert outcome.problems == [], outcome.how


def test_the_newest_unfinished_run_is_resumed_without_an_id(
    world: World, right: Snapshot, place: Place
) -> None:
    command = Command(place, *world.words(CELLS))
    command.wait_for(has_children(place.uri, 1))
    command.kill()
    command.wait()
    parent = only_parent(place.uri)
    assert parent.info.status == "RUNNING"
    stuck = mechdiff(place, "runs", "--stuck", code=None)
    assert parent.info.run_id in stuck
    mechdiff(place, "resume")
    assert snapshot(place.uri).differences(right) == []
    assert only_parent(place.uri).info.run_id == parent.info.run_id


def test_sigterm_ends_a_sweep_killed_and_it_can_be_resumed(
    world: World, right: Snapshot, place: Place
) -> None:
    command = Command(place, *world.words(CELLS))
    command.wait_for(has_children(place.uri, 1))
    command.kill(signal.SIGTERM)
    assert command.wait() == 128 + signal.SIGTERM
    assert "RUNNING" not in snapshot(place.uri, artifacts=False).statuses
    assert only_parent(place.uri).info.status == "KILLED"
    mechdiff(place, "resume", only_parent(place.uri).info.run_id)
    assert snapshot(place.uri).differences(right) == []


def test_of_two_that_resume_at_once_one_works_and_the_other_says_who(
    world: World, right: Snapshot, place: Place
) -> None:
    command = Command(place, *world.words(CELLS))
    command.wait_for(has_children(place.uri, 1))
    command.kill()
    command.wait()
    run_id = only_parent(place.uri).info.run_id
    both = [Command(place, "resume", run_id) for _ in range(2)]
    codes = [one.wait() for one in both]
    assert sorted(codes) == [0, 1], [one.output for one in both]
    winner, loser = sorted(both, key=lambda one: codes[both.index(one)])
    assert f"process {winner.pid}" in error_of(loser.output), loser.output
    assert run_id in error_of(loser.output)
    assert snapshot(place.uri).differences(right) == []


@pytest.mark.parametrize("state", ["working", "stopped"])
def test_a_run_whose_owner_is_alive_cannot_be_resumed(
    world: World, right: Snapshot, place: Place, state: str
) -> None:
    command = Command(place, *world.words(CELLS))
    command.wait_for(has_children(place.uri, 0))
    run_id = only_parent(place.uri).info.run_id
    if state == "stopped":
        command.kill(signal.SIGSTOP)
    refused = mechdiff(place, "resume", run_id, code=1)
    assert command.is_alive, "it was over too soon to show anything"
    command.kill(signal.SIGCONT)
    assert command.wait() == 0, command.output
    assert f"process {command.pid}" in error_of(refused)
    assert snapshot(place.uri).differences(right) == []


def test_a_finished_run_is_left_alone(world: World, place: Place) -> None:
    mechdiff(place, *world.words(CELLS))
    before = snapshot(place.uri)
    assert "nothing to resume" in mechdiff(place, "resume")
    assert "nothing to resume" in mechdiff(place, "resume", only_parent(place.uri).info.run_id)
    assert snapshot(place.uri) == before
