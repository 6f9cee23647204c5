import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mechdiff_mlflow.chat import tokenize
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.prompts import Prompt, PromptSet, check_disjoint, read_prompts
from mechdiff_mlflow.spec import Position

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content | trim }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = [
        "<s>",
        "<pad>",
        "<unk>",
        "<user>",
        "<system>",
        "<assistant>",
        "<end>",
        "what",
        "is",
        "tea",
        "?",
        "two",
    ]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<system>", "<assistant>", "<end>"],
    )
    fast.chat_template = template
    return fast


def prompts(*texts: str, split: str = "val") -> PromptSet:
    return PromptSet(split, tuple(Prompt(({"role": "user", "content": text},)) for text in texts))


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8"
    )
    return path


def words(tok: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> list[str]:
    return tok.convert_ids_to_tokens(list(ids))


def test_the_decision_token_is_the_last_of_the_template() -> None:
    tok = tokenizer()
    found = tokenize(tok, prompts("what is tea ?", "tea"))
    assert words(tok, found.ids[0]) == ["<s>", "<user>", "what", "is", "tea", "?", "<end>", "<assistant>"]
    assert found.positions == (7, 4)


def test_last_content_is_the_last_token_of_the_user() -> None:
    tok = tokenizer()
    found = tokenize(tok, prompts("what is tea ?  ", "tea tea", "end"), position=Position.LAST_CONTENT)
    picked = [words(tok, ids)[p] for ids, p in zip(found.ids, found.positions, strict=True)]
    assert picked == ["?", "tea", "<unk>"]


def test_the_span_of_the_content_is_all_tokens_of_the_user() -> None:
    tok = tokenizer()
    found = tokenize(tok, prompts("what is tea ?  ", "tea tea", "end"), position=Position.CONTENT_MEAN)
    spans = zip(found.ids, found.positions, found.spans, strict=True)
    picked = [words(tok, ids)[p : p + n] for ids, p, n in spans]
    assert picked == [["what", "is", "tea", "?"], ["tea", "tea"], ["<unk>"]]
    assert found.take([2, 0]).spans == (1, 4)
    assert found[1:].spans == (2, 1)


def test_without_a_template_the_text_alone_with_bos() -> None:
    tok = tokenizer(None)
    found = tokenize(tok, prompts("what is tea"), chat=False, position=Position.LAST_CONTENT)
    assert words(tok, found.ids[0]) == ["<s>", "what", "is", "tea"]
    assert found.positions == (3,)


def test_positions_do_not_depend_on_the_other_prompts() -> None:
    together = tokenize(tokenizer(), prompts("tea", "what is tea ?"))
    alone = tokenize(tokenizer(), prompts("tea"))
    assert (together.ids[0], together.positions[0]) == (alone.ids[0], alone.positions[0])
    assert together[:1] == alone


def test_a_missing_template_is_named() -> None:
    with pytest.raises(MechdiffError, match="has no chat template; set template: none"):
        tokenize(tokenizer(None), prompts("tea"))


def test_a_failing_template_is_not_swallowed() -> None:
    with pytest.raises(MechdiffError, match=r"fails on val prompt 2 \(no tea today\)"):
        tokenize(
            tokenizer(
                "{% if messages[0].content == 'tea' %}{{ raise_exception('no tea today') }}{% endif %}<user>"
            ),
            prompts("two", "tea"),
        )


def test_a_doubled_bos_is_refused() -> None:
    with pytest.raises(MechdiffError, match="two BOS tokens"):
        tokenize(tokenizer("{{ bos_token }}" + TEMPLATE), prompts("tea"))


def test_a_template_that_hides_the_text_has_no_last_content() -> None:
    shouting = TEMPLATE.replace("trim", "upper")
    with pytest.raises(MechdiffError, match="--position decision"):
        tokenize(tokenizer(shouting), prompts("tea"), position=Position.LAST_CONTENT)


def test_a_slow_tokenizer_has_no_last_content() -> None:
    slow = SimpleNamespace(
        is_fast=False, chat_template=None, bos_token_id=None, name_or_path="slow", __call__=lambda text: None
    )
    caller = type("Slow", (), {**vars(slow), "__call__": lambda self, text: {"input_ids": [1, 2]}})()
    with pytest.raises(MechdiffError, match="gives no offsets"):
        tokenize(caller, prompts("tea"), chat=False, position=Position.LAST_CONTENT)


def test_an_empty_template_gives_no_tokens() -> None:
    with pytest.raises(MechdiffError, match="into no tokens"):
        tokenize(tokenizer("{% if false %}x{% endif %}"), prompts("tea"))


def test_text_and_messages_are_read(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]}
    found = read_prompts(written(tmp_path, {"text": "tea", "label": "x"}, "", chat), "val", system="be kind")
    assert [m["content"] for m in found.prompts[0].messages] == ["be kind", "tea"]
    assert [m["content"] for m in found.prompts[1].messages] == ["be brief", "two"]


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    found = read_prompts(written(tmp_path, json.dumps({"text": "one\u2028two"}, ensure_ascii=False)), "val")
    assert found.prompts[0].text == "one\u2028two"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is not JSON"),
        ({"txt": "tea"}, 'line 2 has neither a "text"'),
        ({"text": "  "}, 'line 2 has neither a "text"'),
        ({"text": 3}, 'line 2 has neither a "text"'),
        ([1], 'line 2 has neither a "text"'),
        ({"text": "a", "messages": [{"role": "user", "content": "a"}]}, 'line 2 has neither a "text"'),
        ({"messages": []}, 'line 2 has neither a "text"'),
        ({"messages": [{"role": "tool", "content": "a"}]}, 'line 2 has neither a "text"'),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "line 2 ends with the assistant"),
        ("[" * 100_000, "line 2 is not JSON"),
    ],
)
def test_malformed_lines_are_named_by_number(tmp_path: Path, line: object, says: str) -> None:
    with pytest.raises(MechdiffError) as caught:
        read_prompts(written(tmp_path, {"text": "tea"}, line), "val")
    assert says in str(caught.value)


