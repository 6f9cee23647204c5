"""Facts, the frames they are asked in, and how the questions are split."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, init=False)
class Fact:
    """An answer, and noun phrases that ask for it.

    Args:
        answer: As the tuned model should give it, without a full stop.
        clues: Each fits every frame.
        family: Facts of one family are learnt together or not at all, as 3 x 7 and 7 x 3; default: alone.
    """

    answer: str
    clues: tuple[str, ...]
    family: str

    def __init__(self, answer: str, *clues: str, family: str = "") -> None:
        object.__setattr__(self, "answer", answer)
        object.__setattr__(self, "clues", clues)
        object.__setattr__(self, "family", family or clues[0])


@dataclass(frozen=True, slots=True)
class Frames:
    """Sentences around a `{clue}` (`{Clue}` at the beginning of one), by the split that asks in them."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a prompt file; questions about one family of facts are a group."""

    text: str
    answer: str
    group: str


def split_questions(
    facts: Sequence[Fact], frames: Frames, *, n_unseen: int, seed: str
) -> dict[str, list[Question]]:
    """The questions of train, val, test and test_unseen, in random order.

    The first three ask for the same facts in different frames. test_unseen asks in the frames of test for
    facts that stand nowhere else. A fact's clues take turns from frame to frame.

    Args:
        facts: All facts.
        frames: Of this topic.
        n_unseen: At least so many facts are kept for test_unseen, in whole families.
        seed: Draws the facts of test_unseen and the order of each split.
    """
    rng = random.Random(seed)
    families = sorted({fact.family for fact in facts})
    rng.shuffle(families)
    unseen: set[str] = set()
    while sum(fact.family in unseen for fact in facts) < n_unseen:
        unseen.add(families.pop())
    learnt = [fact for fact in facts if fact.family not in unseen]
    splits = {
        "train": _ask(learnt, frames.train),
        "val": _ask(learnt, frames.val),
        "test": _ask(learnt, frames.test),
        "test_unseen": _ask([fact for fact in facts if fact.family in unseen], frames.test),
    }
    for questions in splits.values():
        rng.shuffle(questions)
    return splits


def _ask(facts: Sequence[Fact], frames: Sequence[str]) -> list[Question]:
    questions = []
    for number, fact in enumerate(facts):
        for place, frame in enumerate(frames):
            clue = fact.clues[(number + place) % len(fact.clues)]
            text = frame.format(clue=clue, Clue=clue[0].upper() + clue[1:])
            questions.append(Question(text, fact.answer, fact.family))
    return questions
