"""Cutting a task into shards of prompts, and putting their rows together again.

A shard is made of whole chunks of the engine, so each chunk holds the very prompts that it would hold
without shards, and every number is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.chunks import ChunkPlan
from mechdiff_mlflow.experiments.workers.tasks import LazyTensors, Task, Tensors
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.prompts import TokenizedPrompts

MAX_SHARDS = 32
"""Shards of a task: enough to lose little with one, few enough to cost nothing each."""


def chunks_of(prompts: TokenizedPrompts, batch_size: int) -> list[list[int]]:
    """Prompts that the engine runs together, in the order in which it takes them."""

    def alike(i: int) -> tuple[int, int]:
        return len(prompts.ids[i]) - prompts.positions[i], prompts.span(i)

    chunks = []
    for _, group in groupby(ChunkPlan(prompts, torch.device("cpu")).order, key=alike):
        rows = list(group)
        chunks += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return chunks


def shards_of(task: Task, pair: Pair, at_most: int = MAX_SHARDS) -> list[list[int]]:
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
