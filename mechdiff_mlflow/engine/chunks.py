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
        span: Tokens from the patched position on whose mean is the activation.
    """

    index: Tensor
    ids: Tensor
    mask: Tensor
    positions: Tensor
    suffix: int
    is_padded: bool
    span: int = 1

    def __len__(self) -> int:
        return len(self.index)

    def read(self, hidden: Tensor) -> Tensor:
        """Among hidden states [n, length, width] the activation [n, width]: of one token or a span's mean."""
        if self.span == 1:
            return hidden[:, -self.suffix].clone()
        tokens = self.spanned(hidden)
        return tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mean(1).to(tokens.dtype)

    def spanned(self, hidden: Tensor) -> Tensor:
        """The tokens of the span, [n, span, width]."""
        start = hidden.shape[1] - self.suffix
        return hidden[:, start : start + self.span]


def in_chunks(prompts: TokenizedPrompts, size: int, device: torch.device) -> Iterator[Chunk]:
    """Chunks of at most `size` prompts that share a suffix length and a span, short prompts first."""
    order, start = by_length(prompts), 0
    while start < len(order):
        chunk = cut(prompts, order[start : start + size], device)
        yield chunk
        start += len(chunk)


def by_length(prompts: TokenizedPrompts) -> list[int]:
    """Indices of the prompts in the order in which chunks take them."""
    return sorted(range(len(prompts)), key=lambda i: (*_suffix(prompts, i), len(prompts.ids[i])))


def cut(prompts: TokenizedPrompts, rows: list[int], device: torch.device) -> Chunk:
    """The first of some prompts, as many of them as share a suffix length and a span."""
    suffix = _suffix(prompts, rows[0])
    alike = list(takewhile(lambda i: _suffix(prompts, i) == suffix, rows))
    return _padded(prompts, alike, *suffix, device)


def _suffix(prompts: TokenizedPrompts, i: int) -> tuple[int, int]:
    """Tokens from the patched position to the end, and how many of them are averaged."""
    return len(prompts.ids[i]) - prompts.positions[i], prompts.span(i)


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
        if not 1 <= prompts.span(i) <= len(ids) - position:
            raise MechdiffError(
                f"Prompt {i} has {len(ids) - position} tokens from position {position} on and a span of "
                f"{prompts.span(i)}; check its text."
            )
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise MechdiffError(
                f"Prompt {i} has token ids from {min(ids)} to {max(ids)}, but the model's vocabulary is 0 to "
                f"{vocabulary - 1}; tokenize it with this model's own tokenizer."
            )


def _padded(
    prompts: TokenizedPrompts, rows: list[int], suffix: int, span: int, device: torch.device
) -> Chunk:
    length = max(len(prompts.ids[i]) for i in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, i in enumerate(rows):
        ids[row, length - len(prompts.ids[i]) :] = torch.tensor(prompts.ids[i])
        mask[row, length - len(prompts.ids[i]) :] = True
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    padded = not bool(mask.all())
    return Chunk(
        torch.tensor(rows), ids.to(device), mask.to(device), positions.to(device), suffix, padded, span
    )
