"""What both sides of a pair read: its prompts and answers through their tokenizers, within bounds, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.bounded import run_bounded
from mechdiff_mlflow.models.chat import answer_tokens, remarks_on, tokenize
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Position
from mechdiff_mlflow.spec.tokens import TokenizedPrompts
from mechdiff_mlflow.text import cut

if TYPE_CHECKING:
    from mechdiff_mlflow.models.sides import Side

_PROMPTS_A_SECOND = 50


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
        return {"sets": tokens, "remarks": remarks_on(tokenizer, sets) if chat else []}

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
            tokens = self._reading(role, position, [prompts], prompts.digest).sets[0]
        else:
            at = list(self.prompts).index(prompts.split)
            tokens = self.all_prompts(role, position).sets[at].take(rows)
        if prompts.answers is not None:
            tokens = tokens.answered(prompts.answers)
            _check_lengths(prompts, tokens, self.sides[role])
        return tokens

    def given_answers(self, prompts: PromptSet) -> tuple[list[tuple[int, ...]], int | None]:
        """Tokens of the answers that prompts have as the tuned model would write them, and what ends each.

        Empty where a prompt has none. Raises as `read` and `answer_tokens`.
        """
        reader, chat = self._reader("tuned"), self.spec.template != "none"
        what = f"Reading answers through the {reader} tokenizer of {self.spec.name}"
        tokenizer = self.sides[reader].tokenizer
        found = run_bounded(
            what,
            lambda: answer_tokens(tokenizer, prompts, chat=chat),
            seconds=len(prompts) // _PROMPTS_A_SECOND,
        )
        return [tuple(ids) for ids in found[0]], found[1]

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

    def texts(self, role: str, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of tokens, without special ones; raises as `words`."""
        tokenizer = self.tokenizer_for(role)
        what = f"Decoding with the {role} tokenizer of {self.spec.name}"
        found: list[str] = run_bounded(what, lambda: tokenizer.batch_decode(rows, skip_special_tokens=True))
        return found

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
