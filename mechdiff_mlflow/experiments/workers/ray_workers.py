"""Workers of a Ray cluster: each holds the pair, and they share out shards of prompts.

Only values travel: tasks and maps there, rows back. What comes back is put together in the order of the
prompts, so it does not matter who computed what, or how often.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.workers.actor import Loaded, Outcome, Recipe
from mechdiff_mlflow.experiments.workers.cluster import OWN, connected
from mechdiff_mlflow.experiments.workers.hands import Hand, new_hand
from mechdiff_mlflow.experiments.workers.tasks import Task, Tensors
from mechdiff_mlflow.experiments.workers.workers import Setting, Shape, Workers
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.version import source_sha256

MOST_DEATHS = 3
"""How many workers may die of one thing before it is not handed to another."""

_PATIENCE_S = 60.0


@dataclass(frozen=True, eq=False)
class Job:
    """One call of a worker.

    Args:
        what: As errors call it.
        call: Makes the call, given the worker's actor.
        digest: Of the prompts that it runs; empty for none.
    """

    what: str
    call: Any
    digest: str = ""


class RayWorkers(Workers):
    """Runs the models of a pair in the workers of a cluster.

    A worker that dies is replaced and its task given to another; what a task says is wrong with it is wrong
    everywhere, and ends the work.

    Args:
        pair: Of this process, whose models are never touched: see `load_pair(lazily=True)`.
        n_workers: How many hold the pair; as many as the cluster has room for at a time.
        address: `own` starts a cluster on this machine; `auto` or `host:port` joins one.
        device: Where workers put models; `auto` is CUDA where the cluster has GPUs.
        gpus_per_worker: Of a model that is spread over several; None is one.

    Raises:
        MechdiffError: Ray is not installed, there is no such cluster, or it has no room for a worker.
    """

    def __init__(
        self,
        pair: Pair,
        n_workers: int,
        *,
        address: str = OWN,
        device: str = "auto",
        gpus_per_worker: int | None = None,
    ) -> None:
        super().__init__(pair)
        self._stack = ExitStack()
        self._ray: Any = self._stack.enter_context(connected(address, n_workers))
        self._stack.callback(self._let_go)
        self._hands: list[Hand] = []
        self._setting: Setting | None = None
        self._failed_starts: list[str] = []
        self._n_workers = n_workers
        try:
            self._num_gpus = _gpus_of_each(self._ray, pair, device, gpus_per_worker)
            if device == "auto":
                device = "cuda" if self._num_gpus else "cpu"
            self._recipe = self._ray.put(
                Recipe(
                    *(pair.spec, device, pair.options, pair.fingerprint, source_sha256()),
                    asks_for_token=os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
                )
            )
            self._settle()
        except BaseException:
            self.close()
            raise

    @property
    def loaded(self) -> list[Loaded]:
        """The workers that are ready."""
        return [hand.loaded for hand in self._hands if hand.loaded is not None]

    def setting(self) -> Setting:
        """Of the first worker; the others are not let in with another one."""
        assert self._setting is not None
        return self._setting

    def shapes(self) -> tuple[Shape, Shape]:
        """From a worker."""
        found: tuple[Shape, Shape] = self._ask("shapes")
        return found

    def n_heads(self, layer: int) -> int:
        """From a worker."""
        return int(self._ask("n_heads", layer))

    def unembedding(self, role: str) -> Tensor:
        """From a worker."""
        found: Tensor = self._ask("unembedding", role)
        return found

    @property
    def most_shards(self) -> int:
        """Where a worker holds one model at a time, few large shards: each costs loading both."""
        return self._n_workers if self.setting().one_at_a_time else super().most_shards

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Tensors]]:
        """Share the tasks out; maps travel once however many tasks have them."""
        maps = {id(task.maps): task.maps for task in tasks}
        sent = {key: self._ray.put(value) for key, value in maps.items()}
        jobs = [_job_of(task, sent[id(task.maps)]) for task in tasks]
        yield from self._share_out(jobs)

    def close(self) -> None:
        """Let the workers go, and a cluster of our own."""
        self._stack.close()

    def _let_go(self) -> None:
        for hand in list(self._hands):
            self._replace(hand)

    def _ask(self, question: str, *arguments: Any) -> Any:
        ((_, value),) = self._share_out([Job(question, lambda actor: actor.ask.remote(question, *arguments))])
        return value

    def _settle(self) -> None:
        """Wait for the first worker, which tells what kind all are."""
        self._fill()
        while not self.loaded:
            self._wait({}, deque(), Counter())

    def _share_out(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        """The answers of all jobs as they come, each with its index."""
        left = deque(range(len(jobs)))
        held: dict[Hand, int] = {}
        deaths: Counter[int] = Counter()
        for hand in self._hands:
            if hand.waits_for is None:  # it may have died since, and no job is to blame
                hand.loading = hand.actor.ping.remote()
        while left or held:
            self._fill()
            for hand in self._hands:
                if left and hand.waits_for is None:
                    index = _next_for(hand, left, jobs)
                    hand.busy = jobs[index].call(hand.actor)
                    hand.seen.add(jobs[index].digest)
                    held[hand] = index
            yield from self._wait(held, left, deaths, jobs)

    def _wait(
        self, held: dict[Hand, int], left: deque[int], deaths: Counter[int], jobs: Sequence[Job] = ()
    ) -> list[tuple[int, Any]]:
        """Wait until somebody answers or dies; the answers."""
        by_reference = {hand.waits_for: hand for hand in self._hands if hand.waits_for is not None}
        ready, _ = self._ray.wait(list(by_reference), num_returns=1, timeout=_PATIENCE_S)
        if not ready and not self.loaded:
            free = self._ray.available_resources()
            warnings.warn(
                f"No worker has started for {_PATIENCE_S:.0f} s; the cluster has {free.get('CPU', 0):g} CPUs "
                f"and {free.get('GPU', 0):g} GPUs free.",
                stacklevel=2,
            )
        answers = []
        for reference in ready:
            hand = by_reference[reference]
            try:
                outcome: Outcome = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError:
                hand.busy = None
                raise  # a fault of ours, with its traceback
            except self._ray.exceptions.RayError as error:
                self._bury(hand, _reason(error), held, left, deaths, jobs)
                continue
            for text in outcome.warnings:
                warnings.warn(text, stacklevel=2)
            if hand.busy is not None and hand not in held:  # of work that was given up
                hand.busy = None
                continue
            if outcome.error is not None:
                hand.busy = None
                raise MechdiffError(outcome.error)
            if hand.loading is not None:
                hand.loading = None
                if hand.loaded is None:
                    self._welcome(hand, outcome.value)
            else:
                hand.busy = None
                answers.append((held.pop(hand), outcome.value))
        return answers

    def _welcome(self, hand: Hand, loaded: Loaded) -> None:
        hand.loaded = loaded
        self._failed_starts.clear()
        if self._setting is None:
            self._setting = loaded.setting
        elif loaded.setting != self._setting:
            raise MechdiffError(
                f"{loaded.host} computes with {loaded.setting.where} ({loaded.setting.engine}) and other "
                f"workers with {self._setting.where} ({self._setting.engine}); use nodes of one kind, "
                "so that numbers do not depend on who computed them."
            )

    def _bury(
        self,
        hand: Hand,
        reason: str,
        held: dict[Hand, int],
        left: deque[int],
        deaths: Counter[int],
        jobs: Sequence[Job],
    ) -> None:
        """Replace a worker that died, and put what it held in line again."""
        self._replace(hand)
        if hand not in held:
            if hand.loaded is None:
                self._failed_starts.append(reason)
                self._consider_starts()
            return
        index = held.pop(hand)
        deaths[index] += 1
        if deaths[index] >= MOST_DEATHS:
            raise MechdiffError(
                f"{jobs[index].what} killed {MOST_DEATHS} workers one after the other ({reason}); it may "
                "need more memory than they have: lower --batch-size or --memory-budget, then start again."
            )
        left.append(index)  # last in line: if it is to blame, the others are done before

    def _consider_starts(self) -> None:
        """Whether there is any sense in starting more workers."""
        if len(self._failed_starts) < MOST_DEATHS:
            return
        what = f"{MOST_DEATHS} workers died one after the other while they loaded {self.pair.name}"
        reason = self._failed_starts[-1]
        if not self.loaded:
            raise MechdiffError(
                f"{what} ({reason}); look at their memory, and that mechdiff is installed on every node."
            )
        if len(self._failed_starts) == MOST_DEATHS:
            warnings.warn(f"{what} ({reason}); going on with those that are there.", stacklevel=2)

    def _fill(self) -> None:
        if not self._hands:
            self._failed_starts.clear()  # nobody is left: try again
        while len(self._hands) < self._n_workers and len(self._failed_starts) < MOST_DEATHS:
            self._hands.append(new_hand(self._ray, self._recipe, num_gpus=self._num_gpus))

    def _replace(self, hand: Hand) -> None:
        """Away with it; the next one comes with `_fill`."""
        self._hands.remove(hand)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(hand.actor)


def _job_of(task: Task, maps: Any) -> Job:
    without = task.with_maps({})
    what = f"{type(task).__name__} of {len(task.prompts)} {task.prompts.split} prompts"
    return Job(what, lambda actor: actor.run.remote(without, maps), task.prompts.digest)


def _next_for(hand: Hand, left: deque[int], jobs: Sequence[Job]) -> int:
    """What it has run the prompts of before, if there is any of that; otherwise what is first in line."""
    index = next((i for i in left if jobs[i].digest and jobs[i].digest in hand.seen), left[0])
    left.remove(index)
    return index


def _gpus_of_each(ray: Any, pair: Pair, device: str, asked: int | None) -> int:
    """GPUs that a worker takes.

    Raises:
        MechdiffError: No node has so many.
    """
    most = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if device == "cpu" or (device == "auto" and not most):
        return 0
    if asked is None and pair.spec.device_map is not None:
        raise MechdiffError(
            f"Pair {pair.name} is spread over GPUs by its device_map; say over how many of a node with "
            "--gpus-per-worker."
        )
    wanted = asked or 1
    if wanted > most:
        raise MechdiffError(
            f"A worker needs {wanted} GPUs and no node of the cluster has more than {most:g}; lower "
            "--gpus-per-worker, or pass --device cpu."
        )
    return wanted


def _reason(error: Exception) -> str:
    """The line of Ray's report that says why."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "memory" in line or "signal" in line.lower()]
    return ((telling or lines or [type(error).__name__])[-1]).rstrip(".")[:300]
