"""Duplicate prompts: repeats in a split, and near duplicates between splits."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

NEAR_DUPLICATE = 0.8
"""Jaccard similarity of word trigrams from which two prompts count as the same question."""


def repeats(said: Mapping[int, tuple[Sequence[tuple[str, str]], str | None]]) -> list[tuple[int, int]]:
    """Pairs of line numbers, an earlier line and its repeat, unless one group holds both.

    Texts are equal if their composed forms (NFC) differ in white space at most.

    Args:
        said: For each line number its turns (role, text) and its group.
    """
    first: dict[tuple[tuple[str, str], ...], tuple[int, str | None]] = {}
    found = []
    for number, (turns, group) in said.items():
        key = tuple((role, " ".join(unicodedata.normalize("NFC", text).split())) for role, text in turns)
        before, same = first.setdefault(key, (number, group))
        if before != number and (group is None or group != same):
            found.append((before, number))
    return found


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """The word trigrams of a text, case-folded, in NFKC, without punctuation; a shorter text is one item."""
    # Sentence punctuation does not make another question; operators such as + and - do.
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = re.findall(r"\w+|[^\w\s.,;:!?…\"'«»“”‘’]", folded)
    return frozenset(zip(words, words[1:], words[2:], strict=False) if len(words) >= 3 else [tuple(words)])


def near_duplicates(texts: Sequence[str], splits: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Every pair of texts of different splits that share `NEAR_DUPLICATE` of their trigrams.

    Sets of n and m members that are so alike have at least 4/9 · (n + m) in common, hence one that is among
    the rarest of both: texts are compared only where these meet, and what many share, as a template, is not
    rare.

    Reference: Bayardo, Ma & Srikant (2007), Scaling up all pairs similarity search.
    """
    sets = [shingles(text) for text in texts]
    n_texts = Counter(trigram for members in sets for trigram in members)
    seen: dict[tuple[int, tuple[str, ...]], list[tuple[int, int]]] = {}  # by size and trigram: rank, text
    for j, members in enumerate(sets):
        n = len(members)
        rarest = sorted(members, key=lambda trigram: (n_texts[trigram], trigram))[: n // 5 + 1]
        found: set[int] = set()
        for m in range(-(-4 * n // 5), 5 * n // 4 + 1):
            common = -(-4 * (n + m) // 9)
            for trigram in rarest[: n - common + 1]:
                found.update(i for rank, i in seen.get((m, trigram), ()) if rank <= m - common)
        for i in sorted(found):
            if splits[i] != splits[j] and len(sets[i] & members) >= NEAR_DUPLICATE * len(sets[i] | members):
                yield i, j
        for rank, trigram in enumerate(rarest):
            seen.setdefault((n, trigram), []).append((rank, j))
