"""How often 95 % intervals of a drop cover, and how often a test at 5 % errs: ours against the usual ones.

Run `python -m benchmarks.coverage --out docs/is-my-number-real.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from mechdiff_mlflow.measures.bootstrap import Bootstrap, Floats
from mechdiff_mlflow.measures.stats import drop_pct, p_less_kl

Draw = Callable[[np.random.Generator, int], tuple[Floats, Floats]]
MEAN = math.exp(0.5)
"""Of a lognormal variable with σ = 1."""


def easy(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    raw = rng.lognormal(0, 1, n)
    return raw, raw * rng.lognormal(-1.5, 0.7, n)


def heavy(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    raw = rng.lognormal(0, 2, n)
    return raw, raw * rng.lognormal(-2, 1, n)


def failing(size: float) -> Draw:
    """On 3 % of prompts the map leaves `size` times the KL of the raw patch."""

    def draw(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
        raw = rng.lognormal(0.5, 0.6, n)
        return raw, raw * np.where(rng.random(n) < 0.03, size, rng.lognormal(-3, 0.7, n))

    return draw


def in_tens(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """Ten prompts a group, alike in raw and in what the map leaves."""
    n_groups = n // 10
    raw = np.repeat(rng.lognormal(0, 0.7, n_groups), 10) * rng.lognormal(0, 0.7, n)
    return raw, raw * np.repeat(rng.lognormal(-1.5, 0.6, n_groups), 10) * rng.lognormal(0, 0.3, n)


CASES: dict[str, Draw] = {
    "skewed (lognormal, σ = 1)": easy,
    "heavy tails (σ = 2)": heavy,
    "3 % fail, as bad as raw": failing(1),
    "3 % fail, three times as bad": failing(3),
    "groups of ten": in_tens,
}


def measured(draw: Draw, n: int, n_trials: int, rng: np.random.Generator) -> list[float]:
    """Coverage of a percentile interval and of ours, and the width of ours, in points."""
    raw, mapped = draw(rng, 2_000_000)
    truth = 100 * (1 - mapped.sum() / raw.sum())
    groups = tuple(np.repeat(np.arange(n // 10), 10).tolist()) if draw is in_tens else ()
    bootstrap = Bootstrap(999, groups=groups)
    found = []
    for _ in range(n_trials):
        raw, mapped = draw(rng, n)
        ours = drop_pct(raw, mapped, bootstrap=bootstrap)
        some_raw, some_mapped = bootstrap.means(raw, mapped)
        theirs = bootstrap.percentile(ours.estimate, 100 * (1 - some_mapped / some_raw))
        covered = [one.low is not None and one.low <= truth <= one.high for one in (theirs, ours)]
        found.append([*covered, (ours.high or 0) - (ours.low or 0)])
    means: list[float] = np.mean(found, axis=0).tolist()
    return means


def levels(n: int, n_trials: int, rng: np.random.Generator) -> tuple[float, float]:
    """How often sign flips and our test find a gain at 5 % where a skewed gain is 0 on average."""
    gains = [MEAN - rng.lognormal(0, 1, n) for _ in range(n_trials)]
    signs = rng.choice([-1.0, 1.0], (999, n))
    flips = [(1 + (signs @ gain >= gain.sum()).sum()) / 1000 <= 0.05 for gain in gains]
    ours = [p_less_kl(gain, 0 * gain, bootstrap=Bootstrap(999)) <= 0.05 for gain in gains]
    return float(np.mean(flips)), float(np.mean(ours))


@click.command()
@click.option("--trials", default=1000, show_default=True, help="Samples of each kind and size.")
@click.option("--out", type=click.Path(path_type=Path), help="Page whose table is written.")
def main(trials: int, out: Path | None) -> None:
    rng = np.random.default_rng(0)
    lines = ["| prompts | n | percentile | ours | width, points |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, draw in CASES.items():
        for n in (40, 150, 500):
            theirs, ours, width = measured(draw, n, trials, rng)
            lines.append(f"| {name} | {n} | {theirs:.3f} | {ours:.3f} | {width:.1f} |")
    lines += ["", "| level of a test at 5 %, skewed | sign flips | ours |", "| --- | ---: | ---: |"]
    lines += ["| n = {} | {:.3f} | {:.3f} |".format(n, *levels(n, trials, rng)) for n in (40, 150, 500)]
    print("\n".join(lines))
    if out is not None:
        page = out.read_text(encoding="utf-8")
        before, rest = page.split("<!-- coverage -->\n", 1)
        after = rest.split("<!-- end -->", 1)[1]
        text = "\n".join(lines)
        out.write_text(f"{before}<!-- coverage -->\n{text}\n<!-- end -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
