"""A sweep on a Ray cluster whose workers are killed and one of whose nodes goes, against the same sweep here.

    python benchmarks/ray_faults.py                   # 4 nodes of one CPU, 8 SIGKILLs, one node removed
    python benchmarks/ray_faults.py --out benchmarks/results/ray-faults.md

Both sweeps are the command `mechdiff sweep`, each into an experiment of its own of one store. Then every run
of the one must be in the other, with the same params, metrics, maps and files: all but what tells the time,
and what two sweeps of one process do not have in common either.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import torch

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.experiments.workers.cluster import _environment, _of_our_own
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.store.store import Store, open_store

N_NODES = 4
N_KILLS = 8
PAUSE_S = (0.3, 3.0)
SWEEP = (
    *("sweep", "--pair", "cultural-demo"),
    *("--sites", "L26/attn_out:0.3,L24/resid_post:0.7,L25/mlp_out:1,L27/resid_post:1"),
    *("--ranks", "1,4,8,16,32,full", "--targets", "30", "--permutations", "10", "--batch-size", "8"),
)


@dataclass(eq=False)
class Deeds:
    """What was done to the cluster, with the second of the sweep."""

    kills: list[tuple[float, int]] = field(default_factory=list)
    removed: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=N_KILLS)
    parser.add_argument("--seed", type=int, default=0, help="of the times and victims")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file for the result")
    options = parser.parse_args()
    out = options.out.resolve() if options.out else None
    with _environment(_of_our_own()):
        # Before the sweeps, so that environment.txt lists the same packages: Ray brings some of its own.
        importlib.import_module("ray")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="mechdiff-ray-faults-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        os.chdir(folder)
        uri = f"sqlite:///{folder}/mlflow.db"
        store = open_store(uri)
        seconds = {}
        for name in ("here", "here again"):
            seconds[name] = sweep(uri, name)
        deeds = Deeds()
        with cluster() as nodes, harm(nodes, options.kills, options.seed, deeds):
            seconds["ray"] = sweep(
                uri, "ray", "--engine", "ray", "--address", nodes.address, "--workers", "4"
            )
        here, again, on_ray = (runs_of(store, name) for name in ("here", "here again", "ray"))
    text = report(here, again, on_ray, deeds, options.kills, seconds)
    print(text)
    if out:
        out.write_text(text, encoding="utf-8")
    if "PROBLEM" in text:
        sys.exit(1)


def sweep(uri: str, experiment: str, *more: str) -> float:
    """Run the command in this process; seconds."""
    started = time.perf_counter()
    arguments = [*SWEEP, "--tracking-uri", uri, "--experiment", experiment, *more]
    cli.main(arguments, standalone_mode=False)
    return time.perf_counter() - started


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    with _environment(_of_our_own()):
        nodes = importlib.import_module("ray.cluster_utils").Cluster()
        for _ in range(N_NODES):
            nodes.add_node(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20)
        try:
            yield nodes
        finally:
            nodes.shutdown()


@contextlib.contextmanager
def harm(nodes: Any, n_kills: int, seed: int, deeds: Deeds) -> Iterator[None]:
    """Kill workers at random times while the body runs, and take a node away half-way."""
    done = threading.Event()
    dice = random.Random(seed)

    def do() -> None:
        while not workers_of(nodes) and not done.wait(0.2):
            pass
        started = time.perf_counter()
        for number in range(n_kills):
            done.wait(dice.uniform(*PAUSE_S))
            while not (found := workers_of(nodes)) and not done.wait(0.2):
                pass
            if done.is_set():
                return
            pid = dice.choice(found)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                deeds.kills.append((time.perf_counter() - started, pid))
            if number == n_kills // 2 - 1:
                nodes.remove_node(dice.choice(sorted(nodes.worker_nodes, key=str)), allow_graceful=False)
                deeds.removed = time.perf_counter() - started

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def workers_of(nodes: Any) -> list[int]:
    """Processes of our own nodes that hold the pair."""
    raylets = {
        str(info.process.pid)
        for node in nodes.list_all_nodes()
        for info in node.all_processes.get("raylet", [])
    }
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 2) for line in listed.splitlines()[1:])
    ready = ("ray::PairWorker", "ray::PairWorker.call")
    return [int(pid) for pid, parent, command in rows if parent in raylets and command.strip() in ready]


Run = dict[str, str]
"""What a run says, by what it is of: `param k`, `metric drop_pct`, `file map.pt`."""


def runs_of(store: Store, experiment: str) -> dict[str, Run]:
    """The runs of an experiment by name and status."""
    client, found = store.client, {}
    for run in client.search_runs([store.experiment(experiment)], max_results=1000):
        says = {f"param {key}": value for key, value in run.data.params.items()}
        says |= {f"metric {key}": repr(value) for key, value in run.data.metrics.items()}
        says["status"] = run.info.status
        says["code"] = run.data.tags.get("mechdiff.version", "")
        root = Path(run.info.artifact_uri.removeprefix("file://"))
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            says[f"file {path.relative_to(root)}"] = digest(path)
        assert run.info.run_name not in found, f"{run.info.run_name} is there twice"
        found[run.info.run_name] = says
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file; of a table without the columns that tell the time."""
    content = path.read_bytes()
    if path.suffix == ".json":
        table = json.loads(content)
        if isinstance(table, dict) and "columns" in table:
            keep = [i for i, name in enumerate(table["columns"]) if not name.startswith("time/")]
            content = repr([[row[i] for i in keep] for row in [table["columns"], *table["data"]]]).encode()
    return hashlib.sha256(content).hexdigest()


