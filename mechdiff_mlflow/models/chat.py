"""Prompts and answers as tokens: chat templates and tokenizers, and what they leave out."""

from __future__ import annotations

import datetime
import random
from collections.abc import Iterable, Sequence
from unittest import mock

import transformers.utils.chat_template_utils
from transformers import PreTrainedTokenizerBase

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.prompts import Message, Prompt, PromptSet
from mechdiff_mlflow.spec.sites import Position
from mechdiff_mlflow.spec.tokens import TokenizedPrompts


class _StoppedClock(datetime.datetime):
    """The date that templates of Llama 3 print where they cannot ask: every day gives the same tokens."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _StoppedClock:
        return cls(2024, 7, 26, tzinfo=tz)


MAX_TOKENS = 1 << 20
"""The most that one prompt may have."""

_ELSE = "set template: none, or the name of the other side, in the pair spec"
_STAND_IN = "\ue000{}\ue001"
"""Private-use characters, which no text has."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    *,
    chat: bool = True,
    position: Position = Position.DECISION,
) -> TokenizedPrompts:
    """Prompts through a tokenizer and its chat template, with the generation prompt.

    Without `chat`, the user's text alone, with the tokenizer's special tokens.

    Raises:
        MechdiffError: There is no chat template, it fails, it doubles BOS, it gives no tokens, the last of
            them ends the turn, the user's text cannot be located, or turns would be dropped.
    """
    if chat and not getattr(tokenizer, "chat_template", None):
        raise MechdiffError(f"{_name(tokenizer)} has no chat template; set template: none in the pair spec.")
    longer = [number for number, prompt in enumerate(prompts.prompts, 1) if len(prompt.messages) > 1]
    if longer and not chat:
        raise MechdiffError(
            f"template: none reads the last text alone, and {len(longer)} {prompts.split} prompts (the "
            f"first is {longer[0]}) have a system prompt or earlier turns before it; write all of it as one "
            '{"text": …} and remove system from the spec, or set template: own, tuned or base.'
        )
    ids: list[tuple[int, ...]] = []
    ends: list[tuple[int, int]] = []  # first and last token that are read
    for number, prompt in enumerate(prompts.prompts, 1):
        where = f"{prompts.split} prompt {number}"
        tokens = _token_ids(tokenizer, prompt, chat, where)
        _check_ends(tokenizer, tokens, where, chat)
        ids.append(tokens)
        last = len(tokens) - 1
        is_last = position is Position.DECISION
        ends.append((last, last) if is_last else _content(tokenizer, prompt, chat, tokens, where))
    if chat:
        remarks_on(tokenizer, [prompts])
    if position is Position.CONTENT_MEAN:
        spans = tuple(last - first + 1 for first, last in ends)
        return TokenizedPrompts(tuple(ids), tuple(first for first, _ in ends), spans)
    return TokenizedPrompts(tuple(ids), tuple(last for _, last in ends))


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, *, chat: bool = True
) -> tuple[list[list[int]], int | None]:
    """Tokens of each answer behind its prompt, with the token that ends the turn, and that token.

    Without `chat`, a blank stands between a prompt and its answer unless the prompt ends in one.

    Raises:
        MechdiffError: An answer's first token also holds the end of its prompt.
    """
    end = _end_of_turn(tokenizer, chat)
    answers: list[list[int]] = []
    for number, prompt in enumerate(prompts.prompts, 1):
        if prompt.answer is None:
            answers.append([])
            continue
        where = f"{prompts.split} prompt {number}"
        before = _token_ids(tokenizer, prompt, chat, where)
        text = _rendered(tokenizer, prompt, where) if chat else prompt.text
        between = "" if chat or text[-1:].isspace() else " "
        whole = tokenizer(text + between + prompt.answer.strip(), add_special_tokens=not chat)["input_ids"]
        if tuple(whole[: len(before)]) != before or len(whole) == len(before):
            raise MechdiffError(
                f"{_name(tokenizer)} joins the end of {where} and its answer in one token; change the "
                "prompt's last character, or use --answer-tokens 1."
            )
        answers.append([*map(int, whole[len(before) :]), *([] if end is None else [end])])
    return answers, end


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, chat: bool) -> int | None:
    """The first special token that the template puts behind an answer, else the end of a text."""
    answered = _stand_ins("user", "assistant")
    whole = (_attempt(tokenizer, answered, answering=False) or "") if chat else ""
    behind = tokenizer(whole.partition(answered.text)[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    end: int | None = next((int(i) for i in behind if i in special), tokenizer.eos_token_id)
    return end


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"The tokenizer of {tokenizer.name_or_path or 'the model'}"


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"The chat template of {tokenizer.name_or_path}"


def _token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool, where: str) -> tuple[int, ...]:
    found = _rendered(tokenizer, prompt, where) if chat else prompt.text
    tokens = tokenizer(found, **({"add_special_tokens": False} if chat else {}))["input_ids"]
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise MechdiffError(
            f"{_name(tokenizer)} turns {where} into {len(tokens) or 'no'} tokens; check the prompt and the "
            "template."
        )
    return tuple(int(token) for token in tokens)


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, where: str) -> str:
    chance = random.getstate()
    try:
        text = _render(tokenizer, prompt.messages)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of the model's author and may raise anything
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise MechdiffError(
            f"{_template(tokenizer)} fails on {where} ({reason}); change the prompt, "
            "or set template: none in the pair spec."
        ) from error
    if random.getstate() != chance:
        raise MechdiffError(
            f"{_template(tokenizer)} draws random numbers, so that a prompt is "
            f"another one each time; {_ELSE}."
        )
    return text


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Iterable[Message], *, answering: bool = True
) -> str:
    # The clock cannot be passed in: transformers lets templates have plain data alone.
    with mock.patch.object(transformers.utils.chat_template_utils, "datetime", _StoppedClock):
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=answering
        )
    return text


