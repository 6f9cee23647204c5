"""Seconds of the engine on one GPU, from counts of work and three numbers fitted to the measured runs.

    seconds = FLOP / best measured rate + a · numbers passed between kernels + b · logits + c · chunks scored

The first term is what matrix products must take; the other three are what else a GPU does. Their counts
follow from the shape of the model, so that a wider or deeper model is predicted by what it does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.gpu import HOOKS, PER_SITE, Shape
from mechdiff_mlflow.sites import Hook, Site

RESULTS = Path(__file__).resolve().parents[1] / "results"
CHUNK = 150
"""Prompts a chunk in the measured runs."""

TERMS = ("numbers", "logits", "chunks")


@dataclass(frozen=True, slots=True)
class Work:
    """Counts of what a call does.

    Args:
        flops: Of matrix products.
        numbers: Numbers that a token's passage through a block hands from one kernel to another, over all.
        logits: Numbers in rows of logits.
        chunks: Chunks of prompts with patched runs.
    """

    flops: float
    numbers: float = 0.0
    logits: float = 0.0
    chunks: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    @property
    def counts(self) -> tuple[float, ...]:
        """All four."""
        return (self.flops, self.numbers, self.logits, self.chunks)

    def times(self, factor: float) -> Work:
        """So many of it."""
        return Work(*(factor * count for count in self.counts))


def clean_work(shape: Shape, n: int, tokens: int) -> Work:
    """One clean pass of n prompts."""
    numbers = n * tokens * shape.layers * _handed_on(shape)
    return Work(shape.clean_flops(n, tokens), numbers, n * shape.vocabulary)


def patch_work(shape: Shape, n: int, variants: Sequence[tuple[Site, int]], chunk: int = CHUNK) -> Work:
    """The patched runs alone: for each site so many variants of each of n prompts."""
    rows = n * sum(count for _, count in variants)
    flops = sum(n * count * _variant_flops(shape, site) for site, count in variants)
    passages = sum(n * count * _blocks_passed(shape, site) for site, count in variants)
    return Work(
        flops, passages * _handed_on(shape), rows * shape.vocabulary, math.ceil(n / chunk) if rows else 0
    )


def _handed_on(shape: Shape) -> int:
    """As the engine's memory budget counts a row."""
    return 10 * shape.width + 4 * shape.mlp_width


def _variant_flops(shape: Shape, site: Site) -> float:
    """A row that enters below its block passes that block too."""
    own = shape.attention_numbers + shape.mlp_numbers if site.hook is Hook.RESID_PRE else 0
    return shape.variant_flops(site) + 2.0 * own


def _blocks_passed(shape: Shape, site: Site) -> float:
    own = {Hook.RESID_PRE: 1.0, Hook.ATTN_OUT: 0.5}.get(site.hook, 0.0)
    return shape.layers - 1 - site.layer + own


@dataclass(frozen=True, slots=True)
class Timed:
    """A measured run and what it did."""

    name: str
    work: Work
    seconds: float


@dataclass(frozen=True, slots=True)
class EngineCost:
    """The fitted model.

    Args:
        rate: FLOP/s of the best matrix product.
        seconds_each: Of one of each of `TERMS`.
    """

    rate: float
    seconds_each: tuple[float, ...]

    @classmethod
    def fitted(cls, runs: Sequence[Timed], rate: float) -> EngineCost:
        """The non-negative numbers with the least squared relative errors."""
        matrix = np.array([[count / run.seconds for count in run.work.counts[1:]] for run in runs])
        target = np.array([1 - run.work.flops / rate / run.seconds for run in runs])
        scale = matrix.max(0)  # counts differ by ten orders of magnitude
        found, _ = nnls(matrix / np.where(scale > 0, scale, 1.0), target)
        return cls(rate, tuple((found / np.where(scale > 0, scale, 1.0)).tolist()))

    def seconds(self, work: Work) -> float:
        """What a call takes."""
        extras = zip(self.seconds_each, work.counts[1:], strict=True)
        return work.flops / self.rate + sum(each * count for each, count in extras)

    def error(self, run: Timed) -> float:
        """Predicted over measured, minus 1."""
        return self.seconds(run.work) / run.seconds - 1


