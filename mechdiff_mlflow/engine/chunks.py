"""Prompts in left-padded chunks of similar length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.prompts import TokenizedPrompts


@dataclass(frozen=True, slots=True)
class Chunk:
    """n prompts padded on the left to a common length, all patched the same distance from their end.

    Args:
        index: Which prompts these are, [n], on the CPU.
        ids: Token ids [n, length].
        mask: True where a token is real, [n, length].
        positions: Position of each token in its own prompt [n, length].
        suffix: Tokens from the patched position to the end; 1 for the decision token.
        is_padded: Whether some prompt is shorter than the others.
    """

    index: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor
    suffix: int
    is_padded: bool

    def __len__(self) -> int:
        return len(self.index)


def in_chunks(prompts: TokenizedPrompts, size: int, device: torch.device) -> Iterator[Chunk]:
    """Chunks of at most `size` prompts that share a suffix length, short prompts first."""
    order, start = by_length(prompts), 0
    while start < len(order):
        chunk = cut(prompts, order[start : start + size], device)
        yield chunk
        start += len(chunk)


def by_length(prompts: TokenizedPrompts) -> list[int]:
    """Indices of the prompts in the order in which chunks take them."""
    return sorted(range(len(prompts)), key=lambda i: (_suffix(prompts, i), len(prompts.ids[i])))


def cut(prompts: TokenizedPrompts, rows: list[int], device: torch.device) -> Chunk:
    """The first of some prompts, as many of them as share a suffix length."""
    suffix = _suffix(prompts, rows[0])
    alike = list(takewhile(lambda i: _suffix(prompts, i) == suffix, rows))
    return _padded(prompts, alike, suffix, device)


def _suffix(prompts: TokenizedPrompts, i: int) -> int:
    return len(prompts.ids[i]) - prompts.positions[i]


def check_prompts(prompts: TokenizedPrompts, vocabulary: int) -> None:
    """Raise unless every prompt can be run.

    Raises:
        MechdiffError: There are no prompts, one is empty, or a token or position does not exist.
    """
    if not len(prompts):
        raise MechdiffError("There are no prompts; give at least one.")
    for i, (ids, position) in enumerate(zip(prompts.ids, prompts.positions, strict=True)):
        if not 0 <= position < len(ids):
            raise MechdiffError(
                f"Prompt {i} has {len(ids)} tokens and no position {position}; check its text."
            )
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise MechdiffError(
                f"Prompt {i} has token ids from {min(ids)} to {max(ids)}, but the model's vocabulary is 0 to "
                f"{vocabulary - 1}; tokenize it with this model's own tokenizer."
            )


def _padded(prompts: TokenizedPrompts, rows: list[int], suffix: int, device: torch.device) -> Chunk:
    length = max(len(prompts.ids[i]) for i in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, i in enumerate(rows):
        ids[row, length - len(prompts.ids[i]) :] = torch.tensor(prompts.ids[i])
        mask[row, length - len(prompts.ids[i]) :] = True
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    padded = not bool(mask.all())
    return Chunk(torch.tensor(rows), ids.to(device), mask.to(device), positions.to(device), suffix, padded)
