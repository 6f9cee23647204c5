"""Kills a command, resumes it, and compares what the store then holds with an undisturbed run.

Everything is looked at from outside: the command line, and MLflow's public API.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from toy import write_pair

from faults.commands import Command, Place, error_of, mechdiff
from faults.deadly import Point
from faults.snapshot import PARENT_TAG, Difference, Snapshot, active_runs, parents, snapshot

SWEEP = ("sweep", "--sites", "L2/attn_out,L3/resid_post", "--ranks", "1,2,4,full", "--targets", "30")
"""Eight cells on the toy pair; `--pair` and `--experiment` are added."""
RUN = ("run", "--layer", "2", "--hook", "attn_out", "--k", "2", "--alpha", "0.7")
"""A fit and a patch run."""
_QUIET = {
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "200",
    "MECHDIFF_SERVER_PATIENCE_S": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass(frozen=True)
class Outcome:
    """What a kill left, and what resuming made of it.

    Args:
        how: When it was killed.
        seen: What the store held then: `nothing`, `computing` (a parent alone), `logging` (some children),
            `done`.
        left_running: How many runs the kill left RUNNING.
        failure: What resuming said instead of finishing; empty is good.
        differences: What the store then holds otherwise than after an undisturbed run; empty is good.
        resume_s: How long resuming took.
    """

    how: str
    seen: str
    left_running: int
    failure: str
    differences: tuple[Difference, ...]
    resume_s: float

    @property
    def problems(self) -> list[str]:
        """All that is wrong, to be read."""
        return [*filter(None, [self.failure]), *map(str, self.differences)]

    def count(self, *kinds: str) -> int:
        """How many differences are of these kinds."""
        return sum(difference.kind in kinds for difference in self.differences)


@dataclass(frozen=True)
class World:
    """A toy pair, an empty SQLite store to copy, and a folder for everything that is tried.

    Args:
        folder: Where.
        pair: The pair's spec.
        empty: A store with its tables and nothing else.
    """

    folder: Path
    pair: Path
    empty: Path

    def place(self, name: str, uri: str = "") -> Place:
        """A new directory with an empty SQLite store, or for commands that use the server at `uri`."""
        folder = self.folder / name
        folder.mkdir()
        if not uri:
            shutil.copy(self.empty, folder / "mlflow.db")
            uri = f"sqlite:///{folder / 'mlflow.db'}"
        return Place(folder, uri, {**_QUIET, "XDG_CACHE_HOME": str(self.folder / "cache")})

    def words(self, command: Sequence[str], experiment: str = "toy") -> tuple[str, ...]:
        """`command` on the toy pair."""
        name, *rest = command
        return (name, "--pair", str(self.pair), *rest, "--experiment", experiment)


def make_world(folder: Path) -> World:
    """Write the pair and the empty store; a few seconds."""
    pair = write_pair(folder / "toy")
    empty = folder / "empty" / "mlflow.db"
    empty.parent.mkdir()
    # The command line itself makes the store; listing an empty one says so, with whatever exit code.
    place = Place(empty.parent, f"sqlite:///{empty}", _QUIET)
    mechdiff(place, "runs", code=None)
    with closing(sqlite3.connect(empty)) as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (0,)
    return World(folder, pair, empty)


def undisturbed(world: World, command: Sequence[str], place: Place, experiment: str = "toy") -> Snapshot:
    """What `command` leaves when nothing happens to it."""
    mechdiff(place, *world.words(command, experiment))
    shot = snapshot(place.uri, experiment)
    assert set(shot.statuses) == {"FINISHED"}, shot.statuses
    return shot


def killed_at_point(
    world: World, command: Sequence[str], place: Place, point: Point, experiment: str = "toy"
) -> Command:
    """`command`, ended by itself at `point` or at its end if it never gets there."""
    doomed = Command(place, *world.words(command, experiment), point=point)
    doomed.wait()
    return doomed


def killed_after(
    world: World, command: Sequence[str], place: Place, seconds: float, experiment: str = "toy"
) -> Command:
    """`command`, ended from outside after some seconds."""
    doomed = Command(place, *world.words(command, experiment))
    doomed.leave(seconds)
    doomed.kill()
    doomed.wait()
    return doomed


def resumed(
    world: World, command: Sequence[str], place: Place, right: Snapshot, how: str, experiment: str = "toy"
) -> Outcome:
    """Look at what a killed `command` left, finish it as a user would, and compare with `right`."""
    client = MlflowClient(place.uri)
    runs = list(active_runs(client, experiment))
    children = [run for run in runs if PARENT_TAG in run.data.tags]
    unfinished = [run for run in parents(client, experiment) if run.info.status != "FINISHED"]
    seen = _seen(runs, children, unfinished)
    running = sum(run.info.status == "RUNNING" for run in runs)
    start = time.monotonic()
    failure = ""
    if unfinished:
        words: tuple[str, ...] = ("resume", unfinished[-1].info.run_id)
    elif runs:
        words = ()
    else:
        words = world.words(command, experiment)
    if words:
        again = Command(place, *words)
        code = again.wait()
        if code != 0 or "Traceback" in again.output:
            failure = f"mechdiff {words[0]} ended with {code}: {_said(again.output)}"
    seconds = time.monotonic() - start
    different = snapshot(place.uri, experiment).differences(right)
    return Outcome(how, seen, running, failure, tuple(different), seconds)


def steps_of(world: World, command: Sequence[str], place: Place, experiment: str = "toy") -> dict[Point, str]:
    """Every point at which `command` can be killed from inside, and the name of the call or file there."""
    log = place.folder / "steps.txt"
    counted = Command(place, *world.words(command, experiment), steps=log)
    assert counted.wait() == 0, counted.output
    points = {}
    for line in log.read_text().splitlines():
        kind, index, name = line.split(" ", 2)
        for one in ("before", "after") if kind == "call" else (kind,):
            points[Point(one, int(index))] = name
    return points


def spread(points: Collection[Point], n: int, seed: int) -> list[Point]:
    """`n` of the points at random, as many of each kind as there are."""
    rng = random.Random(seed)
    by_kind: dict[str, list[Point]] = {}
    for point in points:
        by_kind.setdefault(point.kind, []).append(point)
    for group in by_kind.values():
        rng.shuffle(group)
    picked: list[Point] = []
    while len(picked) < min(n, len(points)):
        picked += [group.pop() for group in by_kind.values() if group]
    return picked[:n]


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Return as soon as `condition` holds.

    Raises:
        TimeoutError: It does not.
    """
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.02)


def has_children(uri: str, n: int, experiment: str = "toy") -> Callable[[], bool]:
    """Whether a store has a parent by now, and at least `n` runs below it."""
    client = MlflowClient(uri)

    def look() -> bool:
        runs = list(active_runs(client, experiment))
        return bool(runs) and sum(PARENT_TAG in run.data.tags for run in runs) >= n

    return look


def only_parent(uri: str, experiment: str = "toy") -> Run:
    """The one run of an experiment that has no parent."""
    [parent] = parents(MlflowClient(uri), experiment)
    return parent


def with_environment(place: Place, **more: str) -> Place:
    """The same place, commands in it with more environment variables."""
    return replace(place, environment={**place.environment, **more})


def _said(output: str) -> str:
    return error_of(output) or output[-500:]


def _seen(runs: list[Run], children: list[Run], unfinished: list[Run]) -> str:
    if not runs:
        return "nothing"
    if not unfinished:
        return "done"
    return "logging" if children else "computing"


def clean_environment() -> None:
    """Take the user's settings of MLflow out of this process, and keep what it prints short."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "MECHDIFF_"))]:
        del os.environ[name]
    os.environ |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
