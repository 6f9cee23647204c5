"""What experiments ask of whoever runs the models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from mechdiff_mlflow.experiments.progress import Stage, silent
from mechdiff_mlflow.experiments.rows import Array, Replacements, SiteRows
from mechdiff_mlflow.experiments.substitution import Heads
from mechdiff_mlflow.experiments.workers.shards import MOST, Merged, part_of, shards_of
from mechdiff_mlflow.experiments.workers.tasks import (
    AtSites,
    Capture,
    CleanNoise,
    Gradients,
    HeadPatches,
    Score,
    Swap,
    Task,
    Tensors,
)
from mechdiff_mlflow.models.pairs import Pair, Side
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Site

_REREAD = 4
"""Prompts that are read twice for the noise floor."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model: its decoder blocks and the width of the residual stream."""

    n_layers: int
    width: int

    @classmethod
    def of(cls, side: Side) -> Shape:
        """Ask the engine."""
        with side.engine() as engine:
            return cls(engine.n_layers, engine.width)


@dataclass(frozen=True, slots=True)
class Setting:
    """What the last digits of numbers depend on beside the pair, and how it is held.

    Args:
        engine: Which of the engine's paths patches the tuned model.
        where: Device and version of torch.
        one_at_a_time: Whether only the model in use is in memory.
    """

    engine: str
    where: str
    one_at_a_time: bool

    @classmethod
    def of(cls, pair: Pair) -> Setting:
        """Ask the engine of the tuned model."""
        with pair.tuned.engine() as engine:
            mode = str(engine.mode)
        name = torch.cuda.get_device_name(pair.device) if pair.device.startswith("cuda") else pair.device
        return cls(mode, f"{name}, torch {torch.__version__}", pair.one_at_a_time)


class Workers(ABC):
    """Runs the models of a pair.

    Args:
        pair: What is asked about; its models need not be in this process.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    @abstractmethod
    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Tensors]]:
        """Do all tasks; each result with the index of its task, in the order in which they are finished.

        Raises:
            MechdiffError: What a task raised, or that it could not be done.
        """

    @abstractmethod
    def setting(self) -> Setting:
        """Where numbers come from."""

    @abstractmethod
    def shapes(self) -> tuple[Shape, Shape]:
        """Of base and tuned."""

    @abstractmethod
    def n_heads(self, layer: int) -> int:
        """Attention heads of a layer of the tuned model.

        Raises:
            MechdiffError: The layer does not exist, or its heads cannot be told apart.
        """

    @abstractmethod
    def unembedding(self, role: str) -> Tensor:
        """See `Side.unembedding`."""

    def prepare(self, prompt_sets: Sequence[PromptSet], position: Position) -> None:
        """Hear which prompts will be asked about, and see that both models read the same.

        Raises:
            MechdiffError: They do not, see `Pair.check_same_tokens`.
        """
        for prompts in prompt_sets:
            self.pair.check_same_tokens(prompts, position)

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held."""

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def most_shards(self) -> int:
        """Into how many shards a task is cut at most."""
        return 1 if self.setting().one_at_a_time else MOST

    def capture(
        self, role: str, prompts: PromptSet, position: Position, sites: Sequence[Site]
    ) -> Mapping[Site, Tensor]:
        """See `rows.capture`."""
        sites = tuple(dict.fromkeys(sites))
        return AtSites(self.whole(Capture(prompts, position, role, sites)), "", sites)

    def score(
        self, prompts: PromptSet, position: Position, replacements: Replacements, stage: Stage = silent
    ) -> dict[Site, SiteRows]:
        """See `rows.score`."""
        task = Score(prompts, position, replacements)
        return task.site_rows(self.whole(task, stage, "patching tuned"))

    def clean_noise(self, role: str, prompts: PromptSet, position: Position) -> float:
        """How far apart two clean runs of one model are in the mean over a few of the prompts, nats.

        The larger of the KL between runs in a batch and alone, and of what rounding alone leaves.
        """
        few = prompts.prompts[:: -(-len(prompts) // _REREAD)]
        task = CleanNoise(PromptSet(prompts.split, few), position, role)
        return float(self.whole(task)["KL"].mean(0).max())

    def gradients(
        self, prompts: PromptSet, position: Position, sites: Sequence[Site], seed: int
    ) -> dict[Site, Tensor]:
        """See `PatchEngine.score_gradients`."""
        found = self.whole(Gradients(prompts, position, tuple(sites), seed))
        return {site: found[str(site)] for site in sites}

    def swap(
        self, taker: str, prompts: PromptSet, position: Position, sites: Sequence[Site], stage: Stage
    ) -> Tensors:
        """See `unmapped.swap`."""
        giver = "tuned" if taker == "base" else "base"
        return self.whole(
            Swap(prompts, position, taker, tuple(sites)), stage, f"patching {taker} from {giver}"
        )

    def head_patches(
        self, layer: int, prompts: PromptSet, position: Position, sets: Sequence[Heads]
    ) -> list[Array]:
        """KL(patched ‖ clean) in nats of the base's heads in the tuned model, for every set of heads, [n]."""
        found = self.whole(HeadPatches(prompts, position, layer, tuple(sets)))["KL"]
        return [np.asarray(column) for column in found.numpy().T]

    def whole(self, task: Task, stage: Stage = silent, name: str = "") -> Tensors:
        """The result of a task that was done shard by shard."""
        if not len(task.prompts):
            return task.run(self.pair)  # says what is wrong with that
        shards = shards_of(task, self.pair, self.most_shards)
        found: dict[int, Tensors] = {}
        with stage(name, len(task.prompts)) as advance:
            for index, result in self.run([part_of(task, rows) for rows in shards]):
                found[index] = result
                advance(len(shards[index]))
        return Merged([(rows, found[index]) for index, rows in enumerate(shards)])