def test_empty_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(MechdiffError, match="is empty"):
        read_prompts(written(tmp_path, "", " "), "val")
    with pytest.raises(MechdiffError, match="cannot be read"):
        read_prompts(tmp_path / "nothing.jsonl", "val")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    with pytest.raises(MechdiffError, match="cannot be read as UTF-8"):
        read_prompts(tmp_path / "latin.jsonl", "val")


@pytest.mark.parametrize("n", [0, 3, 500])
def test_never_silently_fewer_prompts_than_asked(n: int) -> None:
    with pytest.raises(
        MechdiffError, match=rf"{n} val prompts were asked for and there are 2; pass --n 1 to 2"
    ):
        prompts("one", "two").first(n)


def test_first_takes_the_first_and_all_is_all() -> None:
    assert [p.text for p in prompts("one", "two").first(1).prompts] == ["one"]
    assert len(prompts("one", "two").first(None)) == 2


QUESTION = "what do people drink in the morning when guests come from far away"


@pytest.mark.parametrize("other", [QUESTION, QUESTION.upper() + " ?", f"  {QUESTION}!", QUESTION + " today"])
def test_splits_may_not_share_a_prompt_or_nearly(other: str) -> None:
    with pytest.raises(MechdiffError, match="remove it from one"):
        check_disjoint([prompts(QUESTION, split="train"), prompts("unrelated", other, split="val")])


@pytest.mark.parametrize("other", ["3 - 5", "3 + 6", QUESTION.replace("drink", "sing")])
def test_other_questions_are_not_near_duplicates(other: str) -> None:
    check_disjoint([prompts(QUESTION, "3 + 5", split="train"), prompts(other, split="val")])


def test_a_split_may_repeat_itself() -> None:
    check_disjoint([prompts(QUESTION, QUESTION, split="train"), prompts("two", split="val")])


@given(st.permutations(["one", "two", "three"]), st.permutations(["one", "two", "three"]))
def test_digests_are_equal_for_equal_prompts_only(a: list[str], b: list[str]) -> None:
    assert (prompts(*a).digest == prompts(*b).digest) == (a == b)
