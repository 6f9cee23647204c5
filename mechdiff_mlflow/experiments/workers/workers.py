"""The interface of workers that run models, and this process as one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.chunks import ChunkPlan, shape_of
from mechdiff_mlflow.experiments.progress import Stage, silent
from mechdiff_mlflow.experiments.rows import Replacements, SiteRows
from mechdiff_mlflow.experiments.workers.tasks import (
    Capture,
    LazyTensors,
    Score,
    Task,
    Tensors,
    at_sites,
)
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

Answer = TypeVar("Answer")

MAX_SHARDS = 32
"""Shards of a task: enough to lose little with one, few enough to cost nothing each."""

_NOISE_PROMPTS = 4
"""Prompts that are read twice for the noise floor."""


@dataclass(frozen=True, slots=True)
class ComputeEnvironment:
    """The conditions beside the pair that the last digits of numbers depend on."""

    engine_mode: str  # which of the engine's paths patches the tuned model
    hardware: str  # device and version of torch
    one_at_a_time: bool  # whether only the model in use is in memory


def compute_environment(pair: Pair) -> ComputeEnvironment:
    """The environment that computes the numbers of a loaded pair."""
    with pair.tuned.engine() as engine:
        mode = str(engine.mode)
    name = torch.cuda.get_device_name(pair.device) if pair.device.startswith("cuda") else pair.device
    return ComputeEnvironment(mode, f"{name}, torch {torch.__version__}", pair.one_at_a_time)


def model_sizes(pair: Pair) -> tuple[tuple[int, int], tuple[int, int]]:
    """Decoder blocks of base and of tuned, and the width of their residual streams."""
    sizes = []
    for side in (pair.base, pair.tuned):
        with side.engine() as engine:
            sizes.append((engine.n_layers, engine.width))
    return sizes[0], sizes[1]


def n_heads_of(pair: Pair, layer: int) -> int:
    """Attention heads of a layer of the tuned model; a MechdiffError where they cannot be told apart."""
    with pair.tuned.engine() as engine:
        return engine.heads(layer).n_heads


def clean_noise(pair: Pair, role: str, prompts: PromptSet, position: Position) -> float:
    """Mean distance between two clean runs of one model, nats, see `PatchEngine.clean_noise`."""
    with pair.side(role).engine() as engine:
        return float(engine.clean_noise(pair.tokens(role, prompts, position)).mean(0).max())


def unembedding(pair: Pair, role: str) -> Tensor:
    """See `Side.unembedding`."""
    return pair.side(role).unembedding()


class Workers(ABC):
    """Runs the models of a pair, which need not be in this process."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    @abstractmethod
    def run(self, task: Task, shards: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensors]]:
        """Do a task shard by shard; each result with the index of its shard, as they are finished.

        Raises:
            MechdiffError: What the task raised, or that it could not be done.
        """

    @abstractmethod
    def ask(self, question: Callable[..., Answer], *arguments: object) -> Answer:
        """Call a function of this package with the loaded pair and some arguments."""

    @property
    def max_shards(self) -> int:
        """Into how many shards a task is cut at most."""
        return 1 if self.environment.one_at_a_time else MAX_SHARDS

    @cached_property
    def environment(self) -> ComputeEnvironment:
        """The environment that computes numbers."""
        return self.ask(compute_environment)  # once: where one model is held at a time, it may load one

    def prepare(self, prompt_sets: Sequence[PromptSet], position: Position) -> None:
        """Hear which prompts will be asked about, and see that both models read the same."""
        for prompts in prompt_sets:
            self.pair.check_same_tokens(prompts, position)
        if self.pair.one_at_a_time:  # record all of base while it is in memory
            for prompts in prompt_sets:
                self.pair.recorded_base(prompts, position)

    def capture(
        self, role: str, prompts: PromptSet, position: Position, sites: Sequence[Site]
    ) -> Mapping[Site, Tensor]:
        """See `rows.capture`."""
        sites = tuple(dict.fromkeys(sites))
        return at_sites(self.whole(Capture(prompts, position, role, sites)), sites)

    def score(
        self,
        prompts: PromptSet,
        position: Position,
        replacements: Replacements,
        stage: Stage = silent,
        plain: bool = True,
    ) -> dict[Site, SiteRows]:
        """Patch the tuned model with every map of every site, and with the identity and raw if `plain`.

        Where base and tuned differ in width there is no raw row.
        """
        task = Score(prompts, position, replacements, plain)
        return task.site_rows(self.whole(task, stage, f"patching tuned on {prompts.split}"))

    def clean_noise(self, role: str, prompts: PromptSet, position: Position) -> float:
        """Mean distance between two clean runs of one model over a few of the prompts, nats.

        The larger of the KL between runs in a batch and alone, and of what rounding alone leaves.
        """
        few = prompts.take(range(0, len(prompts), -(-len(prompts) // _NOISE_PROMPTS)))
        return self.ask(clean_noise, role, few, position)

    def whole(self, task: Task, stage: Stage = silent, name: str = "") -> Tensors:
        """The result of a task that was done shard by shard."""
        if not len(task.prompts):
            return task.run(self.pair)  # says what is wrong with that
        shards = shards_of(task, self.pair, self.max_shards)
        found: dict[int, Tensors] = {}
        with stage(name, len(task.prompts)) as advance:
            for index, result in self.run(task, shards):
                found[index] = result
                advance(len(shards[index]))
        return merged([(rows, found[index]) for index, rows in enumerate(shards)])


class LocalWorkers(Workers):
    """Runs the models in this process, a whole split at a time."""

    @property
    def max_shards(self) -> int:
        """One: nothing is gained by cutting."""
        return 1

    def run(self, task: Task, shards: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensors]]:
        """One after the other."""
        for index, rows in enumerate(shards):
            yield index, task.part(rows).done(self.pair)

    def ask(self, question: Callable[..., Answer], *arguments: object) -> Answer:
        """Answer from the pair in this process."""
        return question(self.pair, *arguments)


def chunks_of(prompts: TokenizedPrompts, batch_size: int) -> list[list[int]]:
    """Prompts that the engine runs together, in the order in which it takes them."""
    chunks = []
    for _, group in groupby(ChunkPlan(prompts, torch.device("cpu")).order, key=partial(shape_of, prompts)):
        rows = list(group)
        chunks += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return chunks


def shards_of(task: Task, pair: Pair, at_most: int = MAX_SHARDS) -> list[list[int]]:
    """The prompts of each shard, ascending; one shard where the two models would be cut differently.

    A shard is made of whole chunks of the engine, so each chunk holds the very prompts that it would hold
    without shards, and every number is the same to the bit.
    """
    whole = [list(range(len(task.prompts)))]
    if not task.divisible or at_most < 2:
        return whole
    size = pair.options.batch_size
    first, *others = (chunks_of(pair.tokens(role, task.prompts, task.position), size) for role in task.roles)
    if any(other != first for other in others):
        return whole
    at_once = -(-len(first) // at_most)
    runs = (first[start : start + at_once] for start in range(0, len(first), at_once))
    return [sorted(i for chunk in run for i in chunk) for run in runs]


def merged(parts: Sequence[tuple[Sequence[int], Tensors]]) -> Tensors:
    """Rows of all prompts from those of shards: each with which prompts it has."""
    first = parts[0][1]
    return first if len(parts) == 1 else LazyTensors({name: partial(_merged, parts, name) for name in first})


def _merged(parts: Sequence[tuple[Sequence[int], Tensors]], name: str) -> Tensor:
    first = parts[0][1][name]
    together = first.new_empty(sum(len(rows) for rows, _ in parts), *first.shape[1:])
    for rows, part in parts:
        together[torch.tensor(rows)] = part[name]
    return together
