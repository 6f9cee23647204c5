"""Two people logging to a team's server at once: seconds a run, and whether every run is whole.

    python -m benchmarks.team_server --runs 20 --out benchmarks/results/team-server.md

Each person is a process that logs runs of 15 params, 12 metrics, 3 tags and a 1 MB artifact under one parent,
through mechdiff's tracker, to `mlflow server` with basic-auth on PostgreSQL with proxied artifacts: the
deployment of docs/team-server.md, started by the code that its tests use.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mlflow

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from team.postgres import postgres
from team.server import ADMIN, Server, team_server

from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import open_store

ARTIFACT_BYTES = 2**20


def log_runs(login: dict[str, str], n_runs: int, folder: Path, together: object, times: object) -> None:
    """One person: open the store, wait for the others, log; the seconds that took."""
    os.environ.update(login)
    name = login["MLFLOW_TRACKING_USERNAME"]
    artifact = folder / f"{name}.bin"
    artifact.write_bytes(os.urandom(ARTIFACT_BYTES))
    tracker = Tracker(open_store(), f"of-{name}")
    tracker.store.experiment(f"of-{name}")
    together.wait()
    start = time.perf_counter()
    with tracker.run("sweep", "benchmark") as run:
        for i in range(n_runs):
            run.log(
                RunRecord(
                    kind="patch",
                    name=f"run {i}",
                    params={f"param{j}": i * j for j in range(15)},
                    metrics={f"metric{j}": float(i + j) for j in range(12)},
                    tags={f"tag{j}": str(i) for j in range(3)},
                    files={"map.pt": artifact},
                )
            )
    times.put(time.perf_counter() - start)


def whole_runs(server: Server, name: str) -> int:
    """How many runs of a person are FINISHED with every param, metric and artifact."""
    client = mlflow.MlflowClient(server.uri_of(name))
    experiment = client.get_experiment_by_name(f"of-{name}")
    runs = client.search_runs([experiment.experiment_id], "tags.`mechdiff.kind` = 'patch'", max_results=1000)
    return sum(
        run.info.status == "FINISHED"
        and len(run.data.params) == 15
        and len(run.data.metrics) == 12
        and [(file.path, file.file_size) for file in client.list_artifacts(run.info.run_id)]
        == [("map.pt", ARTIFACT_BYTES)]
        for run in runs
    )


def measure(server: Server, names: Sequence[str], n_runs: int, folder: Path) -> list[float]:
    """Seconds that each of the people took for their runs, all at once."""
    context = multiprocessing.get_context("spawn")
    together, times = context.Barrier(len(names)), context.Queue()
    people = [
        context.Process(target=log_runs, args=(server.login(name), n_runs, folder, together, times))
        for name in names
    ]
    for person in people:
        person.start()
    took = [times.get(timeout=600) for _ in people]
    for person in people:
        person.join()
    for name in names:
        if whole_runs(server, name) != n_runs:
            raise SystemExit(f"{name} logged {n_runs} runs and the server holds {whole_runs(server, name)}.")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20, help="of each person")
    parser.add_argument("--out", type=Path, help="write the report there too")
    args = parser.parse_args()
    lines = [
        f"`python -m benchmarks.team_server {' '.join(sys.argv[1:])}`",
        "",
        f"{os.cpu_count()} cores of {platform.machine()} for clients, server and PostgreSQL together; MLflow "
        f"{mlflow.__version__}; {args.runs} runs a person, all found whole afterwards; load average before "
        f"{os.getloadavg()[0]:.1f}.",
        "",
        "| auth_cache_ttl_seconds | people at once | ms a run of one person | runs a second in all |",
        "| --- | --- | --- | --- |",
    ]
    print("\n".join(lines))
    for ttl in (60, 0):
        with (
            tempfile.TemporaryDirectory() as folder,
            postgres() as database,
            team_server(Path(folder), database, auth_cache_ttl_seconds=ttl) as server,
        ):
            os.environ.update(server.login(ADMIN))
            for names in (["ann"], ["bob", "cem"]):
                for name in names:
                    server.add_user(name)
                took = measure(server, names, args.runs, Path(folder))
                each = 1000 * sum(took) / len(took) / args.runs
                rate = len(names) * args.runs / max(took)
                lines.append(f"| {ttl} | {len(names)} | {each:.0f} | {rate:.1f} |")
                print(lines[-1])
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
