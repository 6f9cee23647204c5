"""Prompts, and what is read behind them, as tokens; needs nothing but Python, as the engine does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class TokenizedPrompts:
    """Unpadded token ids of n prompts, and the position of each that is read and replaced."""

    ids: tuple[tuple[int, ...], ...]  # the decision token is the last of each, unless an answer follows
    positions: tuple[int, ...]  # of the first token that is read and replaced
    spans: tuple[int, ...] = ()  # how many, from there on, are averaged and moved together; empty is one
    steps: tuple[int, ...] = ()  # after how many of the last tokens the next one is compared; empty is one
    each: bool = False  # the tokens of a span are read and replaced one by one instead

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> TokenizedPrompts:
        return self.take(range(len(self))[part])

    def span(self, i: int) -> int:
        """Tokens of prompt i that are read and replaced."""
        return self.spans[i] if self.spans else 1

    def n_steps(self, i: int) -> int:
        """Next tokens of prompt i that are compared."""
        return self.steps[i] if self.steps else 1

    @property
    def most_replaced(self) -> int:
        """Vectors that the longest replacement has: one a token where each is replaced, else one."""
        return max(self.spans) if self.each else 1

    def take(self, indices: Iterable[int]) -> TokenizedPrompts:
        """Some of the prompts, in that order."""
        some = list(indices)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in some),
            positions=tuple(self.positions[i] for i in some),
            spans=tuple(self.spans[i] for i in some) if self.spans else (),
            steps=tuple(self.steps[i] for i in some) if self.steps else (),
        )

    def answered(self, answers: Answers) -> TokenizedPrompts:
        """With the answers behind the prompts, each but for its last token, after which nothing is read."""
        lengths = tuple(map(len, answers.ids))
        ids = tuple(prompt + answer[:-1] for prompt, answer in zip(self.ids, answers.ids, strict=True))
        spans = lengths if answers.each else self.spans
        return replace(self, ids=ids, spans=spans, steps=lengths, each=answers.each)


@dataclass(frozen=True, slots=True)
class Answers:
    """What is read behind the prompts of a set, token by token."""

    ids: tuple[tuple[int, ...], ...]  # of each prompt, at least one
    n_tokens: int  # at most, T
    each: bool  # whether a patch replaces every token that one of these follows, or the first such alone

    @property
    def most_replaced(self) -> int:
        """Tokens that a patch replaces, at most."""
        return max(map(len, self.ids)) if self.each else 1
