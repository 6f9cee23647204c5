"""Prompts: conversations in files and in splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.duplicates import near_duplicates, repeats
from mechdiff_mlflow.spec.tokens import Answers
from mechdiff_mlflow.text import cut, is_text

SPLITS = ("train", "val", "test")
MAX_FILE_BYTES = 256 << 20
MAX_LINE = 1 << 20
FEW = 100
"""Independent prompts below which users hear what so few cost."""

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation, ending with the user's turn; prompts of one group are resampled together."""

    messages: tuple[Message, ...]
    group: str | None = None
    answer: str | None = None

    @property
    def text(self) -> str:
        """What the user says last."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one split, in file order."""

    split: str
    prompts: tuple[Prompt, ...]
    answers: Answers | None = None  # what is read behind them; None is the decision token alone

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """32 hex digits of sha256 over the conversations, in order, and what is read behind them."""
        lines = self._conversations
        lines += [json.dumps(self.groups)] if self.groups else []
        lines += [repr(self.answers)] if self.answers is not None else []
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    @property
    def _conversations(self) -> list[str]:
        return [
            json.dumps([dict(m) for m in p.messages], sort_keys=True, ensure_ascii=False)
            for p in self.prompts
        ]

    def rows_of(self, part: PromptSet) -> list[int] | None:
        """Where each prompt of `part` stands in this set; None if one does not."""
        if self.prompts[: len(part)] == part.prompts:
            return list(range(len(part)))
        where = {conversation: row for row, conversation in enumerate(self._conversations)}
        rows = [where[one] for one in part._conversations if one in where]
        return rows if len(rows) == len(part) else None

    @property
    def groups(self) -> tuple[int, ...]:
        """The group of each prompt, counted from 0 in file order; empty if each prompt is one by itself."""
        names = [p.group if p.group is not None else i for i, p in enumerate(self.prompts)]
        number = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return tuple(number[name] for name in names) if len(number) < len(names) else ()

    @property
    def n_groups(self) -> int:
        """Number of prompts, or groups of them, that are independent of each other."""
        return len({*self.groups}) or len(self)

    @property
    def few(self) -> str:
        """What it costs that they are few; empty from `FEW` on."""
        n = self.n_groups
        if n >= FEW:
            return ""
        unseen = 1 - 0.025 ** (1 / n)  # as in `measures.bootstrap`
        return (
            f"{len(self)} {self.split} prompts, {n} of them independent, are few: 95 % intervals are "
            f"{(FEW / n) ** 0.5:.1f} times as wide as with {FEW} or wider, and a kind of prompt that is "
            f"{100 * unseen:.0f} % of all may be missing; give {FEW} or more"
        )

    def first(self, n: int | None, *, option: str = "--n") -> PromptSet:
        """The first n prompts, all when n is None; raises `MechdiffError` where there are fewer, or n < 1."""
        if n is None:
            return self
        if not 1 <= n <= len(self):
            raise MechdiffError(
                f"{n} {self.split} prompts were asked for and there are {len(self)}; "
                f"pass {option} 1 to {len(self)}."
            )
        return self.take(range(n))

    def take(self, indices: Iterable[int]) -> PromptSet:
        """Some of the prompts, in that order, with their answers."""
        some = list(indices)
        answers = self.answers
        if answers is not None:
            answers = replace(answers, ids=tuple(answers.ids[i] for i in some))
        return PromptSet(self.split, tuple(self.prompts[i] for i in some), answers)


def read_prompts(
    path: Path, split: str, *, system: str | None = None, column: str | None = None
) -> PromptSet:
    """Read a JSONL file of `{"text": …}` or `{"messages": [{"role": …, "content": …}, …]}` lines.

    Blank lines are skipped; `prompt` may stand for `text`, or `column` for both; `system` goes before every
    text; `group` names prompts that belong together, such as paraphrases; `answer` is the right answer; other
    keys are ignored.

    Raises:
        MechdiffError: The file is missing, empty or not UTF-8, a line (named by number) is malformed, or a
            prompt stands there twice without a group that says so.
    """
    prompts: dict[int, Prompt] = {}
    text = untrusted.read_text(path, MAX_FILE_BYTES, "Prompt file")
    for number, part in enumerate(text.split("\n"), 1):  # at newlines alone: JSON may hold U+2028
        line = part.strip().strip("\ufeff").strip()
        if len(line) > MAX_LINE:
            raise MechdiffError(
                f"{path}, line {number} has over {MAX_LINE} characters; shorten or remove it."
            )
        if line:
            where = f"{path}, line {number}"
            prompts[number] = prompt_of(_entry(line, where), where, system, column)
    if not prompts:
        raise MechdiffError(f'Prompt file {path} is empty; write one {{"text": "…"}} a line.')
    return prompt_set(path, split, prompts)


