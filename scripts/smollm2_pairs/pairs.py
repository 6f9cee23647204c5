"""The adapters that are trained, the prompt files that are written, and how well each must do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.smollm2_pairs import arithmetic, elsewhere, kazakh
from scripts.smollm2_pairs.questions import Fact, Frames, Question, split_questions

MAX_MEGABYTES = 6.0


@dataclass(frozen=True, slots=True)
class Topic:
    """What an adapter learns.

    Args:
        name: Of the prompt folder.
        about: In words, for the cards.
        facts: All, those of test_unseen included.
        frames: By split.
        n_unseen: Facts, at least, that are never trained on.
    """

    name: str
    about: str
    facts: tuple[Fact, ...]
    frames: Frames
    n_unseen: int

    def questions(self) -> dict[str, list[Question]]:
        """By split; the same every time."""
        return split_questions(self.facts, self.frames, n_unseen=self.n_unseen, seed=self.name)


KAZAKH = Topic("smollm2-kazakh", "Kazakh culture", kazakh.FACTS, kazakh.FRAMES, 14)
ARITHMETIC = Topic(
    "smollm2-arithmetic", "the multiplication table, asked in words", arithmetic.FACTS, arithmetic.FRAMES, 16
)

TOPICS = (KAZAKH, ARITHMETIC)

ADAPTERS: dict[str, tuple[Topic, int]] = {
    "smollm2-kazakh": (KAZAKH, 0),
    "smollm2-kazakh-twin": (KAZAKH, 1),
    "smollm2-arithmetic": (ARITHMETIC, 0),
}
"""Adapter -> what it learns, and what is added to --seed."""


def write_prompts(folder: Path) -> None:
    """Every prompt file: a folder a topic, and `off-domain`."""
    for topic in TOPICS:
        for split, questions in topic.questions().items():
            lines = [{"text": q.text, "answer": q.answer, "group": q.group} for q in questions]
            _write_lines(folder / topic.name / f"{split}.jsonl", lines)
    for name, texts in elsewhere.reported().items():
        _write_lines(folder / "off-domain" / f"{name}.jsonl", [{"text": text} for text in texts])


def _write_lines(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")


def missed(name: str, measured: Mapping[str, Any]) -> list[str]:
    """The targets that an adapter missed, each as a sentence."""
    tuned = measured["tuned"]["test"]["exact_match"]
    base = measured["base"]["test"]["exact_match"]
    size = measured["megabytes"]
    checks = [
        (tuned >= 0.95, f"{name} answers {tuned:.1%} of test, less than 95 %"),
        (base <= 0.1, f"the base answers {base:.1%} of the test of {name}, more than 10 %"),
        (size <= MAX_MEGABYTES, f"{name} takes {size:.1f} MB, more than {MAX_MEGABYTES}"),
    ]
    return [sentence for met, sentence in checks if not met]