def differences(first: dict[str, Run], second: dict[str, Run], leave: Callable[[str], bool]) -> list[str]:
    """What the two do not have in common, as `run: what`."""
    found = [f"{name}: only in one" for name in first.keys() ^ second.keys()]
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        found += [f"{name}: {key}" for key in sorted({*a, *b}) if a.get(key) != b.get(key) and not leave(key)]
    return sorted(found)


def tells_the_time(key: str) -> bool:
    return key.startswith("metric time/")


def report(
    here: dict[str, Run],
    again: dict[str, Run],
    on_ray: dict[str, Run],
    deeds: Deeds,
    n_kills: int,
    seconds: dict[str, float],
) -> str:
    own = {line.partition(": ")[2] for line in differences(here, again, tells_the_time)}
    wrong = differences(here, on_ray, lambda key: key in own or tells_the_time(key))
    count = {kind: sum(key.startswith(kind) for run in on_ray.values() for key in run) for kind in KINDS}
    kills = ", ".join(f"{when:.1f}" for when, _ in deeds.kills)
    removed = "none" if deeds.removed is None else f"one, after {deeds.removed:.1f} s"
    if len(deeds.kills) < n_kills or deeds.removed is None:
        wrong.append("the sweep ended before all harm was done")
    lines = [
        "# A sweep whose workers are killed",
        "",
        f"`python benchmarks/ray_faults.py {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"mechdiff {code_version()}, ray {importlib.import_module('ray').__version__}, mlflow "
        f"{mlflow.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPUs. The sweep: `mechdiff {' '.join(SWEEP)}`, in this process, and by {N_NODES} "
        f"workers on a cluster of {N_NODES} nodes (raylets) of one CPU each on this machine.",
        "",
        "| | |",
        "| --- | --- |",
        f"| workers killed (SIGKILL) | {len(deeds.kills)}, after {kills} s |",
        f"| nodes removed (killed) | {removed} |",
        f"| runs here, on Ray | {len(here)}, {len(on_ray)} |",
        f"| not FINISHED, on Ray | {sum(run['status'] != 'FINISHED' for run in on_ray.values())} |",
        f"| params, metrics, files compared | {', '.join(str(count[kind]) for kind in KINDS)} |",
        f"| that differ | {len(wrong)} |",
        f"| left out, as two sweeps here differ in them | {', '.join(sorted(own)) or 'nothing'} |",
        "| left out | metrics time/…, and the columns of tables that repeat them |",
        f"| seconds here, on Ray with the kills | {seconds['here']:.0f}, {seconds['ray']:.0f} |",
        "",
        "The same runs with the same numbers, to the last bit."
        if not wrong
        else "PROBLEM: " + "; ".join(wrong),
        "",
    ]
    return "\n".join(lines)


KINDS = ("param ", "metric ", "file ")


if __name__ == "__main__":
    main()