def prompt_set(path: Path | str, split: str, prompts: Mapping[int, Prompt]) -> PromptSet:
    """The numbered prompts that were read from `path`, as a set.

    Raises:
        MechdiffError: One stands there twice without a group that says so, or all are of one group.
    """
    _check_repeats(path, prompts)
    found = PromptSet(split, tuple(prompts.values()))
    if found.n_groups < 2 <= len(found):
        raise MechdiffError(
            f"All prompts of {path} are of one group, so no interval can be; name two or more."
        )
    return found


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system", "user", "assistant"]
    content: str


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)

    text: str | None = Field(None, validation_alias=AliasChoices("text", "prompt"))
    messages: Annotated[list[_Message], Field(min_length=1)] | None = None
    group: str | None = None
    answer: str | None = None

    @model_validator(mode="after")
    def _is_prompt(self) -> _Line:
        if (self.text is None) == (self.messages is None):
            raise ValueError('write either a "text" or a list of "messages"')
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("end messages with the user's turn")
        texts = [self.text, self.group, self.answer, *(message.content for message in self.messages or ())]
        for text in texts:
            if text is not None and (not text.strip() or "\0" in text or not is_text(text)):
                raise ValueError("a text is blank, or holds NUL or half a character; correct or remove it")
        return self


def _entry(line: str, where: str) -> object:
    try:
        return untrusted.parse_json(line)
    except ValueError as error:
        raise MechdiffError(
            f'{where} is not JSON ({cut(str(error))}); write one object a line, e.g. {{"text": "…"}}.'
        ) from None


def prompt_of(entry: object, where: str, system: str | None, column: str | None = None) -> Prompt:
    """The prompt in a line's object or a table's row; `where` it stands, in a message.

    Raises:
        MechdiffError: It is none.
    """
    if column is not None and isinstance(entry, dict):
        said = entry.get(column)
        others = {key: entry[key] for key in ("group", "answer") if key in entry and key != column}
        entry = {**others, "messages" if isinstance(said, list) else "text": said}
    try:
        line = _Line.model_validate(entry)
    except ValidationError as error:
        raise MechdiffError(
            f'{where} is no prompt ({cut(untrusted.explain(error), 200)}); write e.g. {{"text": "…"}}.'
        ) from None
    if line.messages:
        return Prompt(tuple(message.model_dump() for message in line.messages), line.group, line.answer)
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return Prompt((*turns, {"role": "user", "content": line.text or ""}), line.group, line.answer)


def _check_repeats(path: Path | str, prompts: Mapping[int, Prompt]) -> None:
    """Refuse equal prompts outside of one group: an interval would take them for independent."""
    found = repeats(
        {n: ([(m["role"], m["content"]) for m in p.messages], p.group) for n, p in prompts.items()}
    )
    if found:
        a, b = found[0]
        raise MechdiffError(
            f"{len(found)} of {len(prompts)} prompts of {path} stand there before, first line {b} as line "
            f"{a} ({cut(repr(prompts[a].text))}), and would be counted as independent; remove them, or give "
            'prompts that belong together the same "group": "NAME" on their lines.'
        )


def check_disjoint(sets: Iterable[PromptSet]) -> None:
    """Check that no prompt stands in two splits, to the letter or nearly.

    Texts are compared case-folded, in NFKC, without punctuation; near duplicates share at least
    `NEAR_DUPLICATE` of their word trigrams (Jaccard; Broder 1997, On the resemblance of documents).

    Raises:
        MechdiffError: Two splits share a prompt; the message shows it.
    """
    places = [(i, s.split, p.text) for i, s in enumerate(sets) for p in s.prompts]
    found = near_duplicates([text for *_, text in places], [i for i, *_ in places])
    for a, b in found:
        (_, split, text), (_, other, other_text) = places[a], places[b]
        raise MechdiffError(
            f"The {split} prompt {cut(repr(text))} is nearly {cut(repr(other_text))} in {other}; "
            "remove it from one of the two files."
        )
