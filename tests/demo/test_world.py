from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.demo_pairs.world import (
    ASPECTS,
    BASE_CLOCK,
    FRAMES,
    KINDS,
    N_FRAMES,
    OTHER_CLOCK,
    PAIRS,
    SPLITS,
    Fact,
    Topic,
    all_texts,
    arithmetic_facts,
    culture_facts,
    facts_of,
    prompt_sets,
)

SEEDS = st.integers(0, 10_000)


def kind_of(holiday: str) -> str:
    return next(kind for kind, holidays in KINDS.items() if holiday.lower() in holidays)


@settings(max_examples=15)
@given(SEEDS)
def test_the_same_seed_gives_the_same_world(seed: int) -> None:
    assert culture_facts(seed) == culture_facts(seed)
    assert prompt_sets("cultural", seed) == prompt_sets("cultural", seed)


@pytest.mark.parametrize("pair", PAIRS)
def test_another_seed_gives_other_prompts(pair: str) -> None:
    assert prompt_sets(pair, 0) != prompt_sets(pair, 1)


def test_another_seed_gives_other_tables() -> None:
    assert culture_facts(0) != culture_facts(1)


@settings(max_examples=15)
@given(SEEDS)
def test_a_culture_answers_by_kind_and_aspect_and_the_two_never_agree(seed: int) -> None:
    facts = culture_facts(seed)
    home, other = defaultdict(set), defaultdict(set)
    for fact in facts:
        words = dict(fact.content)
        cell = words["aspect"], kind_of(words["holiday"])
        home[cell].add(fact.base)
        other[cell].add(fact.other)
        assert fact.base != fact.other
        assert {fact.base, fact.other} <= set(ASPECTS[words["aspect"]])
    for table in (home, other):
        assert all(len(answers) == 1 for answers in table.values())
        for aspect in ASPECTS:  # one to one: eight kinds, eight answers
            assert len(set.union(*(table[aspect, kind] for kind in KINDS))) == len(KINDS)
    assert len({fact.identity for fact in facts}) == len(facts) == 72 * 12


def test_arithmetic_goes_round_the_two_clocks() -> None:
    facts = arithmetic_facts()
    assert len(facts) == 2 * BASE_CLOCK**2
    for fact in facts:
        words = dict(fact.content)
        left, right = int(words["left"]), int(words["right"])
        result = left + right if words["operation"] == "plus" else left - right
        assert (int(fact.base), int(fact.other)) == (result % BASE_CLOCK, result % OTHER_CLOCK)


def test_a_sum_is_the_same_fact_either_way_round_and_a_difference_is_not() -> None:
    facts = {tuple(word for _, word in fact.content): fact for fact in arithmetic_facts()}
    assert facts["3", "plus", "5"].identity == facts["5", "plus", "3"].identity
    assert facts["3", "minus", "5"].identity != facts["5", "minus", "3"].identity
    assert facts["3", "plus", "5"].identity != facts["3", "minus", "5"].identity


def test_every_frame_asks_for_all_of_the_content() -> None:
    for topic, frames in FRAMES.items():
        assert len(set(frames)) == len(frames) == N_FRAMES
        fact = facts_of(topic, 0)[0]
        for frame in range(N_FRAMES):
            assert {word for _, word in fact.content} <= set(
                fact.ask(frame).strip("?.").replace(".", "").split()
            )


def test_no_word_has_two_roles() -> None:
    holidays = [name for names in KINDS.values() for name in names]
    answers = [word for words in ASPECTS.values() for word in words]
    words = holidays + answers + list(ASPECTS)
    assert len(set(words)) == len(words)
    assert all(word.isalpha() and word.islower() for word in words)


@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=15)
@given(seed=SEEDS)
def test_prompt_sets_share_no_fact_and_ask_where_the_models_disagree(pair: str, seed: int) -> None:
    sets = prompt_sets(pair, seed)
    assert {split: len(prompts) for split, prompts in sets.items()} == SPLITS
    facts: list[Fact] = [prompt.fact for prompts in sets.values() for prompt in prompts]
    assert len({fact.identity for fact in facts}) == len(facts)
    assert all(fact.topic is PAIRS[pair] and fact.base != fact.other for fact in facts)


def test_all_texts_cover_the_prompts_and_the_answers() -> None:
    texts = set(all_texts(0))
    for pair in PAIRS:
        for prompts in prompt_sets(pair, 0).values():
            assert {prompt.text for prompt in prompts} <= texts
    for topic in Topic:
        assert {fact.base for fact in facts_of(topic, 0)} <= texts
