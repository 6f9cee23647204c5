"""Lets many processes come first to a new SQLite store at once, over and over.

    python benchmarks/cold_starts.py                          # 16 processes, 20 times
    python benchmarks/cold_starts.py --rounds 3 --naive 2

Each process opens the store, takes the experiment and logs one run. *Naive* is the same with MLflow's own
client and `set_experiment`. The processes are forked from an interpreter that has imported everything, and
wait for one signal, so that they come as close together as they can.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.tracking import MlflowClient

sys.path[:0] = [str(Path(__file__).parents[1])]

from mechdiff_mlflow.tracking.provenance import code_version  # noqa: E402
from mechdiff_mlflow.tracking.records import RunRecord  # noqa: E402
from mechdiff_mlflow.tracking.runs import Tracker  # noqa: E402
from mechdiff_mlflow.tracking.store import open_store, prepare_process  # noqa: E402

FORK = multiprocessing.get_context("fork")
EXPERIMENT = "shared"
ROUND_S = 300


@dataclass(frozen=True)
class Round:
    """What came of one new store.

    Args:
        failures: What went wrong in the processes.
        runs: FINISHED runs in it.
        experiments: Of that name.
        broken: Why the store cannot be used afterwards; empty when it can.
        seconds: Until the last process had ended.
    """

    failures: tuple[str, ...]
    runs: int
    experiments: int
    broken: str
    seconds: float


def ours(uri: str, name: str) -> None:
    """As any of our commands does."""
    Tracker(open_store(uri), EXPERIMENT).log(RunRecord(kind="fit", name=name, params={"who": name}))


def naive(uri: str, name: str) -> None:
    """As MLflow's documentation has it."""
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name=name):
        mlflow.log_param("who", name)


def one_round(folder: Path, use: Callable[[str, str], None], n: int) -> Round:
    """`n` processes at one new store."""
    folder.mkdir()
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    go, answers = FORK.Event(), FORK.Queue()
    processes = [FORK.Process(target=_first, args=(use, uri, f"p{i}", go, answers)) for i in range(n)]
    for process in processes:
        process.start()
    time.sleep(0.2)  # let all of them wait for the signal
    start = time.monotonic()
    go.set()
    found = [answers.get(timeout=ROUND_S) for _ in processes]
    for process in processes:
        process.join()
    seconds = time.monotonic() - start
    runs, experiments, broken = _state(folder / "mlflow.db")
    return Round(tuple(filter(None, found)), runs, experiments, broken, seconds)


def _first(use: Callable[[str, str], None], uri: str, name: str, go: Any, answers: Any) -> None:
    os.chdir(Path(uri.removeprefix("sqlite:///")).parent)
    out = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    go.wait()
    try:
        use(uri, name)
        answers.put("")
    except BaseException as error:
        text = str(getattr(error, "orig", None) or error)
        answers.put(f"{type(error).__name__}: {' '.join(text.split())[:120]}")


def _state(path: Path) -> tuple[int, int, str]:
    """FINISHED runs and experiments in the store, and why it cannot be used."""
    try:
        client = MlflowClient(f"sqlite:///{path}")
        experiments = [e for e in client.search_experiments() if e.name == EXPERIMENT]
        runs = client.search_runs([e.experiment_id for e in experiments], "attributes.status = 'FINISHED'")
        with closing(sqlite3.connect(path)) as database:
            (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
        return len(runs), len(experiments), "" if verdict == "ok" else str(verdict)
    except Exception as error:
        return 0, 0, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def row(what: str, n: int, rounds: list[Round]) -> str:
    failed = sum(len(r.failures) for r in rounds)
    lost = sum(n - r.runs for r in rounds)
    several = sum(r.experiments != 1 for r in rounds)
    broken = sum(bool(r.broken) for r in rounds)
    longest = max(r.seconds for r in rounds)
    return f"| {what} | {len(rounds)} × {n} | {failed} | {lost} | {several} | {broken} | {longest:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--naive", type=int, default=4, help="rounds with MLflow alone")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file for the result")
    options = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    prepare_process()
    n = options.processes
    with tempfile.TemporaryDirectory(prefix="mechdiff-cold-") as folder:
        good = [one_round(Path(folder, f"ours-{i}"), ours, n) for i in range(options.rounds)]
        bad = [one_round(Path(folder, f"naive-{i}"), naive, n) for i in range(options.naive)]
    reasons = Counter(failure for r in bad for failure in r.failures)
    lines = [
        "# Many processes come first to a new store",
        "",
        f"`python benchmarks/cold_starts.py {' '.join(sys.argv[1:])}`",
        "",
        f"mechdiff {code_version()}, mlflow {mlflow.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores; a new SQLite file each round.",
        "",
        "| | rounds × processes | failures | runs lost | rounds without exactly one experiment | stores "
        "unusable afterwards | longest round, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        row("mechdiff", n, good),
        *([row("MLflow alone", n, bad)] if bad else []),
        "",
        *(["What MLflow alone failed with:", ""] if reasons else []),
        *(f"- {count} × `{reason}`" for reason, count in reasons.most_common(5)),
        *(f"    {failure}" for r in good for failure in r.failures),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    if any(r.failures or r.broken or (r.runs, r.experiments) != (n, 1) for r in good):
        sys.exit(1)


if __name__ == "__main__":
    main()
