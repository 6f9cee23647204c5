"""What runs on a worker of a cluster: one pair in memory, and the tasks it is handed.

It imports no MLflow and writes nothing: values come in, values go out.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.doctor import demand_sound
from mechdiff_mlflow.experiments.rows import Replacements
from mechdiff_mlflow.experiments.workers.local import LocalWorkers
from mechdiff_mlflow.experiments.workers.tasks import Task
from mechdiff_mlflow.experiments.workers.workers import Setting
from mechdiff_mlflow.models.pairs import EngineOptions, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.version import source_sha256

QUESTIONS = ("shapes", "n_heads", "unembedding")
"""Methods of `Workers` that a worker answers."""


@dataclass(frozen=True)
class Recipe:
    """How a worker makes the pair, and what it must then be.

    Args:
        spec: The pair, dtype in force.
        device: Where to put the models.
        options: Memory bounds of the engines.
        fingerprint: Of the driver's pair.
        source: Digest of the driver's code.
        asks_for_token: Whether the cluster must be one that not everybody can use.
    """

    spec: PairSpec
    device: str
    options: EngineOptions
    fingerprint: str
    source: str
    asks_for_token: bool


@dataclass(frozen=True)
class Loaded:
    """A worker that is ready.

    Args:
        setting: What its numbers depend on.
        device: Where its models are.
        n_parameters: Of the tuned model.
        host: Name of its machine.
        pid: Of its process.
    """

    setting: Setting
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

        def loaded() -> Loaded:
            host = platform.node() or "a worker"
            if recipe.asks_for_token and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
                raise MechdiffError(
                    "The Ray cluster asks for no token, so whoever reaches it can run code on it; start its "
                    "nodes with RAY_AUTH_MODE=token, or set RAY_AUTH_MODE=disabled here to use it as it is."
                )
            if source_sha256() != recipe.source:
                raise MechdiffError(
                    f"{host} has other code of mechdiff than the driver began with; install one version on "
                    "all nodes, and leave it as it is until the command has ended."
                )
            # The spec has the dtype in force already.
            pair = load_pair(recipe.spec, device=recipe.device, options=recipe.options)
            if pair.fingerprint != recipe.fingerprint:
                raise MechdiffError(
                    f"Pair {pair.name} on {host} is {pair.fingerprint} and the driver's is "
                    f"{recipe.fingerprint}; give all nodes the same weights, tokenizers and prompts."
                )
            demand_sound(pair)
            self._workers = LocalWorkers(pair)
            n_parameters = sum(weight.numel() for weight in pair.tuned.model.parameters())
            return Loaded(self._workers.setting(), pair.device, n_parameters, host, os.getpid())

        return _outcome(loaded)

    def ping(self) -> Outcome:
        """Say that it is there."""
        return Outcome()

    def run(self, task: Task, maps: Replacements) -> Outcome:
        """Do a task, given the maps that it came without."""
        assert self._workers is not None
        pair = self._workers.pair
        whole = task.with_maps(maps)

        def done() -> dict[str, Any]:
            found = whole.done(pair)
            return {name: found[name].detach().cpu().contiguous().clone() for name in whole.names}

        return _outcome(done)

    def ask(self, question: str, *arguments: Any) -> Outcome:
        """Answer one of `QUESTIONS`."""
        assert question in QUESTIONS
        return _outcome(lambda: getattr(self._workers, question)(*arguments))


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
