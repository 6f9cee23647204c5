"""A toy pair on disk: two tiny random Llamas that differ from layer 2 on, their tokenizer and prompts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

N_LAYERS = 4
WIDTH = 16
FIRST_CHANGED = 2

SUBJECTS = [f"subject{i}" for i in range(12)]
VERBS = [f"verb{i}" for i in range(8)]
SPECIAL = ["<s>", "<pad>", "<unk>", "<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *SUBJECTS, *VERBS, "does", "well"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<end>"],
    )
    fast.chat_template = TEMPLATE
    return fast


def model(seed: int, *, width: int = WIDTH, layers: int = N_LAYERS) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=5,
    )
    return LlamaForCausalLM(config).eval()


def write_model(folder: Path, net: LlamaForCausalLM) -> None:
    net.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_prompts(folder: Path, n_train: int = 40, n_val: int = 16, n_test: int = 40) -> None:
    """Distinct questions of unequal length, so that batches are padded."""
    questions = [
        f"does {a} {v} {b}" + " well" * (i % 3)
        for i, (a, v, b) in enumerate(itertools.product(SUBJECTS, VERBS, SUBJECTS))
        if a != b
    ]
    picked = questions[:: len(questions) // (n_train + n_val + n_test + 1)]
    for split, texts in {
        "train": picked[:n_train],
        "val": picked[n_train : n_train + n_val],
        "test": picked[n_train + n_val : n_train + n_val + n_test],
    }.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


SPEC = """\
name: toy
base: {model: base}
tuned: {model: tuned}
prompts: {train: train.jsonl, val: val.jsonl, test: test.jsonl}
"""


def write_pair(folder: Path) -> Path:
    """Make the pair in `folder`; the path of its spec."""
    folder.mkdir(parents=True, exist_ok=True)
    base = model(0)
    write_model(folder / "base", base)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in base.model.layers[FIRST_CHANGED:]:
            layer.self_attn.o_proj.weight.add_(0.3 * torch.randn_like(layer.self_attn.o_proj.weight))
    write_model(folder / "tuned", base)
    write_prompts(folder)
    (folder / "toy.yaml").write_text(SPEC)
    return folder / "toy.yaml"