def _check_ends(tokenizer: PreTrainedTokenizerBase, tokens: tuple[int, ...], where: str, chat: bool) -> None:
    """Refuse two BOS tokens before a prompt and EOS behind it."""
    bos, eos = tokenizer.bos_token_id, getattr(tokenizer, "eos_token_id", None)
    part = "its chat template" if chat else "the post_processor in its tokenizer.json"
    if bos is not None and tokens[:2] == (bos, bos):
        raise MechdiffError(
            f"{_name(tokenizer)} starts {where} with two BOS tokens; remove one from {part}, or from the "
            "prompt."
        )
    if eos is not None and tokens[-1] == eos:
        raise MechdiffError(
            f"{_name(tokenizer)} ends {where} with {tokenizer.eos_token!r}, the end of the sequence, where "
            f"the answer should begin; remove it from {part}, or from the prompt"
            + (f", or {_ELSE}." if chat else ".")
        )


def _one_of_each_shape(sets: Iterable[PromptSet]) -> list[Prompt]:
    shapes = dict.fromkeys(tuple(m["role"] for m in p.messages) for s in sets for p in s.prompts)
    return [_stand_ins(*roles) for roles in shapes]


def _stand_ins(*roles: str) -> Prompt:
    return Prompt(tuple({"role": r, "content": _STAND_IN.format(i)} for i, r in enumerate(roles)))


def _attempt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, answering: bool = True) -> str | None:
    """The rendered text; None where the template refuses it, as some do with unusual texts or turns."""
    try:
        return _render(tokenizer, prompt.messages, answering=answering)
    except MemoryError:
        raise
    except Exception:
        return None


def remarks_on(tokenizer: PreTrainedTokenizerBase, sets: Sequence[PromptSet]) -> list[str]:
    """What a chat template leaves out of the prompts, and whether it begins the answer.

    Raises:
        MechdiffError: It leaves the user's text out, or the decision token lies between turns.
    """
    found: dict[str, None] = {}
    for prompt in _one_of_each_shape(sets):
        text = _attempt(tokenizer, prompt)
        if text is None:
            continue
        if prompt.text not in text:
            raise MechdiffError(f"{_template(tokenizer)} leaves the user's text out; {_ELSE}.")
        if text == _attempt(tokenizer, prompt, answering=False):
            _check_turn_ends(tokenizer, prompt, text)
            found["adds no generation prompt, so the decision token is the last of the user's turn"] = None
        for message in prompt.messages[:-1]:
            if message["content"] not in text:
                what = "system prompt" if message["role"] == "system" else f"earlier {message['role']} turns"
                found[f"leaves the {what} out"] = None
    return [f"{_template(tokenizer)} {what}." for what in found]


def _check_turn_ends(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> None:
    """Refuse a template that closes the user's turn and begins no answer."""
    answered = _stand_ins(*(message["role"] for message in prompt.messages), "assistant")
    whole = _attempt(tokenizer, answered, answering=False)
    end = text.rindex(prompt.text) + len(prompt.text)
    closed, between = text[end:], (whole or "").partition(prompt.text)[2].partition(answered.text)[0]
    n, n_without = (len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in (text, text[:end]))
    if n > n_without and whole is not None and closed.strip() != between.strip():
        raise MechdiffError(
            f"{_template(tokenizer)} adds no generation prompt, so prompts end with {closed[:80]!r} and an "
            f"answer begins only after {between[:80]!r}; add that under {{% if add_generation_prompt %}} to "
            f"it, or {_ELSE}."
        )


def _content(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool, tokens: tuple[int, ...], where: str
) -> tuple[int, int]:
    """Indices of the first and the last token that hold a character of the user's text."""
    if not tokenizer.is_fast:
        raise MechdiffError(f"{_name(tokenizer)} is slow and gives no offsets; use --position decision.")
    content = prompt.text.strip()
    blanks = prompt.text.partition(content)[0]
    if chat:
        # The text may also occur elsewhere in the template ("user"); a stand-in shows where its place is.
        mark = _STAND_IN.format("")
        stand_in = Prompt((*prompt.messages[:-1], {"role": "user", "content": mark}))
        start = _rendered(tokenizer, stand_in, where).find(mark)
        rendered = _rendered(tokenizer, prompt, where)
    else:
        start, rendered = 0, prompt.text
    if blanks and rendered.startswith(blanks + content, max(start, 0)):  # most templates strip them
        start += len(blanks)
    end = start + len(content)
    encoded = tokenizer(rendered, add_special_tokens=not chat, return_offsets_mapping=True)
    if tuple(encoded["input_ids"]) != tokens or start < 0 or rendered[start:end] != content:
        raise MechdiffError(f"{_name(tokenizer)} hides the user's text of {where}; use --position decision.")
    held = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > max(a, start)]
    return held[0], held[-1]
