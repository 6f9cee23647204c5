"""Workers of a Ray cluster: each holds the pair, and they share out shards of prompts.

Only values travel: tasks and maps there, rows back. What comes back is put together in the order of the
prompts, so it does not matter who computed what, or how often.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.preflight import require_sound
from mechdiff_mlflow.experiments.workers.cluster import OWN, connected
from mechdiff_mlflow.experiments.workers.tasks import Task, Tensors
from mechdiff_mlflow.experiments.workers.workers import Answer, ComputeEnvironment, LocalWorkers, Workers
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.version import source_sha256

MAX_DEATHS = 3
"""Workers that may die of one job before it is not tried again."""

MAX_RESTARTS = 12
"""How often Ray starts a worker again."""

_NOTICE_AFTER_S = 60.0


@dataclass(frozen=True)
class Loaded:
    """A worker that is ready: what its numbers depend on, where its models are, its machine and process."""

    environment: ComputeEnvironment
    device: str
    n_parameters: int
    host: str
    pid: int


@dataclass(frozen=True)
class Outcome:
    """The result of a call."""

    loaded: Loaded | None  # who answers; None where the pair could not be loaded
    value: Any  # the answer
    error: str | None  # sentence of the MechdiffError instead; it would come again anywhere
    warnings: tuple[str, ...]  # said on the way


@dataclass
class PairWorker:
    """The process of a worker: it holds the pair, imports no MLflow and writes nothing."""

    spec: PairSpec  # dtype in force
    device: str
    options: EngineOptions
    fingerprint: str  # of the driver's pair
    source: str  # digest of the driver's code
    needs_token: bool  # whether the cluster must be one that not everybody can use
    _workers: LocalWorkers | None = None
    _loaded: Loaded | None = None

    def call(self, method: str, *arguments: Any) -> Outcome:
        """Call one of the methods below, with the pair loaded."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            value, error = None, None
            try:
                self.load()
                value = getattr(self, method)(*arguments)
            except MechdiffError as problem:
                error = str(problem)
        texts = (str(warning.message) for warning in said if warning.category is UserWarning)
        return Outcome(self._loaded, value, error, tuple(dict.fromkeys(texts)))

    def load(self) -> None:
        """Load the pair, unless that is done, and make sure that it is the driver's and sound."""
        if self._loaded is not None:
            return
        host = platform.node() or "a worker"
        if self.needs_token and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            raise MechdiffError(
                "The Ray cluster asks for no token, so whoever reaches it can run code on it; start its "
                "nodes with RAY_AUTH_MODE=token, or set RAY_AUTH_MODE=disabled here to use it as it is."
            )
        if source_sha256() != self.source:
            raise MechdiffError(
                f"{host} has other code of mechdiff than the driver began with; install one version on "
                "all nodes, and leave it as it is until the command has ended."
            )
        pair = load_pair(self.spec, device=self.device, options=self.options)
        if pair.fingerprint != self.fingerprint:
            raise MechdiffError(
                f"Pair {pair.name} on {host} is {pair.fingerprint} and the driver's is "
                f"{self.fingerprint}; give all nodes the same weights, tokenizers and prompts."
            )
        require_sound(pair)
        self._workers = LocalWorkers(pair)
        n_parameters = sum(weight.numel() for weight in pair.tuned.model.parameters())
        self._loaded = Loaded(self._workers.environment, pair.device, n_parameters, host, os.getpid())

    def run(self, task: Task, rows: Sequence[int]) -> dict[str, Tensor]:
        """Do a task for some of its prompts."""
        assert self._workers is not None
        found = task.part(rows).done(self._workers.pair)
        return {name: rows_of.detach().cpu().contiguous().clone() for name, rows_of in found.items()}

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Answer a question about the pair."""
        assert self._workers is not None
        return self._workers.ask(question, *arguments)


class RayWorkers(Workers):
    """Runs the models of a pair in the workers of a cluster.

    Ray starts a worker again when it dies, where there is room, and its job is given to another; what a job
    says is wrong with it is wrong everywhere, and ends the work.

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
        self._actors: list[Any] = []  # Ray's handles of the workers, which go by their places here
        self._loaded: dict[int, Loaded] = {}  # what those that are ready have said of themselves
        self._idle: list[int] = []
        self._starting: dict[Any, int] = {}  # by what Ray will resolve once it is ready
        self._stack = ExitStack()
        self._ray: Any = self._stack.enter_context(connected(address, n_workers))
        try:
            n_gpus = _gpus_of_each(self._ray, pair, device, gpus_per_worker)
            worker = self._ray.remote(PairWorker).options(
                num_cpus=1,
                num_gpus=n_gpus,
                max_restarts=MAX_RESTARTS,
                max_task_retries=-1,
                scheduling_strategy="SPREAD",
            )
            for number in range(n_workers):
                actor = worker.remote(
                    spec=pair.spec,
                    device=("cuda" if n_gpus else "cpu") if device == "auto" else device,
                    options=pair.options,
                    fingerprint=pair.fingerprint,
                    source=source_sha256(),
                    needs_token=os.environ.get("RAY_AUTH_MODE", "").lower() == "token",
                )
                self._actors.append(actor)
                self._stack.callback(self._ray.kill, actor)
                self._start(number)
            while not self._loaded:
                self._wait({})
        except BaseException:
            self.close()
            raise

    @property
    def loaded(self) -> list[Loaded]:
        """The workers that are ready."""
        return list(self._loaded.values())

    @cached_property
    def environment(self) -> ComputeEnvironment:
        """The first worker's environment; workers with another are not let in."""
        return self.loaded[0].environment

    @property
    def max_shards(self) -> int:
        """Few large shards where a worker holds one model at a time: each costs loading both."""
        return len(self._actors) if self.environment.one_at_a_time else super().max_shards

    def run(self, task: Task, shards: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensors]]:
        """Share the shards out; the task travels once however many there are."""
        whole = self._ray.put(task)
        what = [f"{type(task).__name__} of {len(rows)} {task.prompts.split} prompts" for rows in shards]
        yield from self._share_out(what, [("run", whole, rows) for rows in shards])

    def ask(self, question: Callable[..., Answer], *arguments: object) -> Answer:
        """Ask any worker."""
        ((_, value),) = self._share_out([question.__name__], [("ask", question, *arguments)])
        return cast(Answer, value)

    def close(self) -> None:
        """Let the workers go, and a cluster of our own."""
        self._stack.close()

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _share_out(self, what: Sequence[str], jobs: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """The answers of jobs as they come, each with its index; `what` is how errors call them."""
        waiting, n_unanswered = list(range(len(jobs))), len(jobs)
        deaths: Counter[int] = Counter()
        running: dict[Any, tuple[int, int]] = {}  # by what Ray will resolve: the worker and the job
        for number in self._idle:  # it may have died since
            self._start(number)
        self._idle.clear()
        try:
            while n_unanswered:
                while waiting and self._idle:
                    number = self._idle.pop()
                    # Of the shards first its own, whose prompts it may have recorded for another task.
                    index = min(waiting, key=lambda i: i % len(self._actors) != number)
                    waiting.remove(index)
                    call = self._actors[number].call.options(max_task_retries=0)
                    running[call.remote(*jobs[index])] = number, index
                resolved = self._wait(running)
                if resolved is None:
                    continue
                number, index = running[resolved]
                outcome = self._outcome(resolved, number)
                del running[resolved]
                if isinstance(outcome, Outcome):
                    self._idle.append(number)
                    n_unanswered -= 1
                    yield index, outcome.value
                    continue
                self._start(number)
                deaths[index] += 1
                if deaths[index] >= MAX_DEATHS:
                    raise MechdiffError(
                        f"{what[index]} killed {MAX_DEATHS} workers one after the other ({outcome}); it may "
                        "need more memory than they have: lower --batch-size or --memory-budget, then start "
                        "again."
                    )
                waiting.append(index)  # last in line: if it is to blame, the others are done before
        finally:
            for number, _ in running.values():
                self._start(number)

    def _start(self, number: int) -> None:
        """Have a worker say that it is ready, as soon as it has done what it is doing."""
        self._loaded.pop(number, None)
        self._starting[self._actors[number].call.remote("load")] = number

    def _wait(self, running: Mapping[Any, object]) -> Any:
        """What Ray has resolved of `running`; None when a worker is ready, or nothing happens for a while."""
        found, _ = self._ray.wait([*self._starting, *running], timeout=_NOTICE_AFTER_S)
        if not found and not self._loaded:
            free = self._ray.available_resources()
            warnings.warn(
                f"No worker has started for {_NOTICE_AFTER_S:.0f} s; the cluster has "
                f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs free.",
                stacklevel=2,
            )
        if not found or found[0] in running:
            return found[0] if found else None
        number = self._starting.pop(found[0])
        outcome = self._outcome(found[0], number)
        if isinstance(outcome, Outcome):
            self._idle.append(number)
            return None
        what = f"A worker died while it loaded {self.pair.name}, and is not started again ({outcome})"
        if not (self._idle or self._starting or running):
            raise MechdiffError(f"{what}; look at its memory, and that mechdiff is installed on every node.")
        warnings.warn(f"{what}; going on with the others.", stacklevel=2)
        return None

    def _outcome(self, resolved: Any, number: int) -> Outcome | str:
        """The outcome of a call of a worker, or why it died; a MechdiffError where the outcome is one."""
        try:
            outcome: Outcome = self._ray.get(resolved)
        except self._ray.exceptions.RayTaskError:
            raise  # a fault of ours, with its traceback
        except self._ray.exceptions.RayError as error:
            return _reason(error)
        for text in outcome.warnings:
            warnings.warn(text, stacklevel=2)
        if outcome.error is not None:
            raise MechdiffError(outcome.error)
        assert outcome.loaded is not None, "or there is an error"
        self._loaded[number] = outcome.loaded
        theirs, ours = outcome.loaded.environment, self.environment
        if theirs != ours:
            raise MechdiffError(
                f"{outcome.loaded.host} computes with {theirs.hardware} ({theirs.engine_mode}) and other "
                f"workers with {ours.hardware} ({ours.engine_mode}); use nodes of one kind, so that numbers "
                "do not depend on who computed them."
            )
        return outcome


def _gpus_of_each(ray: Any, pair: Pair, device: str, asked: int | None) -> int:
    """GPUs that a worker takes; a MechdiffError where no node has so many."""
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