def measured_8b(path: Path = RESULTS / "gpu-h100.json") -> tuple[list[Timed], float]:
    """Every timed run of `benchmarks.gpu` without fits, and its best rate of matrix products."""
    tables: list[list[list[Any]]] = json.loads(path.read_text(encoding="utf-8"))
    by_head = {table[0][0]: table[1:] for table in tables}
    rate = 1e12 * max(value for name, value in by_head["ceiling"] if name.startswith("bfloat16"))
    shape, n, tokens = Shape(), 150, 64
    atlas = _atlas_sites(shape)

    def run(name: str, seconds: float, n: int, variants: Sequence[tuple[Site, int]], times: int = 1) -> Timed:
        once = clean_work(shape, n, tokens) + patch_work(shape, n, variants)
        return Timed(name, once.times(times), seconds)

    runs = []
    for name, seconds, *_ in next(rows for head, rows in by_head.items() if head.startswith("task")):
        if name.startswith("capture both models"):
            runs.append(run("capture of two models, 150 prompts", seconds, n, (), times=2))
        elif name.startswith("capture of both models, tuned kept"):
            runs.append(run("capture, the tuned run kept, 150 prompts", seconds, n, (), times=2))
        elif "× 48 variants" in name:
            runs.append(run("L26/attn_out × 48, 150 prompts", seconds, n, [(Site(26, Hook.ATTN_OUT), 48)]))
        elif name.startswith("atlas of what was captured"):
            prompts = int(name.split()[-2])
            patched = patch_work(shape, prompts, atlas)
            runs.append(Timed(f"atlas of what was captured, {prompts} prompts", patched, seconds))
        elif name.startswith(("atlas from nothing", "atlas, ")):  # as they were called before
            prompts = int(name.split()[-2])
            runs.append(run(f"atlas from nothing, {prompts} prompts", seconds, prompts, atlas))
        elif "the clean pass" in name:
            prompts = int(name.split()[-2])
            runs.append(run(f"clean pass, {prompts} prompts", seconds, prompts, ()))
    for prompts, seconds, *_ in by_head["prompts, atlas"]:
        runs.append(run(f"atlas, {prompts} prompts (curve)", seconds, prompts, atlas))
    for head, rows in by_head.items():
        if head.startswith("variants at "):
            site = Site.parse(head.removeprefix("variants at "))
            for count, seconds, *_ in rows:
                if isinstance(count, int):
                    runs.append(run(f"{site} × {count}", seconds, n, [(site, count)]))
                else:
                    runs.append(run(f"clean pass beside {site}", seconds, n, ()))
    for name, seconds, *_ in by_head["model"]:
        layers, vocabulary = (int(name.split()[i].strip(",")) for i in (0, 3))
        runs.append(_atlas_of(Shape(layers=layers, vocabulary=vocabulary), name, seconds, n, tokens))
    return runs, rate


def measured_width(path: Path = RESULTS / "width.json") -> tuple[list[Timed], float]:
    """The runs of `benchmarks.width`, on blocks as wide as a 70B model's, and their best rate."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    (machine,) = [row for row in rows if row["kind"] == "machine"]
    runs = []
    for row in rows:
        if row["kind"] != "engine":
            continue
        wide = row["width"] == 8192
        shape = Shape(row["layers"], row["width"], 28672 if wide else 14336, 64 if wide else 32)
        name = f"{row['layers']} layers of width {row['width']}, {row['tokens']} tokens"
        clean = clean_work(shape, row["n"], row["tokens"])
        runs.append(Timed(f"clean pass, {name}", clean, row["clean_s"]))
        runs.append(_atlas_of(shape, f"atlas, {name}", row["atlas_s"], row["n"], row["tokens"]))
    return runs, float(machine["ceiling_flops"])


def _atlas_sites(shape: Shape) -> list[tuple[Site, int]]:
    return [(Site(layer, hook), PER_SITE) for layer in range(shape.layers) for hook in HOOKS]


def _atlas_of(shape: Shape, name: str, seconds: float, n: int, tokens: int) -> Timed:
    work = clean_work(shape, n, tokens) + patch_work(shape, n, _atlas_sites(shape))
    return Timed(name, work, seconds)
