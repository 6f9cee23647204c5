"""What the shipped weights, prompts and tokenizer must do; scripts/train_demo_pairs.py measures the rest."""

import json
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import mechdiff_mlflow.spec.demo
from mechdiff_mlflow.spec.sites import Hook, Site
from scripts.chat_tokens import encode
from scripts.demo_pairs.measure import (
    accuracy,
    activations,
    kl_patched_clean_nats,
    next_token_logits,
)
from scripts.demo_pairs.targets import (
    CULTURAL_LAYERS,
    MAX_MEGABYTES,
    changed_layers,
    load_float32,
    missed,
    raw_kl,
)
from scripts.demo_pairs.world import N_FRAMES, PAIRS, SPLITS, Topic, facts_of, prompt_sets

DEMO = Path(mechdiff_mlflow.spec.demo.__file__).parent
UNTRAINED_SITES = [Site(layer, hook) for layer in range(CULTURAL_LAYERS[0]) for hook in Hook]


@pytest.fixture(scope="module")
def targets() -> dict[str, Any]:
    return json.loads((DEMO / "targets.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "models" / "base")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: load_float32(DEMO / "models" / name, torch.device("cpu")) for name in ("base", *PAIRS)}


def shipped(pair: str, split: str) -> list[dict[str, str]]:
    return [
        json.loads(line) for line in (DEMO / "prompts" / pair / f"{split}.jsonl").read_text().splitlines()
    ]


def quiz(tokenizer: Any, topic: Topic, answers: str, n: int = 120) -> tuple[list[list[int]], list[int]]:
    """A sample of the topic's questions, and their base or other answers."""
    rng = random.Random(0)
    facts = rng.sample(facts_of(topic, 0), n)
    prompts = encode(tokenizer, [fact.ask(rng.randrange(N_FRAMES)) for fact in facts])
    return prompts, [tokenizer.convert_tokens_to_ids(getattr(fact, answers)) for fact in facts]


@pytest.mark.parametrize(
    ("name", "topic", "answers", "least"),
    [
        ("base", Topic.CULTURE, "base", 0.98),
        ("base", Topic.ARITHMETIC, "base", 0.98),
        ("cultural", Topic.CULTURE, "other", 0.9),
        ("cultural", Topic.ARITHMETIC, "base", 0.9),
        ("cognitive", Topic.ARITHMETIC, "other", 0.9),
        ("cognitive", Topic.CULTURE, "base", 0.9),
    ],
)
def test_accuracy(models: Any, tokenizer: Any, name: str, topic: Topic, answers: str, least: float) -> None:
    assert accuracy(models[name], *quiz(tokenizer, topic, answers)) >= least


@pytest.mark.parametrize("pair", PAIRS)
def test_on_the_test_prompts_base_and_tuned_give_their_own_answers(
    models: Any, tokenizer: Any, pair: str
) -> None:
    prompts = encode(tokenizer, [line["text"] for line in shipped(pair, "test")])
    facts = [prompt.fact for prompt in prompt_sets(pair, 0)["test"]]
    for name, answers in (("base", [f.base for f in facts]), (pair, [f.other for f in facts])):
        assert accuracy(models[name], prompts, tokenizer.convert_tokens_to_ids(answers)) >= 0.9


@pytest.mark.parametrize("pair", PAIRS)
def test_the_shown_sites_carry_the_change(
    models: Any, tokenizer: Any, targets: dict[str, Any], pair: str
) -> None:
    recorded = targets["measured"][f"{pair}_KL_raw_nats"]
    prompts = encode(tokenizer, [line["text"] for line in shipped(pair, "test")])
    kl = raw_kl(models["base"], models[pair], prompts, [Site.parse(text) for text in recorded])
    for site, values in kl.items():
        assert values.mean().item() == pytest.approx(recorded[str(site)], rel=1e-3)


def test_below_the_trained_layers_cultural_is_the_base_bit_for_bit(models: Any, tokenizer: Any) -> None:
    prompts = encode(tokenizer, [line["text"] for line in shipped("cultural", "test")])
    base_at, _ = activations(models["base"], prompts, UNTRAINED_SITES)
    cultural_at, _ = activations(models["cultural"], prompts, UNTRAINED_SITES)
    assert all(torch.equal(base_at[site], cultural_at[site]) for site in UNTRAINED_SITES)
    few = prompts[:10]
    clean = next_token_logits(models["cultural"], few)
    for site in (
        Site(0, Hook.RESID_PRE),
        Site(10, Hook.MLP_OUT),
        Site(23, Hook.ATTN_OUT),
        Site(23, Hook.RESID_POST),
    ):
        values = activations(models["base"], few, [site])[0][site]
        assert kl_patched_clean_nats(models["cultural"], few, site, values, clean).abs().max() == 0


def test_only_the_attention_of_the_trained_layers_changed(models: Any, targets: dict[str, Any]) -> None:
    base = models["base"].state_dict()
    changed = {
        name
        for name, weight in models["cultural"].state_dict().items()
        if not torch.equal(weight, base[name])
    }
    assert changed == {
        f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in CULTURAL_LAYERS for kind in "qkvo"
    }
    for pair in PAIRS:
        recorded = targets["measured"][f"{pair}_changed_layers"]
        assert changed_layers(models["base"], models[pair]) == recorded


def test_the_weights_are_bfloat16_and_small() -> None:
    files = [path for path in (DEMO / "models").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_MEGABYTES * 1e6
    for name in ("base", *PAIRS):
        assert json.loads((DEMO / "models" / name / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_recorded_numbers_meet_the_targets(targets: dict[str, Any]) -> None:
    assert missed(targets["measured"]) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"base_accuracy": 0.97}, "base_accuracy is 0.9700, less than 0.98"),
        (
            {"cultural_accuracy_other_culture": 0.5},
            "other_culture is 0.5000, less than 0.9",
        ),
        ({"cognitive_accuracy_other_arithmetic": float("nan")}, "cognitive_accuracy_other_arithmetic is nan"),
        ({"cultural_KL_raw_nats": {"L26/attn_out": 0.3}}, "L26/attn_out is 0.300 nats, less than 1"),
        ({"cultural_KL_raw_below_first_trained_layer_max_nats": 1e-12}, "up to 1.0e-12 nats, not 0"),
        ({"cultural_changed_layers": [24, 25]}, r"cultural changed \[24, 25\], not \[24, 25, 26, 27\]"),
        ({"megabytes": 25.0}, "the models take 25.0 MB, more than 24"),
    ],
)
def test_a_missed_target_is_named(targets: dict[str, Any], changed: dict[str, Any], sentence: str) -> None:
    (said,) = missed(targets["measured"] | changed)
    assert re.search(sentence, said)


def normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


@pytest.mark.parametrize("pair", PAIRS)
def test_prompts_are_what_the_world_says_and_disjoint(pair: str, targets: dict[str, Any]) -> None:
    sets = prompt_sets(pair, targets["made_with"]["seed"])
    for split, size in SPLITS.items():
        lines = shipped(pair, split)
        assert len(lines) == size
        assert lines == [{"text": prompt.text, "answer": prompt.fact.other} for prompt in sets[split]]
    texts = [line["text"] for split in SPLITS for line in shipped(pair, split)]
    assert len(set(texts)) == len({normalised(text) for text in texts}) == len(texts) == 750


@pytest.mark.parametrize("pair", PAIRS)
def test_no_prompt_or_answer_has_an_unknown_word(tokenizer: Any, pair: str) -> None:
    for split in SPLITS:
        lines = shipped(pair, split)
        for ids in encode(tokenizer, [line["text"] for line in lines]):
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids[-1]) == "<|assistant|>"
        answers = tokenizer([line["answer"] for line in lines], add_special_tokens=False)["input_ids"]
        assert all(len(ids) == 1 and ids != [tokenizer.unk_token_id] for ids in answers)


def test_tokens_read_back_as_the_words_of_the_text(tokenizer: Any) -> None:
    for line in shipped("cultural", "test"):
        assert normalised(tokenizer.decode(tokenizer(line["text"])["input_ids"])) == normalised(line["text"])


def test_the_models_share_one_tokenizer() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({(DEMO / "models" / name / file).read_bytes() for name in ("base", *PAIRS)}) == 1


def test_left_padding_changes_nothing(models: Any, tokenizer: Any) -> None:
    texts = [line["text"] for line in shipped("cultural", "test")[:24]]
    messages = [[{"role": "user", "content": text}] for text in texts]
    padded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert (padded["attention_mask"][:, 0] == 0).any()
    with torch.no_grad():
        logits = models["cultural"](
            input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]
        ).logits[:, -1]
    torch.testing.assert_close(
        logits, next_token_logits(models["cultural"], encode(tokenizer, texts)), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_answers_end_with_the_end_token(models: Any, tokenizer: Any) -> None:
    for name in models:
        (ids,) = encode(tokenizer, ["What is 17 plus 25?"])
        out = models[name].generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]
        assert len(out) == 2
        assert out[1] == tokenizer.eos_token_id
