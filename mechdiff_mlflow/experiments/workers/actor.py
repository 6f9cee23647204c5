"""A worker of a cluster: one pair in memory, and the tasks it is handed.

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
    """Instructions by which a worker makes the pair, and what it must then be."""

    spec: PairSpec  # dtype in force
    device: str
    options: EngineOptions
    fingerprint: str  # of the driver's pair
    source: str  # digest of the driver's code
    needs_token: bool  # whether the cluster must be one that not everybody can use


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

    value: Any = None  # the answer
    error: str | None = None  # sentence of the MechdiffError instead; it would come again anywhere
    warnings: tuple[str, ...] = ()  # said on the way


class PairWorker:
    """Holds the pair."""

    def __init__(self) -> None:
        self._workers: LocalWorkers | None = None

    def call(self, method: str, *arguments: Any) -> Outcome:
        """Call one of the methods below."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            value, error = None, None
            try:
                value = getattr(self, method)(*arguments)
            except MechdiffError as problem:
                error = str(problem)
        texts = (str(warning.message) for warning in said if warning.category is UserWarning)
        return Outcome(value, error, tuple(dict.fromkeys(texts)))

    def load(self, recipe: Recipe) -> Loaded:
        """Load the pair, make sure that it is the driver's and sound."""
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

    def ping(self) -> None:
        """Say that it is there."""

    def run(self, task: Task, rows: Sequence[int]) -> dict[str, Tensor]:
        """Do a task for some of its prompts."""
        assert self._workers is not None
        found = task.part(rows).done(self._workers.pair)
        return {name: rows_of.detach().cpu().contiguous().clone() for name, rows_of in found.items()}

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Answer a question about the pair."""
        assert self._workers is not None
        return self._workers.ask(question, *arguments)
