"""Workers of a Ray cluster: each holds the pair, and they share out shards of prompts.

Only values travel: tasks and maps there, rows back. What comes back is put together in the order of the
prompts, so it does not matter who computed what, or how often.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.workers.actor import Loaded, Outcome, PairWorker, Recipe
from mechdiff_mlflow.experiments.workers.cluster import OWN, connected
from mechdiff_mlflow.experiments.workers.tasks import Task, Tensors
from mechdiff_mlflow.experiments.workers.workers import Answer, ComputeEnvironment, Workers
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.version import source_sha256

MAX_DEATHS = 3
"""Workers that may die of one thing before it is not handed to another."""

_NOTICE_AFTER_S = 60.0


@dataclass(frozen=True, eq=False)
class Job:
    """One call of a worker."""

    what: str  # as errors call it
    call: tuple[Any, ...]  # method of `PairWorker`, and its arguments
    prompts: tuple[object, ...] = ()  # what tells its prompts from those of other jobs; empty for none


@dataclass(eq=False)
class WorkerHandle:
    """One worker of the cluster."""

    actor: Any  # Ray's handle of it
    awaited: Any  # what Ray will resolve to its next answer; None when it is idle
    job: int | None = None  # index of its job; None while it loads, or does what nobody waits for any more
    loaded: Loaded | None = None  # what it said of itself once it had the pair
    prompts: set[tuple[object, ...]] = field(default_factory=set)  # of its jobs: it may have recordings


class RayWorkers(Workers):
    """Runs the models of a pair in the workers of a cluster.

    A worker that dies is replaced and its job given to another; what a job says is wrong with it is wrong
    everywhere, and ends the work.

    Args:
        pair: Of this process, whose models are never touched: see `load_pair(lazily=True)`.
        n_workers: How many hold the pair, as far as the cluster has room.
        address: `own` starts a cluster on this machine; `auto` or `host:port` joins one.
        device: Where workers put models; `auto` is CUDA where the cluster has GPUs.
        gpus_per_worker: For a model that is spread over several; None is one.

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
        self._stack.callback(self._kill_all)
        self._handles: list[WorkerHandle] = []
        self._environment: ComputeEnvironment | None = None
        self._failed_starts = 0
        self._n_workers = n_workers
        try:
            n_gpus = _gpus_of_each(self._ray, pair, device, gpus_per_worker)
            recipe = Recipe(
                spec=pair.spec,
                device=("cuda" if n_gpus else "cpu") if device == "auto" else device,
                options=pair.options,
                fingerprint=pair.fingerprint,
                source=source_sha256(),
                needs_token=os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
            )
            self._recipe = self._ray.put(recipe)
            self._remote = self._ray.remote(PairWorker).options(
                num_cpus=1, num_gpus=n_gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
            )
            while not self.loaded:
                self._start_missing()
                self._wait()
        except BaseException:
            self.close()
            raise

    @property
    def loaded(self) -> list[Loaded]:
        """The workers that are ready."""
        return [handle.loaded for handle in self._handles if handle.loaded is not None]

    @cached_property
    def environment(self) -> ComputeEnvironment:
        """The first worker's environment; workers with another are not let in."""
        assert self._environment is not None
        return self._environment

    @property
    def max_shards(self) -> int:
        """Few large shards where a worker holds one model at a time: each costs loading both."""
        return self._n_workers if self.environment.one_at_a_time else super().max_shards

    def run(self, task: Task, shards: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensors]]:
        """Share the shards out; the task travels once however many there are."""
        whole, digest = self._ray.put(task), task.prompts.digest
        jobs = []
        for rows in shards:
            what = f"{type(task).__name__} of {len(rows)} {task.prompts.split} prompts"
            jobs.append(Job(what, ("run", whole, rows), (digest, *rows)))
        yield from self._share_out(jobs)

    def ask(self, question: Callable[..., Answer], *arguments: object) -> Answer:
        """Ask any worker."""
        ((_, value),) = self._share_out([Job(question.__name__, ("ask", question, *arguments))])
        return cast(Answer, value)

    def close(self) -> None:
        """Let the workers go, and a cluster of our own."""
        self._stack.close()

    def _kill_all(self) -> None:
        while self._handles:
            self._remove(self._handles[0])

    def _share_out(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        """The answers of all jobs as they come, each with its index."""
        waiting = deque(range(len(jobs)))
        n_unanswered = len(jobs)
        deaths: Counter[int] = Counter()
        for handle in self._handles:
            if handle.awaited is None:  # it may have died since, and no job is to blame
                handle.awaited = handle.actor.call.remote("ping")
        try:
            while n_unanswered:
                self._start_missing()
                for handle in self._handles:
                    if waiting and handle.awaited is None:
                        self._hand_out(handle, waiting, jobs)
                index, answer = self._wait()
                if index is None:
                    continue
                if isinstance(answer, Outcome):
                    if answer.error is not None:
                        raise MechdiffError(answer.error)
                    n_unanswered -= 1
                    yield index, answer.value
                    continue
                deaths[index] += 1
                if deaths[index] >= MAX_DEATHS:
                    raise MechdiffError(
                        f"{jobs[index].what} killed {MAX_DEATHS} workers one after the other ({answer}); it "
                        "may need more memory than they have: lower --batch-size or --memory-budget, then "
                        "start again."
                    )
                waiting.append(index)  # last in line: if it is to blame, the others are done before
        finally:
            for handle in self._handles:
                handle.job = None

    def _hand_out(self, handle: WorkerHandle, waiting: deque[int], jobs: Sequence[Job]) -> None:
        """Give a worker a job whose prompts it knows, if there is one; otherwise the first in line."""
        known = (i for i in waiting if jobs[i].prompts and jobs[i].prompts in handle.prompts)
        index = next(known, waiting[0])
        waiting.remove(index)
        handle.job, handle.awaited = index, handle.actor.call.remote(*jobs[index].call)
        handle.prompts.add(jobs[index].prompts)

    def _wait(self) -> tuple[int | None, Outcome | str]:
        """Wait until a worker answers or dies: its job, if any, and the outcome or why it died."""
        handles = {handle.awaited: handle for handle in self._handles if handle.awaited is not None}
        ready, _ = self._ray.wait(list(handles), num_returns=1, timeout=_NOTICE_AFTER_S)
        if not ready:
            if not self.loaded:
                free = self._ray.available_resources()
                warnings.warn(
                    f"No worker has started for {_NOTICE_AFTER_S:.0f} s; the cluster has "
                    f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free.",
                    stacklevel=2,
                )
            return None, ""
        handle = handles[ready[0]]
        handle.awaited, index, handle.job = None, handle.job, None
        try:
            outcome: Outcome = self._ray.get(ready[0])
        except self._ray.exceptions.RayTaskError:
            raise  # a fault of ours, with its traceback
        except self._ray.exceptions.RayError as error:
            self._remove(handle)
            reason = _reason(error)
            if handle.loaded is None:
                self._count_failed_start(reason)
            return index, reason
        for text in outcome.warnings:
            warnings.warn(text, stacklevel=2)
        if handle.loaded is None:
            if outcome.error is not None:
                raise MechdiffError(outcome.error)
            self._admit(handle, outcome.value)
        return index, outcome

    def _admit(self, handle: WorkerHandle, loaded: Loaded) -> None:
        theirs, ours = loaded.environment, self._environment or loaded.environment
        if theirs != ours:
            raise MechdiffError(
                f"{loaded.host} computes with {theirs.hardware} ({theirs.engine_mode}) and other workers "
                f"with {ours.hardware} ({ours.engine_mode}); use nodes of one kind, so that numbers do not "
                "depend on who computed them."
            )
        handle.loaded, self._environment = loaded, ours
        self._failed_starts = 0

    def _count_failed_start(self, reason: str) -> None:
        """Stop, or go on with those that are there, when there is no sense in starting more workers."""
        self._failed_starts += 1
        if self._failed_starts < MAX_DEATHS:
            return
        what = f"{MAX_DEATHS} workers died one after the other while they loaded {self.pair.name}"
        if not self.loaded:
            raise MechdiffError(
                f"{what} ({reason}); look at their memory, and that mechdiff is installed on every node."
            )
        if self._failed_starts == MAX_DEATHS:
            warnings.warn(f"{what} ({reason}); going on with those that are there.", stacklevel=2)

    def _start_missing(self) -> None:
        """Ask for workers; each starts when the cluster has room."""
        if not self._handles and self._failed_starts >= MAX_DEATHS:
            self._failed_starts = 0  # nobody is left: try again
        while len(self._handles) < self._n_workers and self._failed_starts < MAX_DEATHS:
            actor = self._remote.remote()
            self._handles.append(WorkerHandle(actor, actor.call.remote("load", self._recipe)))

    def _remove(self, handle: WorkerHandle) -> None:
        self._handles.remove(handle)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(handle.actor)


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
