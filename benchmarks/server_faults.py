"""Restarts the server under a sweep, and drops the answers to creates, and counts what is in the store then.

    python benchmarks/server_faults.py
    python benchmarks/server_faults.py --restarts 3 --creates 10

*Restarts*: an `mlflow server` on SQLite is ended, by SIGKILL and SIGTERM in turn, and started again at the
same port, so many times during one sweep. *Creates*: a proxy forwards every request that makes a run and then
drops the server's answer the first time; lone runs through `Tracker`, a sweep's runs through the command
line, and, to compare, runs of a plain `MlflowClient`, which sends the request again.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from faults.commands import Command  # noqa: E402
from faults.harness import World, clean_environment, make_world, undisturbed  # noqa: E402
from faults.proxy import Fault, Rule, proxying  # noqa: E402
from faults.snapshot import Difference, active_runs, snapshot  # noqa: E402
from tracking.servers import Server, serving  # noqa: E402

from mechdiff_mlflow.tracking.content.records import RunRecord  # noqa: E402
from mechdiff_mlflow.tracking.runs.provenance import code_version  # noqa: E402
from mechdiff_mlflow.tracking.runs.tracker import Tracker  # noqa: E402
from mechdiff_mlflow.tracking.store.store import open_store  # noqa: E402

CREATE = Rule(fault=Fault.DROP_ANSWER, method="POST", path=r"/runs/create$", first_of_each=True)
PATIENCE_S = "120"


@dataclass(frozen=True)
class Restarted:
    """A sweep whose server was restarted.

    Args:
        n_cells: Of the sweep.
        kills: Restarts by SIGKILL.
        terms: Restarts by SIGTERM.
        during: How many of them came before the sweep had ended.
        code: Exit code of the sweep.
        differences: From an undisturbed sweep.
        seconds: The sweep took.
        calm_s: The undisturbed one took.
        down_s: The server was away, in all.
    """

    n_cells: int
    kills: int
    terms: int
    during: int
    code: int
    differences: list[Difference]
    seconds: float
    calm_s: float
    down_s: float


@dataclass(frozen=True)
class Created:
    """Runs that were made while answers were dropped.

    Args:
        how: By whom.
        asked: How many were to be made.
        dropped: How many answers were dropped.
        found: How many there are.
        unfinished: How many of these are not FINISHED.
        errors: How many times the maker failed.
        seconds: It took.
    """

    how: str
    asked: int
    dropped: int
    found: int
    unfinished: int
    errors: int
    seconds: float


def restarts(world: World, server: Server, n: int, n_ranks: int, seed: int) -> Restarted:
    """One sweep, the server restarted `n` times meanwhile."""
    sweep = sweep_of(n_ranks)
    start = time.monotonic()
    right = undisturbed(world, sweep, world.place("calm", server.url), "calm")
    calm_s = time.monotonic() - start
    rng = random.Random(seed)
    place = world.place("restarted", server.url)
    start = time.monotonic()
    command = Command(place, *world.words(sweep, "restarted"))
    during, down_s = 0, 0.0
    for index in range(n):
        # The server answers for a moment before it goes again; the sweep gets on a little each time.
        command.leave(rng.uniform(0.2, 1.0))
        during += command.is_alive
        before = time.monotonic()
        (server.kill if index % 2 == 0 else server.stop)()
        time.sleep(rng.uniform(0, 0.5))
        server.start()
        down_s += time.monotonic() - before
    code = command.wait(1200)
    seconds = time.monotonic() - start
    print(command.output[-600:], flush=True)
    different = snapshot(server.url, "restarted").differences(right)
    return Restarted(
        len(right.runs) - 1, (n + 1) // 2, n // 2, during, code, different, seconds, calm_s, down_s
    )


def sweep_of(n_ranks: int) -> tuple[str, ...]:
    """Two sites × scales × ranks: 8 × `n_ranks` cells."""
    ranks = ",".join(map(str, range(1, n_ranks + 1)))
    sites = "L2/attn_out,L3/resid_post"
    return ("sweep", "--sites", sites, "--ranks", ranks, "--alphas", "0.25,0.5,0.75,1", "--targets", "30")


def lone_runs(server: Server, n: int) -> Created:
    """`n` runs through `Tracker`, each create's first answer dropped."""

    def make(url: str) -> Iterator[bool]:
        tracker = Tracker(open_store(url), "lone")
        for index in range(n):
            try:
                tracker.log(RunRecord(kind="fit", name=f"run {index}", metrics={"index": float(index)}))
                yield True
            except Exception as error:
                print(f"{type(error).__name__}: {error}", flush=True)
                yield False

    return _created("lone runs through Tracker", server, n, "lone", make)


