"""Duplicate prompts: repeats in a split, and near duplicates between splits.

Near ones are found without comparing all with all. Sets of word trigrams whose Jaccard similarity is 4/5 or
more share one of their rarest trigrams, and how many of those must be looked at follows from the two sizes
(Bayardo, Ma & Srikant 2007, Scaling up all pairs similarity search; Xiao et al. 2008, PPJoin). What many
prompts share, as a template, is not rare and makes no pair. Pairs that remain are told apart by parities of
hashed trigrams, which bound the symmetric difference from below, and then exactly.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

NEAR_DUPLICATE = 0.8
"""Jaccard similarity of word trigrams from which two prompts count as the same question."""

_PAIRS = 1 << 21  # looked at together
_WORDS = (1, 16, 16, 16)  # of 64 bits, of each signature
Ints = NDArray[np.int64]


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
    words = _words(text)
    return frozenset(zip(words, words[1:], words[2:], strict=False) if len(words) >= 3 else [tuple(words)])


def near_duplicates(texts: Sequence[str], splits: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Every pair of texts of different splits that share `NEAR_DUPLICATE` of their trigrams.

    Args:
        texts: The texts of all splits, one split after the other.
        splits: The split of each text, counted from 0 and rising.
    """
    split = np.asarray(splits, dtype=np.int64)
    doc, token = _ranked(texts, split)
    size = np.bincount(doc, minlength=len(texts))
    first = np.cumsum(size) - size
    place = np.arange(len(doc)) - first[doc]
    signatures = _signatures(doc, token, len(texts))
    kept = place <= size[doc] // 5  # none further can be the first in common
    doc, token, place = doc[kept], token[kept], place[kept]
    # Sizes within 2 % together: what is asked of them is that of the least.
    bucket = np.floor(np.log(size) / np.log(1.02)).astype(np.int64)[doc]
    blocks: dict[tuple[int, int], Ints] = {}
    order = np.lexsort((token, bucket, split[doc]))
    for rows in np.split(order, np.flatnonzero(np.diff(split[doc][order] * 10_000 + bucket[order])) + 1):
        if len(rows):
            blocks[int(split[doc[rows[0]]]), int(bucket[rows[0]])] = rows

    def prefix(rows: Ints, least: int) -> Ints:
        """Of these places the ones of which two sets must share one, when the other has `least` or more."""
        n = size[doc[rows]]
        return rows[place[rows] < n + 1 + (-4 * (n + least) // 9)]

    for (s, a), mine in blocks.items():
        for (t, b), others in blocks.items():
            n, m = int(size[doc[mine]].min()), int(size[doc[others]].min())
            if s < t and abs(a - b) <= 13:  # 1.02^12 > 5/4
                left, right = prefix(mine, m), prefix(others, n)
                for i, j in _sharing(doc[left], token[left], doc[right], token[right]):
                    yield from _alike(i, j, size, signatures, texts)


def _words(text: str) -> list[str]:
    # Sentence punctuation does not make another question; operators such as + and - do.
    return re.findall(r"\w+|[^\w\s.,;:!?…\"'«»“”‘’]", unicodedata.normalize("NFKC", text).casefold())


def _ranked(texts: Sequence[str], split: Ints) -> tuple[Ints, Ints]:
    """Text and trigram of every member of every set; trigrams counted from the rarest among splits."""
    known: dict[str, int] = {}
    words = [[known.setdefault(word, len(known) + 1) for word in _words(text)] for text in texts]
    lengths = np.array([max(3, len(w)) for w in words])
    flat = np.array([i for w in words for i in (w if len(w) >= 3 else [*w, 0, 0, 0][:3])], dtype=np.int64)
    starts = np.arange(len(flat) - 2)
    owner = np.repeat(np.arange(len(texts)), lengths)
    starts = starts[owner[:-2] == owner[2:]]
    doc = owner[starts]
    token = flat[starts]
    for step in (1, 2):  # numbered anew in between: no product is beyond int64
        token = np.unique(token * (len(known) + 1) + flat[starts + step], return_inverse=True)[1]
    n = int(token.max()) + 1
    per_split = [np.bincount(token[split[doc] == s], minlength=n) for s in range(int(split.max()) + 1)]
    pairs = sum(per_split) ** 2 - sum(count**2 for count in per_split)
    rank = np.empty(n, dtype=np.int64)
    rank[np.argsort(pairs, kind="stable")] = np.arange(n)
    both = np.unique(doc * n + rank[token])
    return both // n, both % n


def _signatures(doc: Ints, token: Ints, n: int) -> list[NDArray[np.uint64]]:
    """For each text and kind the parities of how many of its trigrams fall on each bit."""
    found = []
    for kind, words in enumerate(_WORDS):
        hashed = (token.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15 + 2 * kind)
        hashed = (hashed ^ (hashed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        bit = (hashed >> np.uint64(32)).astype(np.int64) % (64 * words)
        signature = np.zeros((n, words), dtype=np.uint64)
        np.bitwise_xor.at(signature, (doc, bit // 64), np.uint64(1) << (bit % 64).astype(np.uint64))
        found.append(signature)
    return found


def _sharing(doc: Ints, token: Ints, doc_2: Ints, token_2: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Pairs of texts that share a token, some at a time; all pairs, if those are fewer. Tokens are sorted."""
    low = np.searchsorted(token_2, token)
    n_pairs = np.searchsorted(token_2, token, side="right") - low
    mine, others = np.unique(doc), np.unique(doc_2)
    if n_pairs.sum() > len(mine) * len(others):
        doc, doc_2 = mine, others
        low, n_pairs = np.zeros_like(mine), np.full(len(mine), len(others))
    ends = np.cumsum(n_pairs)
    for begin in range(0, int(ends[-1]) if len(ends) else 0, _PAIRS):
        pair = np.arange(begin, min(begin + _PAIRS, int(ends[-1])))
        row = np.searchsorted(ends, pair, side="right")
        yield doc[row], doc_2[low[row] + pair - (ends - n_pairs)[row]]


def _alike(
    i: Ints, j: Ints, size: Ints, signatures: list[NDArray[np.uint64]], texts: Sequence[str]
) -> Iterator[tuple[int, int]]:
    for signature in signatures:
        differ = np.bitwise_count(signature[i] ^ signature[j]).sum(1, dtype=np.int64)
        near = 9 * differ <= size[i] + size[j]  # of sets at 4/5, as far apart as they can be
        i, j = i[near], j[near]
    for a, b in sorted({*zip(i.tolist(), j.tolist(), strict=True)}):
        x, y = shingles(texts[a]), shingles(texts[b])
        if len(x & y) >= NEAR_DUPLICATE * len(x | y):
            yield a, b
