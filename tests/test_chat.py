"""What a chat template or tokenizer does to prompts: bounded, and nothing dropped or misplaced in silence."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import toy as toys
from test_prompts import TEMPLATE, prompts, tokenizer, words
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.preflight import examine
from mechdiff_mlflow.models import bounded as bounds
from mechdiff_mlflow.models import chat
from mechdiff_mlflow.models.chat import tokenize
from mechdiff_mlflow.models.pairs import Pair, load_pair
from mechdiff_mlflow.models.readers import read
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position
from mechdiff_mlflow.spec.prompts import Prompt, PromptSet

PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}"
NO_GENERATION = "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} <end>{% endfor %}"


LAST_ALONE = TEMPLATE.replace("in messages", "in messages[-1:]")


def without(role: str, template: str = TEMPLATE) -> str:
    return template.replace("in messages", f"in messages if m.role != '{role}'")


def conversation(*turns: tuple[str, str]) -> PromptSet:
    return PromptSet("val", (Prompt(tuple({"role": role, "content": text} for role, text in turns)),))


def with_eos(template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that puts EOS behind a text, as those of some encoder-decoders do."""
    tok = tokenizer(template)
    tok.eos_token = "<end>"
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 0), ("<end>", 6)]
    )
    return tok


@pytest.fixture
def spec(toy: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy.parent, tmp_path / "pair")
    return tmp_path / "pair" / "toy.yaml"


def load(spec: Path, more: str = "") -> Pair:
    spec.write_text(toys.SPEC + more)
    return load_pair(PairSpec.load(str(spec)))


def set_template(spec: Path, template: str, *sides: str) -> None:
    for side in sides or ("base", "tuned"):
        (spec.parent / side / "chat_template.jinja").write_text(template)


# --- what takes too long or too much


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "SECONDS", 1)
    monkeypatch.setattr(bounds, "BYTES", 256 << 20)


GREEDY = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "a huge range": "{% for i in range(10**9) %}{% endfor %}x",
    "loops over a long text": "{% for a in 'x' * 99999 %}{% for b in 'x' * 99999 %}{% endfor %}{% endfor %}x",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}x",
    "multiplied": "{{ 'a' * 10**10 }}",
    "multiplied lists": "{{ [0] * 10**10 }}",
    "joined": "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}x",
    "added": "{% set n = namespace(x='ab') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}x",
    "padded": "{{ 'a'.center(10**10) }}",
    "formatted": "{{ '%10000000000d' % 1 }}",
    "a power": "{{ (10 ** (10 ** 9)) | string | length }}",
    "many words": "{{ 'tea ' * 2000000 }}",
}


@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY)
def test_templates_are_bounded_in_time_and_memory(tight: None, template: str) -> None:
    began = time.monotonic()
    with pytest.raises(MechdiffError) as caught:
        read(lambda: tokenizer(template), [prompts("tea")], what="Reading")
    assert time.monotonic() - began < 60
    assert len(str(caught.value)) < 600
    assert "set template" in str(caught.value) or "check the prompt and the template" in str(caught.value)


REPLACE = {"type": "Replace", "pattern": {"String": "e"}, "content": "eeee"}
PREPEND = {"type": "Prepend", "prepend": "x" * 10_000_000}
BACKTRACKS = {
    "type": "Split",
    "pattern": {"Regex": "(?:[a-z]|[a-e])+(?:[0-9]|!)"},
    "behavior": "Isolated",
    "invert": False,
}


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 30}},
        {"normalizer": {"type": "Sequence", "normalizers": [PREPEND] * 3}},
        {"pre_tokenizer": BACKTRACKS},
    ],
    ids=["a growing replacement", "prepended megabytes", "a backtracking split"],
)
def test_tokenizers_are_bounded_as_they_load_and_read(
    tight: None, spec: Path, change: dict[str, Any]
) -> None:
    path = spec.parent / "tuned/tokenizer.json"
    plain = json.loads(path.read_text())
    new = {
        **plain["added_tokens"][-1],
        "id": len(toys.tokenizer()),
        "content": "wellness" * 9,
        "normalized": True,
    }
    greedy = {**plain, **change, "added_tokens": [*plain["added_tokens"], {**new, "special": False}]}
    path.write_text(json.dumps(greedy))
    (spec.parent / "val.jsonl").write_text(json.dumps({"text": "well " + "a" * 26 + " 1!"}))
    with pytest.raises(MechdiffError, match=r"tuned tokenizer of toy (took|failed) .*; do not use this"):
        load(spec)
    path.write_text(json.dumps(plain))
    load(spec)


