"""Kills a promoter at every step, and looks at what it leaves.

    python benchmarks/kills.py                        # a SQLite store: requests and files
    python benchmarks/kills.py --store server         # an MLflow server: requests
    python benchmarks/kills.py --every 5              # only every fifth point

The promoter is a process of its own that ends itself with SIGKILL right before or right after its n-th
request to the store, or when it is about to write or rename its n-th file of the store's artifacts. Then the
alias must be where it was and load, nothing that is READY may be half-uploaded, and running the promotion
again must finish.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import torch

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.registry.fetch import load_map, read_back
from mechdiff_mlflow.tracking.registry.moves import history
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.registry.promotion import promote
from mechdiff_mlflow.tracking.registry.versions import get_version, list_versions
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import Store, open_store

NAME = "kill-L0-attn_out"
WIDTH = 6
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Point:
    """Where a promoter dies.

    Args:
        kind: `before` or `after` a request, or at a `file`.
        index: Of the request or file, from 0.
        what: The request or the file's name.
    """

    kind: str
    index: int
    what: str


@dataclass(frozen=True)
class Left:
    """What a killed promoter left.

    Args:
        point: Where it died.
        moved: Whether the alias is at the new version.
        problems: What is wrong; empty is good.
    """

    point: Point
    moved: bool
    problems: tuple[str, ...]


class Deadly:
    """A client that counts its requests, and ends the process at one of them."""

    def __init__(self, client: Any, point: Point | None, note: Callable[[str], None]) -> None:
        self._client, self._point, self._note, self._n = client, point, note, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method) or name.startswith("_"):
            return method

        def call(*arguments: Any, **options: Any) -> Any:
            index, self._n = self._n, self._n + 1
            self._note(name)
            self._die("before", index)
            try:
                return method(*arguments, **options)
            finally:
                self._die("after", index)  # also when the answer was a refusal

        return call

    def _die(self, kind: str, index: int) -> None:
        if self._point is not None and (self._point.kind, self._point.index) == (kind, index):
            os.kill(os.getpid(), signal.SIGKILL)


def watch_files(root: Path, point: Point | None, note: Callable[[str], None]) -> None:
    """End the process when it is about to write or rename the n-th file below `root`."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, mode = arguments[0], arguments[1]
            if not isinstance(path, str) or mode is None or not set("wax+") & set(str(mode)):
                return
        elif event in ("os.rename", "os.link"):
            path = arguments[1]
        else:
            return
        if not str(path).startswith(str(root)):
            return
        index, count = count, count + 1
        note(Path(str(path)).name)
        if point is not None and (point.kind, point.index) == ("file", index):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def measured(store: Store, seed: int) -> str:
    """A run that patched with a fresh map at an α of its own, so that promoting it uploads a model."""
    the_map = some_map(seed)
    params = {"pair": "kill", "layer": 0, "hook": "attn_out"}
    tracker = Tracker(store, "kill")
    fit = tracker.log(RunRecord(kind="fit", name="fit", params=params, map=the_map))
    patch = RunRecord(
        kind="patch", name="patch", params={**params, "alpha": 0.3}, metrics={"drop_pct": 1.0}, map_run=fit
    )
    return tracker.log(patch)


def some_map(seed: int) -> AffineMap:
    generator = torch.Generator().manual_seed(seed)
    weight, mean = (torch.randn(*s, generator=generator).double() for s in ((WIDTH, WIDTH), (WIDTH,)))
    return AffineMap(mean, -mean, Weight.from_dense(weight), 1.0, {"site": "L0/attn_out"})


def promoter(uri: str, files: Path, run_id: str, point: Point | None, answers: Any) -> None:
    """Promote in this process, which ends at `point`; without one, tell what could be one."""
    steps: list[tuple[str, str]] = []
    store = open_store(uri)
    client = Deadly(store.client, point, lambda name: steps.append(("request", name)))
    watch_files(files, point, lambda name: steps.append(("file", name)))
    promote(replace(store, client=client), run_id, name=NAME, policy=PromotionPolicy(force=True))  # type: ignore[arg-type]
    answers.put(steps)


def points_of(uri: str, files: Path) -> list[Point]:
    """Every point at which a promotion can die."""
    store = open_store(uri)
    promote(store, measured(store, 0), name=NAME, policy=PromotionPolicy(force=True))
    answers = FORK.Queue()
    process = FORK.Process(target=promoter, args=(uri, files, measured(store, 1), None, answers))
    process.start()
    steps = answers.get(timeout=120)
    process.join()
    requests = [name for kind, name in steps if kind == "request"]
    names = [name for kind, name in steps if kind == "file"]
    found = [Point(kind, i, name) for i, name in enumerate(requests) for kind in ("before", "after")]
    return found + [Point("file", i, name) for i, name in enumerate(names)]


