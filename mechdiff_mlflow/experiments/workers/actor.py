"""What runs on a worker of a cluster: one pair in memory, and the tasks it is handed.

It imports no MLflow and writes nothing: values come in, values go out.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.doctor import require_sound
from mechdiff_mlflow.experiments.workers.tasks import Task
from mechdiff_mlflow.experiments.workers.workers import ComputeEnvironment, LocalWorkers
from mechdiff_mlflow.models.pairs import EngineOptions, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.version import source_sha256


@dataclass(frozen=True)
class Recipe:
    """How a worker makes the pair, and what it must then be.

    Args:
        spec: The pair, dtype in force.
        device: Where to put the models.
        options: Memory bounds of the engines.
        fingerprint: Of the driver's pair.
        source: Digest of the driver's code.
        needs_token: Whether the cluster must be one that not everybody can use.
    """

    spec: PairSpec
    device: str
    options: EngineOptions
    fingerprint: str
    source: str
    needs_token: bool


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
    """What became of a call.

    Args:
        value: The answer.
        error: Sentence of the MechdiffError instead of an answer; it would come again anywhere.
        warnings: Said on the way.
    """

    value: Any = None
    error: str | None = None
    warnings: tuple[str, ...] = ()


class PairWorker:
    """Holds the pair."""

    def __init__(self) -> None:
        self._workers: LocalWorkers | None = None

    def load(self, recipe: Recipe) -> Outcome:
        """Load the pair, make sure that it is the driver's and sound."""
        return _outcome(lambda: self._load(recipe))

    def _load(self, recipe: Recipe) -> Loaded:
        host = platform.node() or "a worker"
        if recipe.needs_token and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
            raise MechdiffError(
                "The Ray cluster asks for no token, so whoever reaches it can run code on it; start its "
                "nodes with RAY_AUTH_MODE=token, or set RAY_AUTH_MODE=disabled here to use it as it is."
            )
        if source_sha256() != recipe.source:
            raise MechdiffError(
                f"{host} has other code of mechdiff than the driver began with; install one version on "
                "all nodes, and leave it as it is until the command has ended."
            )
        pair = load_pair(recipe.spec, device=recipe.device, options=recipe.options)
        if pair.fingerprint != recipe.fingerprint:
            raise MechdiffError(
                f"Pair {pair.name} on {host} is {pair.fingerprint} and the driver's is "
                f"{recipe.fingerprint}; give all nodes the same weights, tokenizers and prompts."
            )
        require_sound(pair)
        self._workers = LocalWorkers(pair)
        n_parameters = sum(weight.numel() for weight in pair.tuned.model.parameters())
        return Loaded(self._workers.environment, pair.device, n_parameters, host, os.getpid())

    def ping(self) -> Outcome:
        """Say that it is there."""
        return Outcome()

    def run(self, task: Task, rows: Sequence[int]) -> Outcome:
        """Do a task for some of its prompts."""
        return _outcome(lambda: self._run(task, rows))

    def _run(self, task: Task, rows: Sequence[int]) -> dict[str, Tensor]:
        assert self._workers is not None
        found = task.part(rows).done(self._workers.pair)
        return {name: rows_of.detach().cpu().contiguous().clone() for name, rows_of in found.items()}

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Outcome:
        """Answer a question about the pair."""
        assert self._workers is not None
        workers = self._workers
        return _outcome(lambda: workers.ask(question, *arguments))


def _outcome(work: Callable[[], Any]) -> Outcome:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            value, error = work(), None
        except MechdiffError as problem:
            value, error = None, str(problem)
    texts = (str(warning.message) for warning in said if warning.category is UserWarning)
    return Outcome(value, error, tuple(dict.fromkeys(texts)))
