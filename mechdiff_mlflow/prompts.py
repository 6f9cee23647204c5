"""Prompts: files of conversations, splits, and what they are as tokens."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mechdiff_mlflow import untrusted
from mechdiff_mlflow.errors import MechdiffError

NEAR_DUPLICATE = 0.8
"""Jaccard similarity of word trigrams from which two prompts count as the same question."""

MAX_FILE_BYTES = 256 << 20
MAX_LINE_BYTES = 1 << 20

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TokenizedPrompts:
    """Unpadded token ids of n prompts, and the position of each that is read and replaced.

    Args:
        ids: Token ids, one tuple a prompt; the decision token is the last of each.
        positions: For each prompt the index into `ids` of the token whose activations are captured and
            patched; `len(ids) - 1` is the decision token.
        spans: For each prompt how many tokens from there on are averaged and moved together; empty is one.
    """

    ids: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    spans: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> TokenizedPrompts:
        return TokenizedPrompts(self.ids[part], self.positions[part], self.spans[part])

    def span(self, i: int) -> int:
        """Tokens of prompt i that are averaged."""
        return self.spans[i] if self.spans else 1

    def take(self, indices: Iterable[int]) -> TokenizedPrompts:
        """Some of the prompts, in that order."""
        some = list(indices)
        return TokenizedPrompts(
            tuple(self.ids[i] for i in some),
            tuple(self.positions[i] for i in some),
            tuple(self.spans[i] for i in some) if self.spans else (),
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation, ending with the user's turn."""

    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """What the user says last."""
        return self.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one split, in file order."""

    split: str
    prompts: tuple[Prompt, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """32 hex digits of sha256 over the conversations, in order."""
        lines = (
            json.dumps([dict(m) for m in p.messages], sort_keys=True, ensure_ascii=False)
            for p in self.prompts
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    def first(self, n: int | None, *, option: str = "--n") -> PromptSet:
        """The first n prompts; all when n is None.

        Raises:
            MechdiffError: There are fewer than n, or n < 1.
        """
        if n is None:
            return self
        if not 1 <= n <= len(self):
            raise MechdiffError(
                f"{n} {self.split} prompts were asked for and there are {len(self)}; "
                f"pass {option} 1 to {len(self)}."
            )
        return PromptSet(self.split, self.prompts[:n])


def read_prompts(path: Path, split: str, *, system: str | None = None) -> PromptSet:
    """Read a JSONL file of `{"text": …}` or `{"messages": [{"role": …, "content": …}, …]}` lines.

    Args:
        path: UTF-8 file, one object a line; blank lines are skipped, other keys ignored.
        split: Which split it is.
        system: System prompt put before every `text`.

    Raises:
        MechdiffError: The file is missing, empty or not UTF-8, or a line (named by number) is malformed.
    """
    try:
        size = untrusted.size_of(path, MAX_FILE_BYTES)
        with path.open("rb") as file:
            prompts = [
                Prompt(_messages(line, f"{path}, line {number}", system))
                for number, line in _lines(file, size)
                if line.strip()
            ]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MechdiffError(
            f"Prompt file {path} cannot be read as UTF-8 text ({reason}); check the file."
        ) from None
    if not prompts:
        raise MechdiffError(f'Prompt file {path} is empty; write one {{"text": "…"}} a line.')
    return PromptSet(split, tuple(prompts))


def _lines(file: BinaryIO, size: int) -> Iterator[tuple[int, str]]:
    """Numbered lines, cut at newlines alone: JSON may hold U+2028, and a file of one endless line is none."""
    number = 0
    while line := file.readline(min(size, MAX_LINE_BYTES) + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"line {number} has over {MAX_LINE_BYTES} bytes")
        yield number, line.decode("utf-8")


def _messages(line: str, where: str, system: str | None) -> tuple[Message, ...]:
    try:
        entry = untrusted.parse_json(line)
    except ValueError as error:
        raise MechdiffError(f"{where} is not JSON ({error}); write one object a line.") from None
    text, messages = (entry.get("text"), entry.get("messages")) if isinstance(entry, dict) else (None, None)
    if isinstance(text, str) and _is_text(text) and messages is None:
        turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return (*turns, {"role": "user", "content": text})
    if text is None and isinstance(messages, list) and messages and all(_is_message(m) for m in messages):
        if messages[-1]["role"] == "user":
            return tuple({"role": m["role"], "content": m["content"]} for m in messages)
        raise MechdiffError(
            f"{where} ends with the {messages[-1]['role']}; end messages with the user's turn."
        )
    raise MechdiffError(
        f'{where} has neither a "text" nor a list of "messages" with role and content, as plain text; '
        'write {"text": "…"}.'
    )


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("system", "user", "assistant")
        and isinstance(message.get("content"), str)
        and _is_text(message["content"])
    )


def _is_text(text: str) -> bool:
    """Whether a tokenizer can read it as one: something, without NUL and halves of characters."""
    return bool(text.strip()) and "\0" not in text and not re.search("[\ud800-\udfff]", text)


def check_disjoint(sets: Iterable[PromptSet]) -> None:
    """Check that no prompt stands in two splits, to the letter or nearly.

    Texts are compared case-folded, in NFKC, without punctuation; near duplicates share at least
    `NEAR_DUPLICATE` of their word trigrams (Jaccard; Broder 1997, On the resemblance of documents).

    Raises:
        MechdiffError: Two splits share a prompt; the message shows it.
    """
    seen: list[tuple[str, str, frozenset[tuple[str, ...]]]] = []
    by_shingle: dict[tuple[str, ...], list[int]] = {}
    for prompts in sets:
        for prompt in prompts.prompts:
            shingles = _shingles(prompt.text)
            shared: dict[int, int] = {}
            for shingle in shingles:
                for index in by_shingle.get(shingle, ()):
                    shared[index] = shared.get(index, 0) + 1
            for index, count in shared.items():
                split, text, others = seen[index]
                if split != prompts.split and count >= NEAR_DUPLICATE * len(shingles | others):
                    raise MechdiffError(
                        f"The {split} prompt {text!r} is nearly {prompt.text!r} in {prompts.split}; "
                        "remove it from one of the two files."
                    )
            for shingle in shingles:
                by_shingle.setdefault(shingle, []).append(len(seen))
            seen.append((prompts.split, prompt.text, shingles))


def _shingles(text: str) -> frozenset[tuple[str, ...]]:
    # Sentence punctuation does not make another question; operators such as + and - do.
    words = re.findall(r"\w+|[^\w\s.,;:!?…\"'«»“”‘’]", unicodedata.normalize("NFKC", text).casefold())
    if len(words) < 3:
        return frozenset([tuple(words)])
    return frozenset(zip(words, words[1:], words[2:], strict=False))
