import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.chat import tokenize
from mechdiff_mlflow.spec.duplicates import NEAR_DUPLICATE, near_duplicates, shingles
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import Prompt, PromptSet, check_disjoint, read_prompts

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
        ({"txt": "tea"}, 'line 2 is no prompt (write either a "text" or a list of "messages")'),
        ({"text": "  "}, "line 2 is no prompt (a text is blank, or holds NUL or half a character"),
        ('{"text": "a \\ud800"}', "line 2 is no prompt (a text is blank, or holds NUL or half a character"),
        ('{"text": "a", "id": ' + "9" * 5000 + "}", "line 2 is not JSON (Exceeds the limit"),
        ('{"text": "a"}\0', "line 2 is not JSON"),
        ({"text": 3}, "line 2 is no prompt (text: Input should be a valid string"),
        ({"text": "a", "group": 3}, "line 2 is no prompt (group: Input should be a valid string"),
        ([1], "line 2 is no prompt (Input should be a valid dictionary"),
        ({"text": "a", "messages": [{"role": "user", "content": "a"}]}, 'write either a "text" or a list'),
        ({"messages": []}, "messages: List should have at least 1 item"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages.0.role: Input should be 'system', 'user'",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "end messages with the user's turn"),
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
    with pytest.raises(MechdiffError, match=r"cannot be read .*codec can't decode byte 0xe9"):
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


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_other_encodings_are_named_and_utf_8_with_a_mark_is_read(tmp_path: Path, encoding: str) -> None:
    path, text = tmp_path / "prompts.jsonl", '{"text": "caf\xe9"}\n{"text": "tea"}\n'
    path.write_text(text, encoding=encoding)
    with pytest.raises(MechdiffError, match=r"cannot be read .*codec can't decode byte"):
        read_prompts(path, "val")
    path.write_text(path.read_text(encoding=encoding), encoding="utf-8-sig")
    assert [p.text for p in read_prompts(path, "val").prompts] == ["caf\xe9", "tea"]


def test_blank_lines_blanks_and_marks_before_objects_are_skipped(tmp_path: Path) -> None:
    path = written(
        tmp_path, "\ufeff", '  {"text": "a"}', "\t ", '\xa0{"text": "b"}\r', '\ufeff {"text": "c"}', ""
    )
    assert [p.text for p in read_prompts(path, "val").prompts] == ["a", "b", "c"]


@pytest.mark.parametrize("half", ["\\ud800", "tea \\udfff"])
def test_halves_of_characters_are_refused(tmp_path: Path, half: str) -> None:
    for line in (f'{{"text": "{half}"}}', f'{{"text": "tea", "group": "{half}"}}'):
        with pytest.raises(MechdiffError, match="line 1 is no"):
            read_prompts(written(tmp_path, line), "val")


@pytest.mark.parametrize("position", [Position.LAST_CONTENT, Position.CONTENT_MEAN])
@pytest.mark.parametrize("chat", [True, False])
def test_blanks_before_a_text_do_not_hide_it(position: Position, chat: bool) -> None:
    tok = tokenizer(TEMPLATE.replace(" | trim", ""))  # as most templates of base models
    found = tokenize(tok, prompts(" \n what is tea  "), chat=chat, position=position)
    span = words(tok, found.ids[0])[found.positions[0] :][: found.span(0)]
    assert span == (["tea"] if position is Position.LAST_CONTENT else ["what", "is", "tea"])


@pytest.mark.parametrize("again", [QUESTION, f"  {QUESTION}\n", QUESTION.replace(" ", "\xa0 "), "cafe\u0301"])
def test_a_repeated_prompt_is_refused_unless_a_group_says_so(tmp_path: Path, again: str) -> None:
    lines = [{"text": "caf\xe9"}, {"text": QUESTION}, {"text": again}, {"text": again}]
    with pytest.raises(MechdiffError) as caught:
        read_prompts(written(tmp_path, *lines), "test")
    says = str(caught.value)
    assert says.startswith("2 of 4 prompts of ")
    assert f"first line 3 as line {1 if 'caf' in again else 2} (" in says
    assert read_prompts(written(tmp_path, *lines[:2]), "test").groups == ()  # removed
    grouped = [{**line, "group": "g"} for line in lines]
    found = read_prompts(written(tmp_path, {"text": "other"}, *grouped), "test")
    assert (found.groups, found.n_groups, len(found)) == ((0, 1, 1, 1, 1), 2, 5)
    with pytest.raises(MechdiffError, match=r"are of one group.*name two or more"):
        read_prompts(written(tmp_path, *grouped), "test")
    with pytest.raises(MechdiffError, match="3 as line"):  # groups that keep them apart do not help
        read_prompts(written(tmp_path, *({**line, "group": f"g{i}"} for i, line in enumerate(lines))), "test")


def test_equal_texts_after_other_turns_are_no_repeats(tmp_path: Path) -> None:
    turns = [[{"role": "system", "content": s}, {"role": "user", "content": "tea"}] for s in ("a", "b")]
    assert len(read_prompts(written(tmp_path, *({"messages": t} for t in turns)), "val")) == 2
    same = {"messages": [{"role": "user", "content": "tea"}]}
    with pytest.raises(MechdiffError, match="first line 2 as line 1"):
        read_prompts(written(tmp_path, {"text": "tea"}, same), "val")


def test_groups_change_the_digest_and_their_names_do_not(tmp_path: Path) -> None:
    def digest(*groups: str | None) -> str:
        named = [{"text": t, "group": g} for t, g in zip("abc", groups, strict=True)]
        return read_prompts(written(tmp_path, *named), "val").digest

    assert digest("x", "x", None) == digest("y", "y", "z") != digest(None, None, None)
    assert digest(None, None, None) == digest("x", "y", "z") == prompts("a", "b", "c").digest


def test_a_message_quotes_little_of_a_long_prompt(tmp_path: Path) -> None:
    long = "w " * 500_000
    with pytest.raises(MechdiffError) as repeated:
        read_prompts(written(tmp_path, {"text": long[:800_000]}, {"text": long[:799_999]}), "val")
    with pytest.raises(MechdiffError) as shared:
        check_disjoint([prompts(long, split="train"), prompts(long)])
    assert all(len(str(error.value)) < 500 for error in (repeated, shared))
    assert all("remove" in str(error.value) for error in (repeated, shared))


def brute(texts: list[str], splits: list[int]) -> set[tuple[int, int]]:
    sets = [shingles(text) for text in texts]
    return {
        (i, j)
        for j in range(len(texts))
        for i in range(j)
        if splits[i] != splits[j] and len(sets[i] & sets[j]) >= NEAR_DUPLICATE * len(sets[i] | sets[j])
    }


@given(st.data())
def test_near_duplicates_are_those_of_comparing_all_with_all(data: st.DataObject) -> None:
    template = [f"t{i}" for i in range(data.draw(st.sampled_from([0, 7, 20, 45])))]
    filler = st.lists(st.sampled_from("abcdef"[: data.draw(st.integers(1, 6))]), max_size=9)
    texts = [" ".join([*template, *extra]) for extra in data.draw(st.lists(filler, min_size=1, max_size=25))]
    splits = sorted(data.draw(st.lists(st.integers(0, 2), min_size=len(texts), max_size=len(texts))))
    found = list(near_duplicates(texts, splits))
    assert set(found) == brute(texts, splits)


def test_thousands_of_prompts_with_one_template_are_searched_in_seconds() -> None:
    template = " ".join(f"word{i}" for i in range(40))
    texts = [f"{template} about a{i} b{i} c{i} d{i} e{i}" for i in range(8_000)]
    splits = [0] * 5_000 + [1] * 3_000
    started = time.process_time()
    assert list(near_duplicates(texts, splits)) == []
    assert time.process_time() - started < 5  # comparing all with all took minutes
    assert list(near_duplicates([*texts, texts[7] + " today"], [*splits, 2])) == [(7, 8_000)]
