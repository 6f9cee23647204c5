"""Base and tuned of different width, depth, tokenizer and vocabulary."""

from __future__ import annotations

import math
from pathlib import Path

import mlflow
import pytest
import torch
import toy as toys
from cli.conftest import Invoke, client, empty_store, here, mechdiff  # noqa: F401
from cli.test_run import runs_of
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mechdiff_mlflow import load_map
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position

SITE = ("--layer", "3", "--hook", "resid_post")
WIDTH = 24


def other_tokenizer() -> PreTrainedTokenizerFast:
    """Letters instead of words, other special tokens and another template."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)]
    words = ["<unk>", "<|begin|>", "<|turn|>", "<|answer|>", *letters]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        unk_token="<unk>",
        additional_special_tokens=["<|turn|>", "<|answer|>"],
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|answer|>{% endif %}"
    )
    return fast


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = toys.write_pair(tmp_path_factory.mktemp("unlike"))
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=len(other_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(spec.parent / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        (spec.parent / "tuned" / name).unlink(missing_ok=True)
    other_tokenizer().save_pretrained(spec.parent / "tuned")
    return spec


def test_each_model_reads_through_its_own_tokenizer(unlike: Path) -> None:
    pair = load_pair(PairSpec.load(str(unlike)))
    prompts = pair.prompts_of("val", 3)
    base, tuned = (pair.tokens(role, prompts, Position.DECISION) for role in ("base", "tuned"))
    assert not pair.tokenizers_agree
    assert all(len(a) < len(b) for a, b in zip(base.ids, tuned.ids, strict=True))
    assert pair.first_changed_layer() is None


@pytest.mark.parametrize("words", [("--solver", "ridge"), ("--solver", "reduced_rank", "--k", "4")])
def test_the_content_family_goes_through_the_whole_protocol(
    unlike: Path,
    mechdiff: Invoke,  # noqa: F811
    client: mlflow.MlflowClient,  # noqa: F811
    here: Path,  # noqa: F811
    words: tuple[str, ...],
) -> None:
    shown = mechdiff(
        "run", "--pair", str(unlike), *SITE, "--family", "content", *words, "--promote", "--force"
    ).output
    assert "L3/resid_post" in shown
    runs = runs_of(client)
    (patch,) = runs["patch"]
    assert patch.info.status == "FINISHED"
    assert "drop_pct" not in patch.data.metrics, "there is no raw patch to compare with"
    assert math.isfinite(patch.data.metrics["skill_pct"])
    assert patch.data.metrics["noise_floor"] < 1e-10
    map_ = load_map("models:/toy-L3-resid_post@champion", tracking_uri=f"sqlite:///{here}/mlflow.db")
    assert (map_.d_in, map_.d_out) == (toys.WIDTH, WIDTH)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--solver", "reduced_rank", "--family", "update"), "update"),
        (("--solver", "identity"), "16"),
        (("--solver", "mean_shift"), "16"),
    ],
)
def test_what_needs_one_width_is_refused_in_a_sentence(
    unlike: Path,
    mechdiff: Invoke,  # noqa: F811
    words: tuple[str, ...],
    says: str,
) -> None:
    output = mechdiff("run", "--pair", str(unlike), *SITE, *words, code=1).output
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert says in line
    assert "24" in line


def test_the_other_commands(unlike: Path, mechdiff: Invoke) -> None:  # noqa: F811
    assert "nothing to cross-patch raw" in mechdiff("doctor", str(unlike)).output
    refused = mechdiff("layers", "--pair", str(unlike), code=1).output
    assert "Base has 4 layers of width 16 and tuned 5 of 24" in refused
    mechdiff(
        "sweep",
        "--pair",
        str(unlike),
        "--sites",
        "L3/resid_post:1",
        "--ranks",
        "1,4,full",
        "--targets",
        "30",
        *("--solver", "ridge", "--family", "content"),
    )
    mechdiff(
        "atlas", "--pair", str(unlike), "--hooks", "resid_post", "--solver", "ridge", "--family", "content"
    )