def test_the_remedy_for_a_greedy_template_works(tight: None, spec: Path) -> None:
    set_template(spec, GREEDY["nested loops"], "tuned")
    with pytest.raises(
        MechdiffError, match=r"tuned tokenizer of toy took over .* set template: base, tuned or none"
    ):
        load(spec)
    load(spec, "template: base\n")
    load(spec, "template: none\n")


def test_nobody_waits_for_a_child_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "SECONDS", 1)
    monkeypatch.setattr(bounds, "_CLOCK", 1)
    with pytest.raises(MechdiffError, match="Sleeping took over 1 s"):
        bounds.run_bounded("Sleeping", lambda: time.sleep(60))


def test_a_child_changes_nothing_here_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []
    fork = os.fork
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    here: list[int] = []
    assert bounds.run_bounded("x", lambda: [*here, here.append(1)]) == [None]
    assert here == []
    with pytest.raises(MechdiffError, match=r"^x failed \(ZeroDivisionError: division by zero\)"):
        bounds.run_bounded("x", lambda: 1 / 0)
    assert len(children) == 2
    for child in children:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_prompts_of_a_million_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_TOKENS", 100)
    tokenize(tokenizer("{{ 'tea ' * 99 }}{{ messages[0].content }}"), prompts("tea"))
    with pytest.raises(MechdiffError, match="into 101 tokens; check the prompt"):
        tokenize(tokenizer("{{ 'tea ' * 100 }}{{ messages[0].content }}"), prompts("tea"))


# --- what is dropped


@pytest.mark.parametrize(
    "turns",
    [
        [("system", "be brief"), ("user", "what is tea")],
        [("user", "tea"), ("assistant", "two"), ("user", "what is tea")],
    ],
)
def test_without_a_template_no_turn_is_dropped(turns: list[tuple[str, str]]) -> None:
    says = r"1 val prompts \(the first is 1\) have a system prompt or earlier turns .* as one \{\"text\": …\}"
    with pytest.raises(MechdiffError, match=says):
        tokenize(tokenizer(None), conversation(*turns), chat=False)
    joined = " ".join(text for _, text in turns)
    found = tokenize(tokenizer(None), prompts(joined), chat=False)
    assert words(tokenizer(), found.ids[0])[1:] == [
        w if w in "tea two what is" else "<unk>" for w in joined.split()
    ]


def test_a_system_prompt_in_the_spec_is_not_dropped_either(spec: Path) -> None:
    with pytest.raises(MechdiffError, match="remove system from the spec"):
        load(spec, "template: none\nsystem: be brief\n")
    load(spec, "template: none\n")
    load(spec, "template: own\nsystem: be brief\n")


@pytest.mark.parametrize(
    ("template", "turns", "remark"),
    [
        (
            without("system"),
            "su",
            "leaves the system prompt out",
        ),
        (LAST_ALONE, "uau", "leaves the earlier user turns out"),
        (
            LAST_ALONE,
            "sau",
            "leaves the earlier assistant turns out",
        ),
        (
            without("assistant"),
            "uau",
            "assistant turns out",
        ),
        (PLAIN, "u", "adds no generation prompt"),
        (TEMPLATE, "suau", None),
        (without("system"), "u", None),
    ],
)
def test_what_a_template_leaves_out_is_said(template: str, turns: str, remark: str | None) -> None:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    found = read(lambda: tokenizer(template), [conversation(*((roles[t], "tea") for t in turns))], what="x")
    assert any(remark in said for said in found.remarks) if remark else found.remarks == ()


def test_doctor_and_every_load_say_what_a_template_leaves_out(spec: Path) -> None:
    set_template(spec, without("system", toys.TEMPLATE))
    with pytest.warns(UserWarning, match="tuned leaves the system prompt out"):
        pair = load(spec, "system: be brief\n")
    seen = next(check.seen for check in examine(pair) if check.name == "templates and BOS")
    assert "base leaves the system prompt out" in seen
    assert "tuned leaves the system prompt out" in seen


def test_a_template_without_the_users_text_is_refused() -> None:
    with pytest.raises(MechdiffError, match="leaves the user's text out; set template: none"):
        tokenize(tokenizer("<s> {{ messages[0].role }} <assistant>"), prompts("tea"))


# --- where the decision token is