def kill_at(uri: str, files: Path, point: Point, seed: int, sound: set[str]) -> Left:
    """Kill a promoter at `point` and look; `sound` has what was found whole before."""
    store = open_store(uri)
    run_id = measured(store, seed)
    before = get_version(store, NAME, "champion")
    process = FORK.Process(target=promoter, args=(uri, files, run_id, point, FORK.Queue()))
    process.start()
    process.join(120)
    problems = []
    if process.exitcode != -signal.SIGKILL:
        problems.append(f"the promoter ended with {process.exitcode} instead of being killed")
    after = get_version(store, NAME, "champion")
    moved = after.number != before.number
    if moved and after.run_id != run_id:
        problems.append(f"the alias went to {after}, which is of another run")
    problems += broken(store, sound)
    promote(store, run_id, name=NAME, policy=PromotionPolicy(force=True))
    done = get_version(store, NAME, "champion")
    expected = some_map(seed).with_alpha(0.3)
    if done.run_id != run_id or load_map(f"{NAME}@champion", store=store).sha256() != expected.sha256():
        problems.append("running it again did not finish")
    versions = list_versions(store, NAME)
    if [v.run_id for v in versions].count(run_id) != 1:
        problems.append("its run has not exactly one version")
    moves = history(store, NAME)
    chain = [None, *(move.target for move in moves)]
    if [move.source for move in moves] != chain[:-1] or {move.action for move in moves} != {"promote"}:
        problems.append("the history is no chain")
    return Left(point, moved, tuple(problems))


def broken(store: Store, sound: set[str]) -> list[str]:
    """What is READY, or a version, and does not read back; the champion must always."""
    problems = []
    names = {f"models:/{model.model_id}": None for model in ready_models(store)}
    versions = {version.uri: version for version in list_versions(store, NAME)}
    for uri, version in {**names, **versions}.items():
        if uri in sound:
            continue
        try:
            if version is None:
                load_map(uri, store=store)
            else:
                read_back(store, version)
            sound.add(uri)
        except MechdiffError as error:
            problems.append(f"{uri}: {error}")
    try:
        load_map(f"{NAME}@champion", store=store)
    except MechdiffError as error:
        problems.append(f"champion: {error}")
    return problems


def ready_models(store: Store) -> list[Any]:
    found = store.client.search_logged_models([store.experiment("kill")], max_results=1000)
    return [model for model in found if model.status == "READY"]


def moves_the_alias(point: Point, points: list[Point]) -> bool:
    """Whether the alias is expected to have moved when a promoter died at `point`."""
    last = next(p.index for p in points if p.kind == "after" and p.what == "set_registered_model_alias")
    return point.kind != "file" and point.index + (point.kind == "after") > last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", choices=("sqlite", "server"), default="sqlite")
    parser.add_argument("--every", type=int, default=1, help="kill only at every so manieth point")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file for the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mechdiff-kills-") as folder:
        root = Path(folder)
        os.environ["MECHDIFF_CACHE"] = str(root / "cache")
        os.chdir(root)
        direct = f"sqlite:///{root / 'mlflow.db'}"
        open_store(direct)
        with serving(root, direct) if options.store == "server" else nullcontext(direct) as uri:
            points = points_of(uri, root / "mlartifacts")
            sound: set[str] = set()
            started = time.perf_counter()
            chosen = points[:: options.every]
            found = [kill_at(uri, root / "mlartifacts", p, 2 + n, sound) for n, p in enumerate(chosen)]
            seconds = time.perf_counter() - started
    text = report(points, found, seconds, options.store)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    if "PROBLEM" in text:
        sys.exit(1)


def serving(root: Path, uri: str) -> Any:
    sys.path.insert(0, str(Path(__file__).parent))
    from promotions import server

    return server(root, uri)


def report(points: list[Point], found: list[Left], seconds: float, store: str) -> str:
    lines = [
        f"# A promoter killed at each of {len(found)} points ({store})",
        "",
        f"`python benchmarks/kills.py {' '.join(sys.argv[1:])}`",
        "",
        f"mechdiff {code_version()}, mlflow {mlflow.__version__}, Python {platform.python_version()}; of "
        f"{len(points)} points, {seconds:.0f} s. Good: the alias is where it was (or, once the request that "
        "moves it was answered, at the new version) and loads; all that is READY reads back whole; running "
        "it again finishes, with one version of the run and a history without gaps.",
        "",
        "| killed | step | | alias | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for left in found:
        point = left.point
        problems = list(left.problems)
        if left.moved != moves_the_alias(point, points):
            problems.append("the alias is not where it was expected")
        where = "moved" if left.moved else "as it was"
        verdict = "good" if not problems else "PROBLEM: " + "; ".join(problems).replace("|", "\\|")
        lines.append(f"| {point.kind} | {point.index} | {point.what} | {where} | {verdict} |")
    n_good = sum(line.endswith("| good |") for line in lines)
    return "\n".join([*lines, "", f"{n_good} of {len(found)} good.", ""])


if __name__ == "__main__":
    main()
