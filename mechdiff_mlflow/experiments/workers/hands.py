"""The workers of a cluster, one by one: started, replaced when they die, handed one thing at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mechdiff_mlflow.experiments.workers.actor import Loaded, PairWorker


@dataclass(eq=False)
class Hand:
    """One worker.

    Args:
        actor: Ray's handle of it.
        loading: What will say that it has the pair, or is there still; None once it has said so.
        busy: What will say that it is done with what it was handed; None when it is idle.
        loaded: What it said of itself.
        seen: Digests of prompts that it has run before, and may have kept recordings of.
    """

    actor: Any
    loading: Any
    busy: Any = None
    loaded: Loaded | None = None
    seen: set[str] = field(default_factory=set)

    @property
    def waits_for(self) -> Any:
        """What it will answer next; None when nothing was asked."""
        return self.busy if self.loading is None else self.loading


def new_hand(ray: Any, recipe: Any, *, num_gpus: float) -> Hand:
    """Ask for a worker; it starts when the cluster has room."""
    remote = ray.remote(PairWorker).options(
        num_cpus=1, num_gpus=num_gpus, max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD"
    )
    actor = remote.remote()
    return Hand(actor, actor.load.remote(recipe))