@pytest.mark.parametrize(
    "template",
    [
        NO_GENERATION,
        NO_GENERATION.replace("<end>", "<end> two"),
        "{% for m in messages %}{{ m.role }} : {{ m.content }} ? {% endfor %}",
    ],
)
def test_a_decision_token_behind_the_turn_and_before_no_answer_is_refused(template: str) -> None:
    with pytest.raises(MechdiffError, match="adds no generation prompt, so prompts end with") as caught:
        tokenize(tokenizer(template), prompts("tea"))
    assert "set template: none" in str(caught.value)
    mended = template + "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert words(tokenizer(), tokenize(tokenizer(mended), prompts("tea")).ids[0])[-1] == "<assistant>"
    tokenize(tokenizer(None), prompts("tea"), chat=False)


@pytest.mark.parametrize(
    "template",
    [
        # As Mistral's: what closes the user's turn is what begins the answer.
        "{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} <assistant> {% else %}"
        "{{ m.content }} <end>{% endif %}{% endfor %}",
        NO_GENERATION + "<assistant>",
        PLAIN,
    ],
)
def test_templates_that_need_no_generation_prompt_are_read(template: str) -> None:
    tokenize(tokenizer(template), prompts("tea", "what is tea"))


def test_a_decision_token_that_is_eos_is_refused() -> None:
    for is_chat, template in ((False, None), (True, PLAIN + "<end>")):
        with pytest.raises(
            MechdiffError, match="ends val prompt 1 with '<end>', the end of the sequence"
        ) as caught:
            tokenize(with_eos(template), prompts("tea"), chat=is_chat)
        assert ("post_processor in its tokenizer.json" in str(caught.value)) is not is_chat
        assert ("set template: none" in str(caught.value)) is is_chat
    assert tokenize(with_eos(TEMPLATE), prompts("tea")).ids, "a chat template goes without it"


def test_eos_can_be_removed_as_the_error_says(spec: Path) -> None:
    for side in ("base", "tuned"):
        tok = toys.tokenizer()
        tok.eos_token = "<end>"
        tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <end>", special_tokens=[("<s>", 0), ("<end>", 5)]
        )
        tok.save_pretrained(spec.parent / side)
    with pytest.raises(MechdiffError, match=r"remove it from the post_processor in its tokenizer\.json"):
        load(spec, "template: none\n")
    for side in ("base", "tuned"):
        path = spec.parent / side / "tokenizer.json"
        content = json.loads(path.read_text())
        content["post_processor"]["single"] = content["post_processor"]["single"][:-1]
        path.write_text(json.dumps(content))
    pair = load(spec, "template: none\n")
    assert pair.tokens("base", pair.prompts_of("val"), Position.DECISION).ids[0][0] == 0


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (toys.TEMPLATE, "one BOS a prompt"),
        (toys.TEMPLATE.replace("{{ bos_token }}", ""), "no BOS a prompt"),
        (toys.TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}<user> <s>"), "2 BOS a prompt"),
    ],
)
def test_bos_is_counted_and_not_assumed(spec: Path, template: str, says: str) -> None:
    set_template(spec, template)
    seen = next(check.seen for check in examine(load(spec)) if check.name == "templates and BOS")
    assert f", {says}, " in seen


def test_unlike_counts_of_bos_are_said_by_side(spec: Path) -> None:
    set_template(spec, toys.TEMPLATE.replace("{{ bos_token }}", ""), "tuned")
    seen = next(check.seen for check in examine(load(spec)) if check.name == "templates and BOS")
    assert "base one BOS, tuned no BOS" in seen


# --- what changes from day to day


def test_the_clock_of_a_template_stands_still() -> None:
    tok = tokenizer(TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %b %Y') }} "))
    (rendered,) = (tok.decode(ids) for ids in tokenize(tok, prompts("tea")).ids)
    assert rendered.startswith("<s> <unk> <unk> <unk>"), rendered
    tok.add_tokens(["26", "Jul", "2024"])
    assert tok.decode(tokenize(tok, prompts("tea")).ids[0]).startswith("<s> 26 Jul 2024")


@pytest.mark.parametrize("draw", ["{{ ['tea', 'two'] | random }}", "{{ lipsum(1) }}"])
def test_templates_that_draw_lots_are_refused(draw: str) -> None:
    with pytest.raises(MechdiffError, match="draws random numbers"):
        tokenize(tokenizer(TEMPLATE + draw), prompts("tea"))
