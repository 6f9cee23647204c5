"""The most probable next tokens of prompts as text, and whether they begin the right answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mechdiff_mlflow.experiments.rows import RAW, Array, Patched, SiteRows
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.prompts import PromptSet


@dataclass(frozen=True, eq=False)
class NextTokens:
    """Next tokens of the prompts of a split: of base, of tuned, and of tuned patched raw and mapped."""

    pair: Pair
    prompts: PromptSet

    def columns(self, rows: SiteRows, mapped: Patched) -> dict[str, object]:
        """For each of them `top_…`, the token's text, and `p_…`, its probability; `answer` where known."""
        answers = [prompt.answer for prompt in self.prompts.prompts]
        found: dict[str, object] = {"answer": answers} if any(answers) else {}
        for name, (tokens, logprob_nats) in _tops(rows, mapped).items():
            words = self.pair.readers.words(_role(name), tokens.astype(int).tolist())
            found |= {f"top_{name}": [words[int(token)] for token in tokens]}
            found |= {f"p_{name}": np.exp(logprob_nats)}
        return found

    def accuracy(self, rows: SiteRows, mapped: Patched) -> dict[str, float]:
        """The share of prompts with a known answer whose most probable token is the first of that answer."""
        found: dict[str, float] = {}
        for name, (tokens, _) in _tops(rows, mapped).items():
            begins = self._answers[_role(name)]
            right = [token in first for token, first in zip(tokens, begins, strict=True) if first]
            found |= {name: float(np.mean(right))} if right else {}
        return found

    @cached_property
    def _answers(self) -> dict[str, list[frozenset[int]]]:
        readers = self.pair.readers
        return {role: readers.first_of_answers(role, self.prompts) for role in ("base", "tuned")}


def _tops(rows: SiteRows, mapped: Patched) -> Mapping[str, tuple[Array, Array]]:
    """Tokens and their log-probabilities, [n] each."""
    found = {role: (top[:, 0], top[:, 1]) for role, top in rows.top.items()}
    patched = {RAW: rows.patched.get(RAW), "mapped": mapped}
    return found | {name: (one.top, one.top_logprob_nats) for name, one in patched.items() if one is not None}


def _role(name: str) -> str:
    return "base" if name == "base" else "tuned"
