from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from scripts.demo_pairs.tokenizer import build_tokenizer, save_tokenizer

TEXTS = ["What drink is usual on Maple Day?", "tea"]
QUESTION = [{"role": "user", "content": TEXTS[0]}]


def test_the_template_alone_writes_the_begin_token() -> None:
    tokenizer = build_tokenizer(TEXTS)
    chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    assert chat == "<|begin|><|user|>What drink is usual on Maple Day?<|end|><|assistant|>"
    assert tokenizer(chat)["input_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in tokenizer("tea")["input_ids"]


def test_system_and_assistant_turns() -> None:
    messages = [{"role": "system", "content": "on"}, *QUESTION, {"role": "assistant", "content": "tea"}]
    chat = build_tokenizer(TEXTS).apply_chat_template(messages, tokenize=False)
    assert chat == (
        "<|begin|><|system|>on<|end|><|user|>What drink is usual on Maple Day?<|end|><|assistant|>tea<|end|>"
    )


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(TemplateError, match="use system, user or assistant"):
        build_tokenizer(TEXTS).apply_chat_template([{"role": "tool", "content": "tea"}])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("TEA?!", ["tea", "?", "<|unknown|>"]),
        ("ｔｅａ", ["tea"]),  # NFKC: full-width letters
        ("teas  on\nday", ["<|unknown|>", "on", "day"]),
    ],
)
def test_words_are_normalised_split_or_unknown(text: str, tokens: list[str]) -> None:
    assert build_tokenizer(TEXTS).tokenize(text) == tokens


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TEXTS)
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.padding_side == "left"
    assert set(loaded.all_special_tokens) == set(tokenizer.all_special_tokens)
    config = (tmp_path / "tokenizer_config.json").read_text()
    assert '"PreTrainedTokenizerFast"' in config  # the name that transformers 4 knows
    assert "extra_special_tokens" not in config
