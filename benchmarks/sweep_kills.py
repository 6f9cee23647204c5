"""Kills sweeps at random, resumes them, and compares what is left with a sweep that was left in peace.

    python benchmarks/sweep_kills.py                    # SQLite and an MLflow server, 50 kills of each kind
    python benchmarks/sweep_kills.py --store sqlite --kills 5

The sweep has eight cells on a toy pair; every kill is a SIGKILL. *computing*: at a random moment before the
first cell is logged. *any moment*: at a random one of the whole. *logging*: right before or after a random
call of the store (HTTP request, where it is a server), when a file of the artifacts is about to be written,
or when half of it is. *twice*: the same, and the command that resumes it is killed in its turn. *fit and
patch*: `mechdiff run` in place of the sweep. *worker*: a worker process of the Ray engine, if there is one.
*stopped* (through a server alone): SIGSTOP at a random moment; `mechdiff resume` from what counts as another
machine, as it shares no temporary folder; SIGCONT when that has finished, or at a random moment of its work.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from faults import conditions  # noqa: E402
from faults.commands import Command, Place, error_of, mechdiff  # noqa: E402
from faults.deadly import die  # noqa: E402
from faults.harness import (  # noqa: E402
    RUN,
    SWEEP,
    Outcome,
    World,
    clean_environment,
    has_children,
    killed_after,
    killed_at_point,
    make_world,
    resumed,
    spread,
    steps_of,
    undisturbed,
    with_environment,
)
from faults.snapshot import INSTALLED, PARENT_TAG, Snapshot, active_runs, parents, snapshot  # noqa: E402
from mlflow.tracking import MlflowClient  # noqa: E402
from tracking.servers import serving  # noqa: E402

from mechdiff_mlflow.tracking.runs.provenance import code_version  # noqa: E402
from mechdiff_mlflow.tracking.runs.run_lock import OWNER_TAG  # noqa: E402

RAY_SWEEP = (*SWEEP, "--engine", "ray", "--workers", "2")
MARK = "MECHDIFF_FAULTS_MARK"
_LEAST_WORK_S = 0.5
GIVE_UP = 6
"""So many times more tries than kills that are wanted in one phase."""


@dataclass(frozen=True)
class Bench:
    """What a kind of kills needs.

    Args:
        world: The pair and the empty store.
        uri: Of a server; empty for a SQLite store of its own for each kill.
        n: How many kills.
        seed: Of all that is random.
        is_timeout_short: Whether an owner counts as dead after 4 s, not 60, where it is stopped.
    """

    world: World
    uri: str
    n: int
    seed: int
    is_timeout_short: bool = True

    def place(self) -> tuple[Place, str]:
        """A fresh place, and the name of an experiment that nobody else uses."""
        name = f"kill-{uuid.uuid4().hex[:8]}"
        return self.world.place(name, self.uri), name if self.uri else "toy"

    def right(self, command: Sequence[str]) -> Snapshot:
        """What the store holds after an undisturbed run."""
        place, experiment = self.place()
        return undisturbed(self.world, command, place, experiment)

    def finished(
        self, command: Sequence[str], right: Snapshot, how: str, tried: tuple[Place, str]
    ) -> Outcome:
        """Resume, look, and remove the folder where all is well."""
        place, experiment = tried
        outcome = resumed(self.world, command, place, right, how, experiment)
        if not outcome.problems:
            shutil.rmtree(place.folder)
        print(how, outcome.seen, *outcome.problems[:3], sep="; ", flush=True)
        return outcome


def computing(bench: Bench) -> list[Outcome]:
    """Killed at random moments before anything but the parent is there."""
    place, experiment = bench.place()
    command = Command(place, *bench.world.words(SWEEP, experiment))
    command.wait_for(has_children(place.uri, 1, experiment))
    until_s = time.monotonic() - command.started
    command.wait()
    found: list[Outcome] = []
    for outcome in _at_moments(bench, until_s, bench.n * GIVE_UP):
        if outcome.seen == "computing":
            found.append(outcome)
        if len(found) == bench.n:
            break
    return found


def any_moment(bench: Bench) -> list[Outcome]:
    """Killed at random moments."""
    place, experiment = bench.place()
    start = time.monotonic()
    mechdiff(place, *bench.world.words(SWEEP, experiment))
    return list(_at_moments(bench, time.monotonic() - start, bench.n))


def logging(bench: Bench) -> list[Outcome]:
    """Killed at random steps of logging and uploading."""
    return _at_steps(bench, SWEEP)


def fit_and_patch(bench: Bench) -> list[Outcome]:
    """The same with `mechdiff run`."""
    return _at_steps(bench, RUN)


def twice(bench: Bench) -> list[Outcome]:
    """Killed at a random step, and again while resuming."""
    right = bench.right(SWEEP)
    place, experiment = bench.place()
    points = spread(steps_of(bench.world, SWEEP, place, experiment), 2 * bench.n, bench.seed)
    outcomes = []
    for first, second in zip(points[::2], points[1::2], strict=True):
        place, experiment = bench.place()
        killed_at_point(bench.world, SWEEP, place, first, experiment)
        tops = [run for run in parents(MlflowClient(place.uri), experiment) if run.info.status != "FINISHED"]
        if tops:
            Command(place, "resume", tops[-1].info.run_id, point=second).wait()
        outcomes.append(bench.finished(SWEEP, right, f"{first}, then {second}", (place, experiment)))
    return outcomes


def worker(bench: Bench) -> list[Outcome]:
    """One of two workers of the Ray engine killed at random moments of their work; the driver lives."""
    right = bench.right(RAY_SWEEP)
    # Ray brings packages of its own along, which the list of what is installed then has too.
    others = [d for d in right.differences(bench.right(SWEEP)) if not d.text.startswith(INSTALLED)]
    if others:
        raise SystemExit(f"Without any kill Ray leaves something else than the local engine: {others[0]}.")
    rng, at_work_s = random.Random(bench.seed), 0.0
    outcomes: list[Outcome] = []
    while len(outcomes) < bench.n:
        place, experiment = bench.place()
        mark = uuid.uuid4().hex
        command = Command(with_environment(place, **{MARK: mark}), *bench.world.words(RAY_SWEEP, experiment))
        command.wait_for(lambda mark=mark: any(_workers(mark)))
        start = time.monotonic()
        if not at_work_s:  # the first is left alone, to see how long there are workers to kill
            command.wait_for(lambda mark=mark: not any(_workers(mark)))
            at_work_s = time.monotonic() - start
        after_s = rng.uniform(0, at_work_s)
        command.leave(after_s)
        victims = list(_workers(mark))
        if not victims:  # the machine was busier when that was measured
            at_work_s = max(_LEAST_WORK_S, min(at_work_s, after_s))
        if victims:
            with contextlib.suppress(ProcessLookupError):
                die(rng.choice(victims))
        command.wait()
        how = f"one of {len(victims)} workers"
        outcome = bench.finished(RAY_SWEEP, right, how, (place, experiment))
        if victims:
            outcomes.append(outcome)
    return outcomes


def stopped(bench: Bench) -> list[Outcome]:
    """Stopped at random moments, taken over from another machine, and let go on."""
    if not bench.uri:
        return []  # whoever uses a SQLite store sees its lock
    right, rng = bench.right(SWEEP), random.Random(bench.seed)
    place, experiment = bench.place()
    command = Command(place, *bench.world.words(SWEEP, experiment))
    command.wait_for(has_children(place.uri, 0, experiment))
    start = time.monotonic()
    command.wait()
    until_s = time.monotonic() - start
    outcomes: list[Outcome] = []
    for _ in range(bench.n * GIVE_UP):
        outcome = _stopped_once(bench, right, rng, until_s)
        if outcome is not None:
            print(outcome.how, outcome.seen, *outcome.problems[:3], sep="; ", flush=True)
            outcomes.append(outcome)
        if len(outcomes) == bench.n:
            break
    return outcomes


def _stopped_once(bench: Bench, right: Snapshot, rng: random.Random, until_s: float) -> Outcome | None:
    """One sweep, stopped and taken over; None where it had ended before."""
    place, experiment = bench.place()
    here, there = (_machine(place, name) for name in ("here", "there"))
    before = conditions.short_timeout if bench.is_timeout_short else conditions.own_machine
    owner = Command(here, *bench.world.words(SWEEP, experiment), before=before)
    owner.wait_for(has_children(place.uri, 0, experiment))
    after_s, wait = rng.uniform(0, until_s), rng.random() < 0.5
    owner.leave(after_s)
    if not owner.is_alive:
        return None
    owner.kill(signal.SIGSTOP)
    client = MlflowClient(place.uri)
    runs = list(active_runs(client, experiment))
    top = next(run for run in runs if PARENT_TAG not in run.data.tags)
    start = time.monotonic()
    other = Command(there, "resume", top.info.run_id, before=before)
    if not wait:
        other.wait_for(lambda: f"{OWNER_TAG}2" in client.get_run(top.info.run_id).data.tags)
        other.leave(rng.uniform(0, until_s))
        owner.kill(signal.SIGCONT)
    code = other.wait()
    seconds = time.monotonic() - start
    owner.kill(signal.SIGCONT)
    said = error_of(owner.output) if owner.wait() else "the stopped one ended with 0"
    failures = [f"resume ended with {code}: {error_of(other.output)}"] if code else []
    failures += (
        [] if "was taken over by" in said else [f"the stopped one said: {said or owner.output[-300:]}"]
    )
    different = tuple(snapshot(place.uri, experiment).differences(right))
    how = f"after {after_s:.1f} s, going on {'when' if wait else 'before'} the other had finished"
    running = sum(run.info.status == "RUNNING" for run in runs)
    return Outcome(how, f"{len(runs)} runs", running, "; ".join(failures), different, seconds)


def _machine(place: Place, name: str) -> Place:
    folder = place.folder / name
    folder.mkdir()
    return with_environment(place, TMPDIR=str(folder))


KINDS: dict[str, Callable[[Bench], list[Outcome]]] = {
    "computing": computing,
    "any moment": any_moment,
    "logging": logging,
    "twice": twice,
    "fit and patch": fit_and_patch,
    "worker": worker,
    "stopped": stopped,
}


def _at_moments(bench: Bench, until_s: float, n: int) -> Iterator[Outcome]:
    right, rng = bench.right(SWEEP), random.Random(bench.seed)
    for _ in range(n):
        tried, seconds = bench.place(), rng.uniform(0, until_s)
        killed_after(bench.world, SWEEP, tried[0], seconds, tried[1])
        yield bench.finished(SWEEP, right, f"after {seconds:.3f} s", tried)


def _at_steps(bench: Bench, command: Sequence[str]) -> list[Outcome]:
    right = bench.right(command)
    place, experiment = bench.place()
    points = spread(steps_of(bench.world, command, place, experiment), bench.n, bench.seed)
    outcomes = []
    for point in points:
        tried = bench.place()
        killed_at_point(bench.world, command, tried[0], point, tried[1])
        outcomes.append(bench.finished(command, right, str(point), tried))
    return outcomes


def _workers(mark: str) -> Iterator[int]:
    """Processes that work for the command that was started with this mark."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_worker = (folder / "cmdline").read_bytes().startswith(b"ray::PairWorker")
            if is_worker and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                yield int(folder.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", choices=("sqlite", "server", "both"), default="both")
    parser.add_argument("--kills", type=int, default=50, help="of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS), help="which, separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-timeout", action="store_true", help="60 s, not 4, where an owner is stopped")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file for the result")
    options = parser.parse_args()
    clean_environment()
    rows: list[tuple[str, str, list[Outcome], float]] = []
    with tempfile.TemporaryDirectory(prefix="mechdiff-kills-") as folder:
        world = make_world(Path(folder))
        kinds = [kind for kind in options.kinds.split(",") if kind != "worker" or has_ray(world)]
        for name in ("sqlite", "server") if options.store == "both" else (options.store,):
            with store(world, name) as uri:
                for kind in kinds:
                    start = time.monotonic()
                    outcomes = KINDS[kind](
                        Bench(world, uri, options.kills, options.seed, not options.full_timeout)
                    )
                    rows.append((name, kind, outcomes, time.monotonic() - start))
                    if options.out:  # after each kind: all of them take an hour
                        options.out.write_text(report(rows), encoding="utf-8")
    print(report(rows))
    if any(outcome.problems for _, _, outcomes, _ in rows for outcome in outcomes):
        sys.exit(1)


@contextmanager
def store(world: World, name: str) -> Iterator[str]:
    """The address of a fresh server; nothing for SQLite."""
    if name == "sqlite":
        yield ""
        return
    folder = world.folder / "server"
    folder.mkdir()
    shutil.copy(world.empty, folder / "mlflow.db")
    with serving(folder) as server:
        yield server.url


def has_ray(world: World) -> bool:
    """Whether `mechdiff sweep` has that engine here."""
    place = world.place("ask")
    return (
        "--engine" in mechdiff(place, "sweep", "--help")
        and not Command(place, *world.words(RAY_SWEEP)).wait()
    )


def report(rows: Sequence[tuple[str, str, list[Outcome], float]]) -> str:
    lines = [
        "# Sweeps killed and resumed",
        "",
        f"`python benchmarks/sweep_kills.py {' '.join(sys.argv[1:])}`",
        "",
        f"mechdiff {code_version()}, mlflow {mlflow.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores. After each kill with SIGKILL: `mechdiff resume PARENT`, or the command "
        "again where there was no parent yet. Then every run, param, metric, tag, prompt set and model, and "
        "the SHA-256 of every artifact, must be what an undisturbed run left (ids, times and seconds aside).",
        "",
        "| store | killed | kills | held then | left RUNNING by the kill | lost | duplicate | RUNNING | "
        "artifacts that differ | other differences | not resumed | seconds to resume, median |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    known = ("lost", "duplicate", "running", "artifact")
    for name, kind, outcomes, _ in rows:
        held = ", ".join(f"{state} {n}" for state, n in Counter(o.seen for o in outcomes).most_common())
        counts = [sum(o.count(which) for o in outcomes) for which in known]
        others = sum(len(o.differences) - o.count(*known) for o in outcomes)
        failed = sum(bool(o.failure) for o in outcomes)
        cells = [
            *(
                name,
                kind,
                len(outcomes),
                held,
                sum(o.left_running for o in outcomes),
                *counts,
                others,
                failed,
            ),
            f"{sorted(o.resume_s for o in outcomes)[len(outcomes) // 2]:.1f}" if outcomes else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    total = [outcome for _, _, outcomes, _ in rows for outcome in outcomes]
    good = sum(not outcome.problems for outcome in total)
    lines += [
        "",
        f"{good} of {len(total)} good; {sum(seconds for *_, seconds in rows) / 60:.0f} minutes.",
        "",
    ]
    for name, kind, outcomes, _ in rows:
        lines += [f"    {name}, {kind}, {o.how}: {'; '.join(o.problems[:5])}" for o in outcomes if o.problems]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    main()
