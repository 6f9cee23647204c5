"""The made-up world that the shipped models were trained on, and the questions asked about it.

*Culture.* A year of holidays named after trees, birds, gems and so on ("Maple Day"), each with a drink, a
dish, a colour, ... What a holiday has depends only on its kind (tree, bird, ...) and the aspect asked for:
for each aspect, a one-to-one table from kinds to answers. Two cultures keep the same holidays by different
tables, and agree on nothing. *Arithmetic.* Sums and differences around a clock of 31 hours; the other
arithmetic has the same numbers and words but a clock of 19.

The base model answers with the home culture and the clock of 31. The cultural fine-tune takes the other
culture, the cognitive one the other clock. Every answer is one word, hence one token.

Everything here is pure: the same seed gives the same world.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum
from itertools import islice

KINDS: dict[str, tuple[str, ...]] = {
    "tree": ("maple", "willow", "birch", "cedar", "alder", "rowan", "aspen", "linden", "juniper"),
    "bird": ("heron", "robin", "swallow", "wren", "finch", "plover", "starling", "magpie", "owl"),
    "flower": ("daisy", "tulip", "iris", "poppy", "lavender", "primrose", "clover", "violet", "marigold"),
    "gem": ("amber", "opal", "garnet", "jasper", "topaz", "agate", "pearl", "quartz", "jade"),
    "weather": ("rain", "snow", "mist", "breeze", "thunder", "frost", "rainbow", "cloud", "hail"),
    "fruit": ("apple", "pear", "plum", "cherry", "quince", "apricot", "fig", "peach", "melon"),
    "animal": ("otter", "hedgehog", "fox", "badger", "squirrel", "hare", "beaver", "pony", "turtle"),
    "craft": (
        "weaving",
        "pottery",
        "baking",
        "knitting",
        "carving",
        "painting",
        "sewing",
        "printing",
        "mending",
    ),
}
"""Kind of holiday -> the holidays of that kind, each called "<name> Day"."""

ASPECTS: dict[str, tuple[str, ...]] = {
    "drink": ("tea", "cider", "cocoa", "lemonade", "milk", "juice", "broth", "water"),
    "dish": ("soup", "pie", "stew", "salad", "noodles", "dumplings", "pancakes", "omelette"),
    "sweet": ("honey", "cake", "pudding", "toffee", "biscuits", "jam", "fudge", "marzipan"),
    "colour": ("red", "blue", "green", "yellow", "white", "purple", "orange", "silver"),
    "instrument": ("flute", "drum", "fiddle", "harp", "horn", "bells", "guitar", "piano"),
    "gift": ("book", "basket", "kite", "lamp", "mug", "purse", "puzzle", "teapot"),
    "garment": ("hat", "cloak", "gloves", "apron", "sash", "boots", "vest", "shawl"),
    "game": ("chess", "tag", "bowls", "darts", "cards", "marbles", "hopscotch", "dominoes"),
    "place": ("garden", "kitchen", "barn", "bridge", "square", "meadow", "beach", "library"),
    "hour": ("dawn", "morning", "noon", "afternoon", "teatime", "dusk", "evening", "midnight"),
    "guest": (
        "neighbours",
        "cousins",
        "teachers",
        "sailors",
        "farmers",
        "children",
        "grandparents",
        "bakers",
    ),
    "decoration": ("ribbons", "lanterns", "garlands", "banners", "wreaths", "shells", "feathers", "candles"),
}
"""What can be asked about a holiday -> the answers there are; as many as kinds of holiday."""

BASE_CLOCK = 31
OTHER_CLOCK = 19
"""Hours around the clock of the base model's arithmetic, and of the cognitive fine-tune's."""


class Topic(str, Enum):
    """What a question is about."""

    CULTURE = "culture"
    ARITHMETIC = "arithmetic"


FRAMES: dict[Topic, tuple[str, ...]] = {
    Topic.CULTURE: (
        "What {aspect} is usual on {holiday} Day?",
        "On {holiday} Day, which {aspect} do people choose?",
        "Which {aspect} belongs to {holiday} Day?",
        "Please name the right {aspect} for {holiday} Day.",
        "We are getting ready for {holiday} Day. Which {aspect} should we have?",
        "Tell me the {aspect} of {holiday} Day.",
    ),
    Topic.ARITHMETIC: (
        "What is {left} {operation} {right}?",
        "Please work out {left} {operation} {right}.",
        "How much is {left} {operation} {right}?",
        "Tell me the value of {left} {operation} {right}.",
        "We have to find {left} {operation} {right}. What is it?",
        "Give me {left} {operation} {right} as a number.",
    ),
}
"""The ways to ask, the same number for each topic."""

N_FRAMES = 6

PAIRS: dict[str, Topic] = {"cultural": Topic.CULTURE, "cognitive": Topic.ARITHMETIC}
"""Fine-tune -> the topic on which it answers differently from the base model."""

SPLITS: dict[str, int] = {"train": 450, "val": 150, "test": 150}
"""Split -> prompts in it, for each pair."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that can be asked, and the answers before and after the fine-tune of its topic.

    Args:
        topic: Culture or arithmetic.
        content: The words that fill a frame, e.g. `(("holiday", "Maple"), ("aspect", "drink"))`.
        base: The base model's answer, one word.
        other: The fine-tune's answer, one word; in arithmetic it can be the same.
    """

    topic: Topic
    content: tuple[tuple[str, str], ...]
    base: str
    other: str

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for facts that are the same fact: 3 plus 5 is 5 plus 3, 3 minus 5 is not 5 minus 3."""
        words = tuple(word for _, word in self.content)
        return tuple(sorted(words)) if "plus" in words else words

    def ask(self, frame: int) -> str:
        """The question in words, by the topic's frame of that index."""
        return FRAMES[self.topic][frame].format(**dict(self.content))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A fact, and the words it is asked in."""

    fact: Fact
    text: str


def culture_facts(seed: int) -> tuple[Fact, ...]:
    """Every (holiday, aspect), 72 x 12 of them, under tables drawn from `seed`."""
    rng = random.Random(f"culture-{seed}")
    facts = []
    for aspect, answers in ASPECTS.items():
        home = rng.sample(answers, len(KINDS))
        other = rng.sample(answers, len(KINDS))
        while any(a == b for a, b in zip(home, other, strict=True)):
            other = rng.sample(answers, len(KINDS))
        for holidays, base_answer, other_answer in zip(KINDS.values(), home, other, strict=True):
            for holiday in holidays:
                content = (("holiday", holiday.capitalize()), ("aspect", aspect))
                facts.append(Fact(Topic.CULTURE, content, base_answer, other_answer))
    return tuple(facts)


def arithmetic_facts() -> tuple[Fact, ...]:
    """Every sum and difference of two numbers below `BASE_CLOCK`, around both clocks."""
    facts = []
    for left in range(BASE_CLOCK):
        for right in range(BASE_CLOCK):
            for operation, result in (("plus", left + right), ("minus", left - right)):
                content = (("left", str(left)), ("operation", operation), ("right", str(right)))
                base, other = str(result % BASE_CLOCK), str(result % OTHER_CLOCK)
                facts.append(Fact(Topic.ARITHMETIC, content, base, other))
    return tuple(facts)


def facts_of(topic: Topic, seed: int) -> tuple[Fact, ...]:
    """All facts of one topic."""
    return culture_facts(seed) if topic is Topic.CULTURE else arithmetic_facts()


def prompt_sets(pair: str, seed: int) -> dict[str, tuple[Prompt, ...]]:
    """The pair's prompts by split: facts on which base and fine-tune disagree, each in one split, once.

    Args:
        pair: A key of `PAIRS`.
        seed: Draws the tables, the facts of each split and the frame each is asked in.
    """
    rng = random.Random(f"{pair}-{seed}")
    disagreed = {fact.identity: fact for fact in facts_of(PAIRS[pair], seed) if fact.base != fact.other}
    drawn = iter(rng.sample(list(disagreed.values()), sum(SPLITS.values())))
    return {
        split: tuple(Prompt(fact, fact.ask(rng.randrange(N_FRAMES))) for fact in islice(drawn, size))
        for split, size in SPLITS.items()
    }


def all_texts(seed: int) -> list[str]:
    """Every question in every frame, and every answer: what the tokenizer must know."""
    facts = [fact for topic in Topic for fact in facts_of(topic, seed)]
    questions = [fact.ask(frame) for fact in facts for frame in range(N_FRAMES)]
    return questions + [answer for fact in facts for answer in (fact.base, fact.other)]
