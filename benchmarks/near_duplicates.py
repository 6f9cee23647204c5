"""How long the search for near duplicates between splits takes, on prompts of several kinds, on one core.

Prompts that share a template, and are told apart by a few words, are the hard case: most pairs share most
trigrams. Ratios are to comparing every pair of prompts of different splits, among `--brute` of each kind.

    python benchmarks/near_duplicates.py --n 50000 --out benchmarks/results/near-duplicates.md
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

from mechdiff_mlflow.spec.duplicates import NEAR_DUPLICATE, near_duplicates, shingles

WORDS = [f"v{i}" for i in range(20_000)]
TEMPLATE = [f"t{i}" for i in range(40)]


def kinds(rng: random.Random) -> dict[str, Callable[[int], list[str]]]:
    """What the i-th prompt of each kind says."""

    def words(n: int) -> list[str]:
        return rng.choices(WORDS, k=n)

    return {
        "5 to 40 words of 20,000": lambda i: words(rng.randint(5, 40)),
        "a template of 40 words about 3 new ones": lambda i: (
            [*TEMPLATE[:20], f"a{i}", f"b{i}", f"c{i}", *TEMPLATE[20:]]
        ),
        "the same about 12 to 20 of 20,000": lambda i: (
            TEMPLATE[:20] + words(rng.randint(12, 20)) + TEMPLATE[20:]
        ),
        "a template of 5 words about two numbers": lambda i: [
            *TEMPLATE[:5],
            str(i // 250),
            "+",
            str(i % 250),
        ],
    }


def brute(texts: list[str], splits: list[int]) -> int:
    """How many pairs there are, each looked at."""
    sets = [shingles(text) for text in texts]
    return sum(
        splits[i] != splits[j] and len(sets[i] & sets[j]) >= NEAR_DUPLICATE * len(sets[i] | sets[j])
        for j in range(len(texts))
        for i in range(j)
    )


def timed(texts: list[str], search: Callable[[list[str], list[int]], int]) -> tuple[float, int]:
    """CPU seconds and pairs found; three fifths of the prompts are train, a fifth each val and test."""
    splits = [min(2, max(0, 5 * i // len(texts) - 2)) for i in range(len(texts))]
    started = time.process_time()
    found = search(texts, splits)
    return time.process_time() - started, found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--brute", type=int, default=2_000)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lines = [
        f"# Near duplicates among {given.n} prompts",
        "",
        f"CPU seconds of one core; ratio to all pairs among {given.brute}, which find as many.",
        "",
        f"| prompts | {given.n // 2} | {given.n} | {given.brute} | all pairs of {given.brute} | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, say in kinds(random.Random(0)).items():
        texts = [" ".join(say(i)) for i in range(given.n)]

        def search(some: list[str], splits: list[int]) -> int:
            return sum(1 for _ in near_duplicates(some, splits))

        (half, _), (whole, _) = (timed(texts[:n], search) for n in (given.n // 2, given.n))
        (fast, found), (slow, expected) = (timed(texts[: given.brute], way) for way in (search, brute))
        assert found == expected, (name, found, expected)
        lines.append(f"| {name} | {half:.1f} | {whole:.1f} | {fast:.2f} | {slow:.1f} | {slow / fast:.0f} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