def naive_runs(server: Server, n: int) -> Created:
    """The same through MLflow's client alone, as its documentation has it."""

    def make(url: str) -> Iterator[bool]:
        client = MlflowClient(url)
        experiment_id = client.create_experiment("naive")
        for index in range(n):
            run_id = client.create_run(experiment_id, run_name=f"run {index}").info.run_id
            client.log_metric(run_id, "index", float(index))
            client.set_terminated(run_id)
            yield True

    return _created("naive: MlflowClient.create_run", server, n, "naive", make)


def children(world: World, server: Server, n: int) -> Created:
    """The parent and the cells of one sweep of about `n` cells, each create's first answer dropped."""
    n_ranks = -(-n // 8)

    def make(url: str) -> Iterator[bool]:
        command = Command(world.place("children", url), *world.words(sweep_of(n_ranks), "children"))
        code = command.wait(1200)
        if code:
            print(command.output[-1000:], flush=True)
        yield code == 0

    return _created("a sweep, parent and cells", server, 8 * n_ranks + 1, "children", make)


def _created(how: str, server: Server, n: int, experiment: str, make: object) -> Created:
    with proxying(server.url, CREATE) as proxy:
        start = time.monotonic()
        good = list(make(proxy.url))  # type: ignore[operator]
        seconds = time.monotonic() - start
        dropped = proxy.counts("/runs/create")[Fault.DROP_ANSWER]
    runs: list[Run] = list(active_runs(MlflowClient(server.url), experiment))
    unfinished = sum(run.info.status != "FINISHED" for run in runs)
    return Created(how, n, dropped, len(runs), unfinished, good.count(False), seconds)


def report(restarted: Restarted, created: list[Created]) -> str:
    r = restarted
    of_kind = {kind: sum(d.kind == kind for d in r.differences) for kind in ("lost", "duplicate", "running")}
    others = len(r.differences) - sum(of_kind.values())
    lines = [
        "# Servers that fail under a sweep",
        "",
        f"`python benchmarks/server_faults.py {' '.join(sys.argv[1:])}`",
        "",
        f"mechdiff {code_version()}, mlflow {mlflow.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores; one `mlflow server --workers 1` on SQLite with proxied artifacts, "
        f"MECHDIFF_SERVER_PATIENCE_S={PATIENCE_S}.",
        "",
        "## Restarts during one sweep",
        "",
        "| | |",
        "| --- | --- |",
        f"| cells | {r.n_cells} |",
        f"| restarts: SIGKILL, SIGTERM | {r.kills}, {r.terms} |",
        f"| of these while the sweep ran | {r.during} |",
        f"| exit code of the sweep | {r.code} |",
        *(f"| runs {kind} | {n} |" for kind, n in of_kind.items()),
        f"| params, metrics, tags, inputs or artifacts that differ from an undisturbed sweep's | {others} |",
        f"| seconds: the server away, the sweep, undisturbed | {r.down_s:.0f}, {r.seconds:.0f}, "
        f"{r.calm_s:.0f} |",
        "",
        "## Creates whose answer is dropped after the server has committed",
        "",
        "| made | asked for | answers dropped | runs found | ghosts | not FINISHED | errors | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {c.how} | {c.asked} | {c.dropped} | {c.found} | {c.found - c.asked} | {c.unfinished} | "
            f"{c.errors} | {c.seconds:.0f} |"
            for c in created
        ),
        "",
        *(f"    {difference}" for difference in r.differences[:20]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=10, help="the sweep has eight times as many cells")
    parser.add_argument("--creates", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="Markdown file for the result")
    options = parser.parse_args()
    clean_environment()
    os.environ["MECHDIFF_SERVER_PATIENCE_S"] = PATIENCE_S
    with tempfile.TemporaryDirectory(prefix="mechdiff-faults-") as folder:
        world = make_world(Path(folder))
        with fresh_server(world) as server:
            restarted = restarts(world, server, options.restarts, options.ranks, options.seed)
            created = [lone_runs(server, options.creates), children(world, server, options.creates)]
            naive = naive_runs(server, options.creates)
    text = report(restarted, [*created, naive])
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    wrong = [c for c in created if c.errors or c.unfinished or c.found != c.asked]
    if restarted.code or restarted.differences or wrong:
        sys.exit(1)


@contextmanager
def fresh_server(world: World) -> Iterator[Server]:
    folder = world.folder / "server"
    folder.mkdir()
    shutil.copy(world.empty, folder / "mlflow.db")
    with serving(folder) as server:
        yield server


if __name__ == "__main__":
    main()
