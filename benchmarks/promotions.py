"""Promoters and readers of one registered map at once, mostly through one server: is anything lost or wrong?

    python benchmarks/promotions.py                       # 16 promoters x 100 versions, 10,000 alias reads
    python benchmarks/promotions.py --promoters 4 --versions 5 --reads 200 --machines 4

Every promoter is a process. Those of one "machine" share a lock file; machines share nothing but the server,
so that nothing keeps them apart. (With --store sqlite all share the database's lock.) Checked afterwards:
every promotion has its version, unique and verified; the history holds every move; the alias is at a version
that one promoter found it at when it had moved it, unless another moved it at the same time, and said so.
During it: every read finds a verified version whose digest is the one that its run logged, and now and then
the whole map is fetched and compared.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import torch

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.registry.fetch import load_map
from mechdiff_mlflow.tracking.registry.moves import MovedMeanwhile, history
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.registry.promotion import promote
from mechdiff_mlflow.tracking.registry.versions import get_version, list_versions
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import open_store

NAME = "bench-L0-attn_out"
FULL_LOAD_EVERY = 100
FORK = multiprocessing.get_context("fork")


@dataclass
class Outcome:
    """What a promoter or reader saw."""

    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    done: int = 0
    overtaken: int = 0


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory(prefix="mechdiff-bench-") as folder:
        root = Path(folder)
        uri = f"sqlite:///{root / 'mlflow.db'}"
        open_store(uri)
        with server(root, uri) if options.store == "server" else nullcontext(uri) as url:
            print(f"store {url}; logging {options.promoters * options.versions + 1} runs", flush=True)
            expected = prepared(url if options.prepare == "server" else uri, options)
            started = time.perf_counter()
            promoters, readers = raced(url, root, expected, options)
            seconds = time.perf_counter() - started
            text = report(url, expected, promoters, readers, seconds, options)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    if "PROBLEM" in text:
        sys.exit(1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", choices=("server", "sqlite"), default="server")
    parser.add_argument("--promoters", type=int, default=16)
    parser.add_argument("--versions", type=int, default=100, help="of each promoter")
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--reads", type=int, default=10_000, help="of all readers together")
    parser.add_argument("--machines", type=int, default=2, help="that the promoters are on")
    parser.add_argument("--width", type=int, default=16, help="of the maps")
    parser.add_argument(
        "--prepare", choices=("direct", "server"), default="direct", help="how the runs are logged before"
    )
    parser.add_argument("--minutes", type=float, default=60, help="no promotion starts later than this")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file for the result")
    return parser.parse_args()


@contextmanager
def server(root: Path, uri: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", str(root / "proxied")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (root / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=root, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def some_map(seed: int, width: int) -> AffineMap:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator).double() for shape in ((width, 2), (2, width)))
    mean = torch.randn(width, generator=generator).double()
    return AffineMap(mean, -mean, Weight.low_rank(left, right, 1.0), 1.0, {"site": "L0/attn_out"})


def prepared(uri: str, options: argparse.Namespace) -> dict[str, str]:
    """A finished run with a map for every promotion; run id to the digest of its map."""
    tracker = Tracker(open_store(uri), "bench")
    expected = {}
    for seed in range(options.promoters * options.versions + 1):
        the_map = some_map(seed, options.width)
        params = {"pair": "bench", "layer": 0, "hook": "attn_out", "alpha": 1.0}
        run_id = tracker.log(RunRecord(kind="fit", name=f"fit {seed}", params=params, map=the_map))
        expected[run_id] = the_map.sha256()
    return expected


def raced(
    url: str, root: Path, expected: dict[str, str], options: argparse.Namespace
) -> tuple[list[Outcome], list[Outcome]]:
    first, *runs = expected
    promote(open_store(url), first, name=NAME, policy=PromotionPolicy(force=True))
    answers: Any = FORK.Queue()
    until = time.monotonic() + 60 * options.minutes
    n_reads = -(-options.reads // options.readers)
    processes = []
    for index in range(options.promoters):
        machine = root / f"machine{index % options.machines}"
        machine.mkdir(exist_ok=True)
        share = runs[index :: options.promoters]
        processes.append(FORK.Process(target=promoter, args=(url, machine, share, until, answers)))
    for index in range(options.readers):
        cache = root / f"cache{index}"
        processes.append(FORK.Process(target=reader, args=(url, cache, expected, n_reads, answers)))
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return (
        [outcome for role, outcome in found if role == "promoter"],
        [outcome for role, outcome in found if role == "reader"],
    )


def promoter(url: str, machine: Path, runs: list[str], until: float, answers: Any) -> None:
    tempfile.tempdir = str(machine)  # where the lock file of this "machine" lies
    outcome = Outcome()
    try:
        store = open_store(url)
        for run_id in runs:
            if time.monotonic() > until:
                break
            started = time.perf_counter()
            policy = PromotionPolicy(force=True)
            try:
                promote(store, run_id, name=NAME, why="benchmark", policy=policy)
            except MovedMeanwhile:
                outcome.overtaken += 1
            outcome.seconds.append(time.perf_counter() - started)
            outcome.done += 1
    except BaseException:
        outcome.problems.append(traceback.format_exc())
    answers.put(("promoter", outcome))


def reader(url: str, cache: Path, expected: dict[str, str], n_reads: int, answers: Any) -> None:
    os.environ["MECHDIFF_CACHE"] = str(cache)
    outcome = Outcome()
    store = open_store(url)
    for index in range(n_reads):
        try:
            started = time.perf_counter()
            version = get_version(store, NAME, "champion")
            outcome.seconds.append(time.perf_counter() - started)
            if not version.is_verified or version.sha256 != expected[version.run_id]:
                outcome.problems.append(f"{version} is not verified or not the map of its run")
            if index % FULL_LOAD_EVERY == 0 and load_map(version.uri, store=store).sha256() != version.sha256:
                outcome.problems.append(f"{version} loads as another map")
            outcome.done += 1
        except (MechdiffError, KeyError) as error:
            outcome.problems.append(f"read {index}: {error}")
    answers.put(("reader", outcome))


def report(
    url: str,
    expected: dict[str, str],
    promoters: list[Outcome],
    readers: list[Outcome],
    seconds: float,
    options: argparse.Namespace,
) -> str:
    store = open_store(url)
    versions = list_versions(store, NAME)
    moves = history(store, NAME)
    promoted = 1 + sum(outcome.done for outcome in promoters)
    n_reads = sum(outcome.done for outcome in readers)
    asked = f"{options.promoters} × {options.versions}"
    overtaken = sum(outcome.overtaken for outcome in promoters)
    chain = [None, *(move.target for move in moves)]
    is_chain = [move.source for move in moves] == chain[:-1]
    checks = {
        f"promotions: {promoted - 1} of {asked} asked for, without an error": (
            not any(outcome.problems for outcome in promoters)
        ),
        f"versions: {len(versions)}, numbers 1 to {len(versions)} without a gap": (
            [v.number for v in versions] == list(range(1, promoted + 1))
        ),
        "versions: one a run": len({v.run_id for v in versions}) == promoted,
        "versions: all verified, each with the digest that its run logged": all(
            v.is_verified and v.sha256 == expected[v.run_id] for v in versions
        ),
        f"history: {len(moves)} moves, one a promotion": len(moves) == promoted,
        "history: one chain, each move from where the one before went, where one lock kept promoters apart": (
            is_chain or options.machines > 1
        ),
        "history: every version was champion once, and no move came from outside": (
            sorted(move.target or 0 for move in moves) == list(range(1, promoted + 1))
            and {move.action for move in moves} == {"promote"}
        ),
        "alias: at the last move's version": get_version(store, NAME, "champion").number == moves[-1].target,
        f"alias reads during it: {n_reads} of {options.reads}, none missing or mismatched": (
            not any(outcome.problems for outcome in readers) and n_reads >= options.reads
        ),
    }
    python, cores = platform.python_version(), os.cpu_count()
    kept = "one `mlflow server --workers 1` on SQLite" if options.store == "server" else "SQLite directly"
    lines = [
        "# Promoters and readers of one map at once",
        "",
        f"`python benchmarks/promotions.py {' '.join(sys.argv[1:])}`",
        "",
        f"{options.promoters} promoters on {options.machines} machines (lock files), {options.readers} "
        f"readers, {kept}, all on the same {cores} cores; mechdiff "
        f"{code_version()}, mlflow {mlflow.__version__}, Python {python}; runs logged {options.prepare}. "
        f"{seconds:.0f} s. {overtaken} promoters found that another had moved the alias at the same time.",
        "",
        "| checked | |",
        "| --- | --- |",
        *(f"| {what} | {'yes' if good else 'PROBLEM'} |" for what, good in checks.items()),
        "",
        "| | count | median s | 95 % s | longest s |",
        "| --- | --- | --- | --- | --- |",
        timing(
            "promotion, waiting for the machine's lock included", [s for o in promoters for s in o.seconds]
        ),
        timing("read of the alias", [s for o in readers for s in o.seconds]),
        "",
    ]
    problems = [problem for outcome in (*promoters, *readers) for problem in outcome.problems]
    return "\n".join([*lines, *(f"    {problem}" for problem in problems[:20])])


def timing(what: str, seconds: list[float]) -> str:
    if len(seconds) < 2:
        return f"| {what} | {len(seconds)} | | | |"
    cut = statistics.quantiles(seconds, n=20)[-1]
    return f"| {what} | {len(seconds)} | {statistics.median(seconds):.3f} | {cut:.3f} | {max(seconds):.3f} |"


if __name__ == "__main__":
    main()
