"""Shards are made of the engine's own chunks, and give what the whole gives, to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from asking import SITES, answers, assert_same
from hypothesis import given
from hypothesis import strategies as st

from mechdiff_mlflow.engine.model.chunks import in_chunks
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.workers import LocalWorkers
from mechdiff_mlflow.experiments.workers.tasks import Capture, Gradients, Score
from mechdiff_mlflow.experiments.workers.workers import chunks_of, merged, shards_of
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import Prompt, PromptSet
from mechdiff_mlflow.spec.tokens import TokenizedPrompts


class Cut(LocalWorkers):
    """This process, asked shard by shard."""

    def __init__(self, pair: Pair, at_most: int) -> None:
        super().__init__(pair)
        self._at_most = at_most

    @property
    def max_shards(self) -> int:
        return self._at_most


lengths = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 3), st.integers(1, 2)), min_size=1, max_size=25
)


@given(lengths, st.integers(1, 5))
def test_chunks_are_those_of_the_engine(shapes: list[tuple[int, int, int]], size: int) -> None:
    ids = tuple((1,) * (before + after + 2) for before, after, _ in shapes)
    positions = tuple(before for before, _, _ in shapes)
    prompts = TokenizedPrompts(ids, positions, tuple(span for *_, span in shapes))
    expected = [chunk.index.tolist() for chunk in in_chunks(prompts, size, torch.device("cpu"))]
    assert chunks_of(prompts, size) == expected


@given(lengths, st.integers(1, 5), st.integers(1, 6))
def test_chunks_of_a_shard_are_chunks_of_the_whole(
    shapes: list[tuple[int, int, int]], size: int, at_once: int
) -> None:
    prompts = TokenizedPrompts(
        tuple((1,) * (before + after + 2) for before, after, _ in shapes),
        tuple(before for before, _, _ in shapes),
        tuple(span for *_, span in shapes),
    )
    whole = chunks_of(prompts, size)
    for start in range(0, len(whole), at_once):
        some = whole[start : start + at_once]
        rows = sorted(itertools.chain.from_iterable(some))
        again = [[rows[i] for i in chunk] for chunk in chunks_of(prompts.take(rows), size)]
        assert again == some


@pytest.mark.parametrize("position", list(Position))
@pytest.mark.parametrize("at_most", [2, 3, 32])
def test_shards_give_the_whole_to_the_bit(small_batches: Pair, at_most: int, position: Position) -> None:
    expected = answers(LocalWorkers(small_batches), position=position)
    assert_same(answers(Cut(small_batches, at_most), position=position), expected)


def test_every_prompt_is_in_one_shard(small_batches: Pair) -> None:
    prompts = small_batches.prompts_of("train")
    task = Score(prompts, Position.DECISION, {site: {} for site in SITES})
    shards = shards_of(task, small_batches, 3)
    assert len(shards) == 3
    assert sorted(itertools.chain.from_iterable(shards)) == list(range(len(prompts)))
    parts = [task.part(rows) for rows in shards]
    assert [prompt for part in parts for prompt in part.prompts.prompts] != list(prompts.prompts)
    assert {p for part in parts for p in (q.text for q in part.prompts.prompts)} == {
        p.text for p in prompts.prompts
    }


def test_a_part_of_a_split_is_not_tokenised_anew(small_batches: Pair) -> None:
    prompts = small_batches.prompts_of("val")
    whole = small_batches.tokens("tuned", prompts, Position.LAST_CONTENT)
    before = len(small_batches.readers._readings)
    part = PromptSet("val", (prompts.prompts[7], prompts.prompts[2]))
    assert small_batches.tokens("tuned", part, Position.LAST_CONTENT) == whole.take([7, 2])
    assert len(small_batches.readers._readings) == before
    strange = PromptSet("val", (prompts.prompts[7], Prompt(({"role": "user", "content": "well"},))))
    assert prompts.rows_of(strange) is None


def test_what_cannot_be_cut_stays_whole(small_batches: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = small_batches.prompts_of("val")
    assert len(shards_of(Gradients(prompts, Position.DECISION, SITES, 0), small_batches)) == 1
    capture = Capture(prompts, Position.DECISION, "base", SITES)
    assert len(shards_of(capture, small_batches)) > 1
    assert capture.part(range(len(prompts))) is capture
    # Of models that cut a prompt into other tokens, no part of the prompts is whole chunks of both.
    own = Pair.tokens

    def reversed_for_base(pair: Pair, role: str, *rest: object) -> TokenizedPrompts:
        tokens = own(pair, role, *rest)  # type: ignore[arg-type]
        return tokens.take(range(len(tokens))[::-1]) if role == "base" else tokens

    monkeypatch.setattr(Pair, "tokens", reversed_for_base)
    assert len(shards_of(Score(prompts, Position.DECISION, {}), small_batches)) == 1
    assert len(shards_of(capture, small_batches)) > 1


def test_rows_go_back_to_their_prompts() -> None:
    whole = merged([([2, 0], {"x": torch.tensor([2.0, 0.0])}), ([1], {"x": torch.tensor([1.0])})])
    assert whole["x"].tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(KeyError):
        whole["y"]


def test_errors_number_prompts_as_the_whole_does(
    small_batches: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, bad = small_batches.prompts_of("val"), 13
    own = Pair.tokens

    def broken(pair: Pair, role: str, some: PromptSet, position: Position) -> TokenizedPrompts:
        tokens = own(pair, role, some, position)
        ids = [
            (10**6, *row[1:]) if prompt is prompts.prompts[bad] else row
            for row, prompt in zip(tokens.ids, some.prompts, strict=True)
        ]
        return TokenizedPrompts(tuple(ids), tokens.positions, tokens.spans)

    monkeypatch.setattr(Pair, "tokens", broken)
    for workers in (LocalWorkers(small_batches), Cut(small_batches, 4)):
        small_batches.recordings.forget()  # or nothing is run, and nothing noticed
        with pytest.raises(MechdiffError, match=f"Prompt {bad} has token ids from"):
            workers.capture("tuned", prompts, Position.DECISION, list(SITES))
