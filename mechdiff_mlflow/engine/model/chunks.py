"""Prompts in left-padded chunks of similar length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.tokens import TokenizedPrompts


@dataclass(frozen=True, slots=True)
class Chunk:
    """n prompts padded on the left to a common length, all patched the same distance from their end."""

    index: Tensor  # which prompts these are, [n], on the CPU
    ids: Tensor  # token ids [n, length]
    mask: Tensor  # true where a token is real, [n, length]
    positions: Tensor  # position of each token in its own prompt [n, length]
    suffix: int  # tokens from the patched position to the end; 1 for the decision token
    is_padded: bool  # whether some prompt is shorter than the others
    span: int = 1  # tokens from the patched position on that are read and replaced
    steps: int = 1  # tokens up to the end whose next-token distributions are compared
    each: bool = False  # the span's tokens are read and replaced one by one, not by their mean

    def __len__(self) -> int:
        return len(self.index)

    def read(self, hidden: Tensor) -> Tensor:
        """Among hidden states [n, length, width] the activation [n, width]: of one token or a span's mean.

        Where each token is replaced, their activations one after another, [n, span * width].
        """
        if self.each:
            return self.spanned(hidden).clone().flatten(1)
        if self.span == 1:
            return hidden[:, -self.suffix].clone()
        tokens = self.spanned(hidden)
        return tokens.to(torch.promote_types(tokens.dtype, torch.float32)).mean(1).to(tokens.dtype)

    def spanned(self, hidden: Tensor) -> Tensor:
        """The tokens of the span, [n, span, width]."""
        start = hidden.shape[1] - self.suffix
        return hidden[:, start : start + self.span]


class ChunkPlan:
    """Prompts in the order in which chunks take them, short ones first, to be cut anywhere."""

    def __init__(self, prompts: TokenizedPrompts, device: torch.device) -> None:
        self.prompts, self._device = prompts, device
        self.order = sorted(range(len(prompts)), key=lambda i: (*shape_of(prompts, i), len(prompts.ids[i])))

    def __len__(self) -> int:
        return len(self.order)

    def n_tokens(self, start: int) -> int:
        """Length of the prompt at a place in the order."""
        return len(self.prompts.ids[self.order[start]])

    def take(self, start: int, size: int) -> Chunk:
        """At most `size` prompts from a place in the order on, that share what `shape_of` says."""
        rows = self.order[start : start + size]
        shape = shape_of(self.prompts, rows[0])
        alike = list(takewhile(lambda i: shape_of(self.prompts, i) == shape, rows))
        return _padded(self.prompts, alike, self._device)


def in_chunks(prompts: TokenizedPrompts, size: int, device: torch.device) -> Iterator[Chunk]:
    """Chunks of at most `size` prompts that share what `shape_of` says, short prompts first."""
    cuts, start = ChunkPlan(prompts, device), 0
    while start < len(cuts):
        chunk = cuts.take(start, size)
        yield chunk
        start += len(chunk)


def shape_of(prompts: TokenizedPrompts, i: int) -> tuple[int, int, int]:
    """What prompts of one chunk share: tokens from the patched position on, how many are patched and read."""
    return len(prompts.ids[i]) - prompts.positions[i], prompts.span(i), prompts.n_steps(i)


def check_prompts(prompts: TokenizedPrompts, vocabulary: int) -> None:
    """Refuse no prompts, empty ones, and tokens or positions that do not exist."""
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


def _padded(prompts: TokenizedPrompts, rows: list[int], device: torch.device) -> Chunk:
    suffix, span, steps = shape_of(prompts, rows[0])
    length = max(len(prompts.ids[i]) for i in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, i in enumerate(rows):
        ids[row, length - len(prompts.ids[i]) :] = torch.tensor(prompts.ids[i])
        mask[row, length - len(prompts.ids[i]) :] = True
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return Chunk(
        torch.tensor(rows),
        ids.to(device),
        mask.to(device),
        positions.to(device),
        suffix,
        is_padded=not bool(mask.all()),
        span=span,
        steps=steps,
        each=prompts.each,
    )
