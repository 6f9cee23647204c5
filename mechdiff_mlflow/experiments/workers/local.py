"""Workers that are this very process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from torch import Tensor

from mechdiff_mlflow.experiments import rows
from mechdiff_mlflow.experiments.progress import Stage, silent
from mechdiff_mlflow.experiments.rows import Replacements, SiteRows
from mechdiff_mlflow.experiments.workers.tasks import Task, Tensors
from mechdiff_mlflow.experiments.workers.workers import Setting, Shape, Workers
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Site


class LocalWorkers(Workers):
    """Runs the models in this process, a whole split at a time."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Tensors]]:
        """In order."""
        for index, task in enumerate(tasks):
            yield index, task.done(self.pair)

    def setting(self) -> Setting:
        """Of this process."""
        return self._setting

    @cached_property
    def _setting(self) -> Setting:
        return Setting.of(self.pair)  # once: where one model is held at a time, asking tuned may load it

    def shapes(self) -> tuple[Shape, Shape]:
        """From the engines."""
        return Shape.of(self.pair.base), Shape.of(self.pair.tuned)

    def n_heads(self, layer: int) -> int:
        """As the engine finds them."""
        with self.pair.tuned.engine() as engine:
            return engine.heads(layer).n_heads

    def unembedding(self, role: str) -> Tensor:
        """The model's own."""
        return (self.pair.base if role == "base" else self.pair.tuned).unembedding()

    def prepare(self, prompt_sets: Sequence[PromptSet], position: Position) -> None:
        """Where one model is held at a time, record all of base while it is in memory."""
        super().prepare(prompt_sets, position)
        if self.pair.one_at_a_time:
            for prompts in prompt_sets:
                self.pair.recorded_base(prompts, position)

    def close(self) -> None:
        """The pair is the caller's."""

    @property
    def most_shards(self) -> int:
        """One: nothing is gained by cutting."""
        return 1

    def capture(
        self, role: str, prompts: PromptSet, position: Position, sites: Sequence[Site]
    ) -> Mapping[Site, Tensor]:
        """As the engine gives it: over a memory budget rows lie on disk."""
        return rows.capture(self.pair, role, prompts, position, list(sites))

    def score(
        self, prompts: PromptSet, position: Position, replacements: Replacements, stage: Stage = silent
    ) -> dict[Site, SiteRows]:
        """As the engine gives it, with its progress chunk by chunk."""
        return rows.score(self.pair, prompts, position, replacements, stage)
