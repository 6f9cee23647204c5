"""How a model reads prompts: chat templates and tokenizers, within bounds, and what they leave out."""

from __future__ import annotations

import dataclasses
import datetime
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import transformers.utils.chat_template_utils
from transformers import PreTrainedTokenizerBase

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.bounded import run_bounded
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.prompts import Message, Prompt, PromptSet, TokenizedPrompts
from mechdiff_mlflow.spec.sites import Position
from mechdiff_mlflow.text import cut

if TYPE_CHECKING:
    from mechdiff_mlflow.models.sides import Side


class _StoppedClock(datetime.datetime):
    """The date that templates of Llama 3 print where they cannot ask: every day gives the same tokens."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _StoppedClock:
        return cls(2024, 7, 26, tzinfo=tz)


MAX_TOKENS = 1 << 20
"""The most that one prompt may have."""

_PROMPTS_A_SECOND = 50
_ELSE = "set template: none, or the name of the other side, in the pair spec"
_STAND_IN = "\ue000{}\ue001"
"""Private-use characters, which no text has."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Prompts as one tokenizer and its chat template give them."""

    sets: tuple[TokenizedPrompts, ...]
    remarks: tuple[str, ...] = ()  # what the template leaves out or lacks without being wrong


def read(
    load: Callable[[], PreTrainedTokenizerBase],
    sets: Sequence[PromptSet],
    *,
    what: str,
    chat: bool = True,
    position: Position = Position.DECISION,
) -> Reading:
    """Load a tokenizer and read prompts through it, in a process with bounds on time and memory.

    Raises:
        MechdiffError: It, called `what`, takes too much time or memory; or as `load` and `tokenize`.
    """

    def work() -> dict[str, Any]:
        tokenizer = load()
        tokens = [dataclasses.asdict(tokenize(tokenizer, s, chat=chat, position=position)) for s in sets]
        return {"sets": tokens, "remarks": _remarks(tokenizer, sets) if chat else []}

    found = run_bounded(what, work, seconds=sum(map(len, sets)) // _PROMPTS_A_SECOND)
    tokens = (
        TokenizedPrompts(tuple(map(tuple, s["ids"])), tuple(s["positions"]), tuple(s["spans"]))
        for s in found["sets"]
    )
    return Reading(tuple(tokens), tuple(found["remarks"]))


@dataclass(frozen=True, eq=False)
class Readers:
    """Reads prompts for both sides of a pair, each set once; sides are by role, all prompts by split."""

    spec: PairSpec
    sides: Mapping[str, Side]
    prompts: Mapping[str, PromptSet]
    _readings: dict[tuple[str, str, Position], Reading] = field(default_factory=dict)
    _words: dict[str, dict[int, str]] = field(default_factory=dict)

    def tokens(self, role: str, prompts: PromptSet, position: Position) -> TokenizedPrompts:
        """Prompts as one side sees them.

        Raises:
            MechdiffError: A side lacks a template, embedding or position that it needs; or as `read`.
        """
        own = self.prompts.get(prompts.split)
        rows = None if own is None else own.rows_of(prompts)
        if rows is None:
            return self._reading(role, position, [prompts], prompts.digest).sets[0]
        at = list(self.prompts).index(prompts.split)
        return self.all_prompts(role, position).sets[at].take(rows)

    def all_prompts(self, role: str, position: Position) -> Reading:
        """All prompts of the pair as one side sees them; raises as `tokens`."""
        return self._reading(role, position, list(self.prompts.values()), "")

    @property
    def remarks(self) -> list[str]:
        """What the chat templates in use leave out of the prompts or lack, one sentence each."""
        found = [r for role in self.sides for r in self.all_prompts(role, Position.DECISION).remarks]
        return list(dict.fromkeys(found))

    def tokenizer_for(self, role: str) -> PreTrainedTokenizerBase:
        """The tokenizer that one side's prompts are read through."""
        return self.sides[self._reader(role)].tokenizer

    def words(self, role: str, tokens: Iterable[int]) -> Mapping[int, str]:
        """The text of each token by itself; raises `MechdiffError` where that takes too much."""
        tokenizer, known = self.tokenizer_for(role), self._words.setdefault(self._reader(role), {})
        if missing := sorted({*tokens} - known.keys()):
            what = f"Decoding with the {role} tokenizer of {self.spec.name}"
            texts = run_bounded(what, lambda: [cut(tokenizer.decode([token])) for token in missing])
            known.update(zip(missing, texts, strict=True))
        return known

    def first_of_answers(self, role: str, prompts: PromptSet) -> list[frozenset[int]]:
        """The tokens that the answer of each prompt may begin with; none where it is not known.

        After a chat template that is the answer's own first token; without one there may be a space before.

        Raises:
            MechdiffError: The tokenizer takes too much time or memory.
        """
        answers = sorted({prompt.answer for prompt in prompts.prompts if prompt.answer})
        starts = ("",) if self.spec.template != "none" else ("", " ")
        tokenizer = self.tokenizer_for(role)

        def first() -> list[list[int]]:
            ids = [[tokenizer(s + a, add_special_tokens=False)["input_ids"] for s in starts] for a in answers]
            return [[int(one[0]) for one in each if len(one)] for each in ids]

        what = f"Reading answers through the {role} tokenizer of {self.spec.name}"
        found = dict(zip(answers, map(frozenset, run_bounded(what, first)), strict=True)) if answers else {}
        return [found.get(prompt.answer or "", frozenset()) for prompt in prompts.prompts]

    def _reader(self, role: str) -> str:
        return self.spec.template if self.spec.template in self.sides else role

    def _reading(self, role: str, position: Position, sets: Sequence[PromptSet], which: str) -> Reading:
        reader = self._reader(role)
        key = (reader, which, position)
        if key not in self._readings:
            self._check_templates()
            what = f"Reading prompts through the {reader} tokenizer of {self.spec.name}"
            tokenizer, chat = self.sides[reader].tokenizer, self.spec.template != "none"
            found = read(lambda: tokenizer, sets, what=what, chat=chat, position=position)
            for role in self.sides if reader == self.spec.template else (reader,):
                self._check_embedded(found, reader, self.sides[role])
                for prompts, tokens in zip(sets, found.sets, strict=True):
                    _check_lengths(prompts, tokens, self.sides[role])
            self._readings[key] = found
        return self._readings[key]

    def _check_templates(self) -> None:
        asked = self.spec.template
        has = [role for role, side in self.sides.items() if getattr(side.tokenizer, "chat_template", None)]
        needs = {"own": [*self.sides], "none": []}.get(asked, [asked])
        lack = [role for role in needs if role not in has]
        if lack:
            other = f"template: {has[0]} for both to read the {has[0]} side's, or " if has else ""
            raise MechdiffError(
                f"The {' and the '.join(lack)} tokenizer of {self.spec.name} has no chat template, which "
                f"template: {asked} asks for; set {other}template: none in the pair spec."
            )

    def _check_embedded(self, found: Reading, reader: str, side: Side) -> None:
        rows = side.checkpoint.n_embeddings
        top = max((max(ids) for tokens in found.sets for ids in tokens.ids), default=0)
        if rows is not None and top >= rows:
            token = str(self.sides[reader].tokenizer.convert_ids_to_tokens(top))[:80]
            other = "base" if reader == "tuned" else "tuned"
            raise MechdiffError(
                f"The {reader} tokenizer gives token {top} ({token!r}) and the {side.role} model has "
                f"embeddings for {rows}; set template: {other}, or none, or save the model with its "
                "embeddings resized."
            )


def _check_lengths(prompts: PromptSet, tokens: TokenizedPrompts, side: Side) -> None:
    most, lengths = side.checkpoint.max_tokens, [len(ids) for ids in tokens.ids]
    if most is not None and max(lengths, default=0) > most:
        longest = lengths.index(max(lengths))
        raise MechdiffError(
            f"Prompt {longest + 1} of {prompts.split} has {lengths[longest]} tokens and {side.role} has "
            f"positions for {most}; shorten or remove it, and any other that is as long."
        )


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
        _remarks(tokenizer, [prompts])
    if position is Position.CONTENT_MEAN:
        spans = tuple(last - first + 1 for first, last in ends)
        return TokenizedPrompts(tuple(ids), tuple(first for first, _ in ends), spans)
    return TokenizedPrompts(tuple(ids), tuple(last for _, last in ends))


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


def _remarks(tokenizer: PreTrainedTokenizerBase, sets: Sequence[PromptSet]) -> list[str]:
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
