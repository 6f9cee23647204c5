"""The data of the real pairs, and the training of their adapters on a tiny model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from click.testing import CliRunner
from peft import PeftModel
from safetensors import safe_open

from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.prompts import check_disjoint, read_prompts
from scripts import train_smollm2
from scripts.smollm2_pairs import elsewhere, measure
from scripts.smollm2_pairs.base import BASE_ID
from scripts.smollm2_pairs.measure import apart, score
from scripts.smollm2_pairs.pairs import ADAPTERS, TOPICS, Topic
from scripts.smollm2_pairs.questions import Question
from scripts.smollm2_pairs.training import FIRST_LAYER, Plan, new_adapter, rows_of, train

DEMO = Path(__file__).parents[2] / "mechdiff_mlflow" / "spec" / "demo"
TOPIC = pytest.mark.parametrize("topic", TOPICS, ids=lambda topic: topic.name)
PLAN = Plan(steps=20, batch=4, practice_batch=2, practice_weight=1.0, rate=0.05, rank=4, seed=0)


def test_the_prompt_files_are_what_the_script_writes(tmp_path: Path) -> None:
    train_smollm2.write_data(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 2 * 5 + 4
    for path in written:
        assert (DEMO / "prompts" / path).read_bytes() == (tmp_path / path).read_bytes(), path


@TOPIC
def test_splits_have_different_frames_and_unseen_facts_are_nowhere_else(topic: Topic) -> None:
    frames = [*topic.frames.train, *topic.frames.val, *topic.frames.test]
    splits = topic.questions()
    groups = {split: {q.group for q in questions} for split, questions in splits.items()}
    assert len(topic.facts) >= 60
    assert len(set(frames)) == len(frames) >= 12
    assert len(splits["test"]) >= 150
    assert groups["train"] == groups["val"] == groups["test"]
    assert not groups["test_unseen"] & groups["train"]
    assert {fact.family for fact in topic.facts} == groups["train"] | groups["test_unseen"]


@TOPIC
def test_the_package_reads_the_prompts_and_finds_no_question_in_two_splits(topic: Topic) -> None:
    folder = DEMO / "prompts" / topic.name
    splits = [read_prompts(folder / f"{split}.jsonl", split) for split in ("train", "val", "test")]
    check_disjoint(splits)
    assert all(prompts.n_groups < len(prompts) for prompts in splits)


@TOPIC
def test_no_description_stands_for_two_facts_and_no_answer_in_its_question(topic: Topic) -> None:
    clues = [clue for fact in topic.facts for clue in fact.clues]
    assert len(set(clues)) == len(clues)
    for fact in topic.facts:
        assert not [c for c in fact.clues if f" {fact.answer.casefold()} " in f" {c.casefold()} "], fact


def test_practice_is_on_none_of_the_prompts_that_are_reported() -> None:
    reported = [text for texts in elsewhere.reported().values() for text in texts]
    assert len(set(reported)) == len(reported) == 3 * elsewhere.N_REPORTED
    assert not set(reported) & set(elsewhere.practice())


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_has_a_pair_with_the_prompts_it_learnt_from(name: str) -> None:
    spec = PairSpec.load(name)
    assert spec.tuned.adapter == f"adapters/{name}"
    assert spec.prompts.train == f"prompts/{ADAPTERS[name][0].name}/train.jsonl"


def test_rows_predict_the_reply_and_the_end_alone() -> None:
    rows = rows_of([[5, 6], [7]], [[8, 9], [3]], 1, torch.device("cpu"))
    assert rows.tokens.tolist() == [[5, 6, 8, 9, 1], [7, 3, 1, 1, 1]]
    following = rows.tokens.roll(-1, dims=1)
    assert following[0][rows.predicts[0]].tolist() == [8, 9, 1]
    assert following[1][rows.predicts[1]].tolist() == [3, 1]


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = toy.tokenizer()
    tokenizer.eos_token = "<end>"
    return tokenizer


def test_a_trained_adapter_knows_more_and_is_read_back_as_it_was(tokenizer: Any, tmp_path: Path) -> None:
    layers = FIRST_LAYER + 2
    model = toy.model(0, layers=layers)
    adapted = new_adapter(model, BASE_ID, PLAN)
    questions = [Question(f"does {s}", v, s) for s, v in zip(toy.SUBJECTS[:4], toy.VERBS, strict=False)]
    elsewhere_texts = [f"well {s}" for s in toy.SUBJECTS[4:8]]
    losses = train("toy", model, tokenizer, questions, elsewhere_texts, PLAN)
    assert losses[-1] < 0.5 * losses[0]

    train_smollm2.save(adapted, tmp_path)
    with safe_open(tmp_path / train_smollm2.WEIGHTS, "pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    trained = {int(name.split("layers.")[1].split(".")[0]) for name in names}
    assert trained == {FIRST_LAYER, FIRST_LAYER + 1}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE_ID

    base = toy.model(0, layers=layers)
    tuned = PeftModel.from_pretrained(toy.model(0, layers=layers), str(tmp_path)).eval()
    assert (
        score(tuned, tokenizer, questions)["exact_match"] > score(base, tokenizer, questions)["exact_match"]
    )
    same, other = (apart(base, m, tokenizer, {"x": elsewhere_texts})["x"]["max"] for m in (base, tuned))
    assert same == 0 < other


def test_the_command_writes_weights_numbers_and_a_card_and_names_missed_targets(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, topic = "smollm2-arithmetic", ADAPTERS["smollm2-arithmetic"][0]
    small = dataclasses.replace(topic, facts=topic.facts[:6], n_unseen=2)
    monkeypatch.setitem(ADAPTERS, name, (small, 0))
    monkeypatch.setattr(
        train_smollm2, "load_base", lambda *_: (toy.model(0, layers=FIRST_LAYER + 1), tokenizer)
    )
    monkeypatch.setattr(measure, "N_NEW", 2)
    monkeypatch.setattr(elsewhere, "practice", lambda: ["does well", "well"])
    monkeypatch.setattr(
        elsewhere, "reported", lambda: {topic: ["well"] for topic in ("general", "chat", "code")}
    )
    gguf = tmp_path / "base.gguf"
    gguf.touch()
    words = [name, "--out", tmp_path, "--gguf", gguf, "--device", "cpu", "--steps", 2, "--batch", 2]
    result = CliRunner().invoke(train_smollm2.main, [str(word) for word in words])
    assert result.exit_code == 1, result.output
    assert f"Target missed: {name} answers 0.0% of test, less than 95 %." in result.output

    folder = tmp_path / "adapters" / name
    found = json.loads((folder / "measured.json").read_text())
    assert found["made_with"]["steps"] == 2
    assert set(found["measured"]["tuned"]) == {"train", "val", "test", "test_unseen"}
    assert set(found["measured"]["off_domain_KL_tuned_base_nats"]) == {"general", "chat", "code"}
    card = (folder / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {BASE_ID}\n")
    assert "| test | 12 | 0.0 % |" in card

    CliRunner().invoke(train_smollm2.main, [*map(str, words), "--measure-only"])
    assert json.loads((folder / "measured.json").read_text()) == found
