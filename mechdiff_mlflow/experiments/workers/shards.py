"""Cutting a task into shards of prompts, and putting their rows together again.

A shard is made of whole chunks of the engine (`engine.chunks`), so each chunk holds the very prompts that it
would hold without shards, and every number is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.chunks import ChunkPlan
from mechdiff_mlflow.experiments.workers.tasks import AnyTask, Task, Tensors
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.prompts import TokenizedPrompts

MOST = 32
"""Shards of a task: enough to lose little with one, few enough to cost nothing each."""


def chunks_of(prompts: TokenizedPrompts, batch_size: int) -> list[list[int]]:
    """Which prompts the engine runs together, in the order in which it takes them."""

    def alike(i: int) -> tuple[int, int]:
        return len(prompts.ids[i]) - prompts.positions[i], prompts.span(i)

    chunks = []
    for _, group in groupby(ChunkPlan(prompts, torch.device("cpu")).order, key=alike):
        rows = list(group)
        chunks += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return chunks


def shards_of(task: Task, pair: Pair, at_most: int = MOST) -> list[list[int]]:
    """The prompts of each shard, ascending; one shard where the two models would be cut differently."""
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


def part_of(task: AnyTask, rows: Sequence[int]) -> AnyTask:
    """A task for some of its prompts; the task itself for all of them."""
    return task if len(rows) == len(task.prompts) else task.part(rows)


@dataclass(frozen=True, eq=False)
class Merged(Mapping[str, Tensor]):
    """Rows of all prompts, put together when they are asked for: shards may lie on disk.

    Args:
        parts: Which prompts, and their rows.
    """

    parts: Sequence[tuple[Sequence[int], Tensors]]

    def __getitem__(self, name: str) -> Tensor:
        found = [(rows, part[name]) for rows, part in self.parts if name in part]
        if not found:
            raise KeyError(name)
        if len(found) == 1:
            return found[0][1]
        first = found[0][1]
        together = first.new_empty(sum(len(rows) for rows, _ in found), *first.shape[1:])
        for rows, part in found:
            together[torch.tensor(rows)] = part
        return together

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for _, part in self.parts for name in part))

    def __len__(self) -> int:
        return len(list(iter(self)))
