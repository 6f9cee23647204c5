"""Lets many processes come first to a new SQLite store at once, and kills the first one, over and over.

    python benchmarks/cold_starts.py                          # 16 processes, 20 times; 60 kills
    python benchmarks/cold_starts.py --rounds 3 --naive 2 --kills 6

Each process opens the store, takes the experiment and logs one run. *Naive* is the same with MLflow's own
client and `set_experiment`. The processes are forked from an interpreter that has imported everything, and
wait for one signal, so that they come as close together as they can.

A kill is SIGKILL, SIGINT or SIGTERM, in turn, at a random moment of an undisturbed first use, or right before
a random SQL statement of it, in turn. Then another process uses the store.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import queue
import random
import signal
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
import sqlalchemy
from mlflow.tracking import MlflowClient

sys.path[:0] = [str(Path(__file__).parents[1])]

from mechdiff_mlflow.tracking.content.records import RunRecord  # noqa: E402
from mechdiff_mlflow.tracking.runs.provenance import code_version  # noqa: E402
from mechdiff_mlflow.tracking.runs.tracker import Tracker  # noqa: E402
from mechdiff_mlflow.tracking.store.store import open_store, prepare_process  # noqa: E402

FORK = multiprocessing.get_context("fork")
EXPERIMENT = "shared"
ROUND_S = 300
SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


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


@dataclass(frozen=True)
class Kill:
    """A first user of a store that was killed, and what became of the second.

    Args:
        signum: How.
        failure: What the second failed with; empty when its run is there.
    """

    signum: int
    failure: str


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


def killed(
    folder: Path, use: Callable[[str, str], None], then: Callable[[str, str], None], n: int
) -> list[Kill]:
    """`n` new stores whose first user is killed, each used by another process after that."""
    folder.mkdir()
    rng = random.Random(0)
    start = time.monotonic()
    statements = _alone(folder / "whole", use).get(timeout=ROUND_S)
    longest_s = time.monotonic() - start
    kills: list[Kill] = []
    while len(kills) < n:
        signum = SIGNALS[len(kills) % len(SIGNALS)]
        at = None if len(kills) // len(SIGNALS) % 2 else rng.randrange(int(statements))
        place = folder / f"{len(kills)}-{rng.random()}"
        first = _alone(place, use, at=at, signum=signum)
        if at is None:
            time.sleep(rng.uniform(0, longest_s))
            os.kill(first.process.pid, signum)
        first.process.join()
        if first.process.exitcode == 0:
            longest_s *= 0.8  # it was over too soon
        else:
            second = _alone(place, then)
            failure = second.get(timeout=ROUND_S)
            second.process.join()
            runs, _, broken = _state(place / "mlflow.db")
            done = "" if runs else "the run is not there"
            kills.append(Kill(signum, broken or done or ("" if failure.isdigit() else failure)))
    return kills


def _alone(folder: Path, use: Callable[[str, str], None], *, at: int | None = None, signum: int = 0) -> Any:
    """One process that uses the store in `folder`; its queue says how many SQL statements that took."""
    folder.mkdir(exist_ok=True)
    answer = FORK.Queue()
    answer.process = FORK.Process(target=_counted, args=(use, folder, at, signum, answer))
    answer.process.start()
    return answer


def _counted(use: Callable[[str, str], None], folder: Path, at: int | None, signum: int, answer: Any) -> None:
    seen = 0

    def count(*_: object) -> None:
        nonlocal seen
        if seen == at:
            os.kill(os.getpid(), signum)
        seen += 1

    # A shell starts what is to run in the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", count)
    go = FORK.Event()
    go.set()
    inner: queue.Queue[str] = queue.Queue()
    _first(use, f"sqlite:///{folder / 'mlflow.db'}", "one", go, inner)
    failure = inner.get()
    answer.put(failure or str(seen))
    if failure:
        answer.close()
        answer.join_thread()
        sys.exit(1)


def kill_row(what: str, kills: list[Kill]) -> str:
    by_signal = (
        f"{sum(bool(k.failure) for k in kills if k.signum == s)} of {sum(k.signum == s for k in kills)}"
        for s in SIGNALS
    )
    return f"| {what} | {' | '.join(by_signal)} | {sum(bool(k.failure) for k in kills)} of {len(kills)} |"


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
    parser.add_argument(
        "--kills", type=int, default=60, help="of our first use; a quarter as many of MLflow's"
    )
    parser.add_argument("--out", type=Path, default=None, help="Markdown file for the result")
    options = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    prepare_process()
    n = options.processes
    with tempfile.TemporaryDirectory(prefix="mechdiff-cold-") as folder:
        good = [one_round(Path(folder, f"ours-{i}"), ours, n) for i in range(options.rounds)]
        bad = [one_round(Path(folder, f"naive-{i}"), naive, n) for i in range(options.naive)]
        kills = {
            "mechdiff, then mechdiff": killed(Path(folder, "kills-1"), ours, ours, options.kills),
            "MLflow alone, then mechdiff": killed(Path(folder, "kills-2"), naive, ours, options.kills // 4),
            "MLflow alone, then itself": killed(Path(folder, "kills-3"), naive, naive, options.kills // 4),
        }
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
        "",
        "# The first user is killed",
        "",
        "Stores that the next user could not use, by what ended the first one:",
        "",
        "| killed, then used by | SIGKILL | SIGINT | SIGTERM | all |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(kill_row(what, found) for what, found in kills.items()),
        *(f"    {kill.failure}" for kill in kills["mechdiff, then mechdiff"] if kill.failure),
    ]
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    if any(r.failures or r.broken or (r.runs, r.experiments) != (n, 1) for r in good) or any(
        kill.failure for what, found in kills.items() if what.endswith("mechdiff") for kill in found
    ):
        sys.exit(1)


if __name__ == "__main__":
    main()
