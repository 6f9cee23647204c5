"""The parts of scripts/train_demo_pairs.py that could be wrong without a target being missed."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from scripts.demo_pairs.tokenizer import build_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_demo_pairs.py"
QUESTIONS = [[5, 7, 8, 9, 2, 6], [5, 7, 2, 6], [5, 8, 8, 2, 6]]
ANSWERS = [7, 8, 9]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_demo_pairs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(["red green blue tea cake"])


def test_a_lesson_is_the_question_the_answer_and_the_end(script: Any, tokenizer: Any) -> None:
    lesson = script.lesson(
        [(QUESTIONS[:1], ANSWERS[:1], 0.75), (QUESTIONS[1:], ANSWERS[1:], 0.25)], tokenizer
    )
    end = tokenizer.eos_token_id
    for row, start, ids, answer in zip(lesson.tokens, lesson.starts, QUESTIONS, ANSWERS, strict=True):
        assert row[start:].tolist() == [*ids, answer, end]
        assert set(row[:start].tolist()) <= {tokenizer.pad_token_id}
    assert lesson.weights.tolist() == [0.75, 0.125, 0.125]


@torch.no_grad()
def test_the_loss_of_a_padded_batch_is_that_of_its_rows_alone(script: Any, tokenizer: Any) -> None:
    model = script.new_base(tokenizer, seed=0)
    lesson = script.lesson([(QUESTIONS, ANSWERS, 1.0)], tokenizer)
    rows = [torch.tensor([*ids, answer]) for ids, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    alone = [
        functional.cross_entropy(
            model(ids[None]).logits[0, -2:], torch.tensor([answer, tokenizer.eos_token_id])
        )
        for ids, answer in zip(rows, ANSWERS, strict=True)
    ]
    loss = script.batch_loss(model, lesson.tokens, lesson.starts)
    torch.testing.assert_close(loss, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)


def test_only_the_given_parameters_are_trained_and_the_same_way_each_time(
    script: Any, tokenizer: Any
) -> None:
    quiz = script.Quiz(QUESTIONS, ANSWERS, ANSWERS)
    course = script.Course(tokenizer, quiz, quiz, torch.device("cpu"), batch=3, seed=0)
    lesson = script.lesson([(QUESTIONS, ANSWERS, 1.0)], tokenizer)
    untrained = script.new_base(tokenizer, seed=0).state_dict()
    after = []
    for _ in range(2):
        model = script.new_base(tokenizer, seed=0)
        attention = list(model.model.layers[24].self_attn.parameters())
        script.train("one layer", model, [(attention, 1e-3)], lesson, course, steps=3)
        after.append(model.state_dict())
    changed = {name for name, weight in after[0].items() if not torch.equal(weight, untrained[name])}
    assert changed == {f"model.layers.24.self_attn.{kind}_proj.weight" for kind in "qkvo"}
    assert all(torch.equal(after[0][name], after[1][name]) for name in untrained)
