"""Predict a sweep over all sites of a 70B pair from runs that were measured.

    python -m benchmarks.scale --out benchmarks/results/scale.md

Nobody has made that sweep. The engine's time is

    seconds = FLOP / best measured rate + a · numbers passed between kernels + b · logits + c · chunks scored

with counts that follow from the model's shape and three numbers fitted to the runs of `benchmarks.gpu`; a fit
at one site is a·r·n·d + b·r³ with r = min(n, d). The first table says how well that predicts other runs.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.gpu import HOOKS, PER_SITE, Shape
from mechdiff_mlflow.spec.sites import Hook, Site

RESULTS = Path(__file__).resolve().parent / "results"
LLAMA_70B = Shape(layers=80, width=8192, mlp_width=28672, heads=64)
CHUNK = 150
"""Prompts in a chunk of the measured runs."""
RANKS, ALPHAS, N_CONTROLS = 10, 4, 8


@dataclass(frozen=True, slots=True)
class Work:
    """What a call does: FLOP of matrix products, numbers passed on, logits, chunks of patched runs."""

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


def clean_work(shape: Shape, n: int, tokens: int) -> Work:
    """One clean pass of n prompts."""
    return Work(
        shape.clean_flops(n, tokens), n * tokens * shape.layers * _passed_on(shape), n * shape.vocabulary
    )


def patch_work(shape: Shape, n: int, variants: Sequence[tuple[Site, int]], chunk: int = CHUNK) -> Work:
    """Patched runs alone: at each site so many variants of each of n prompts."""
    rows = n * sum(count for _, count in variants)
    own = {Hook.RESID_PRE: 1.0, Hook.ATTN_OUT: 0.5}  # part of its own block that a row still passes
    blocks = sum(n * c * (shape.layers - 1 - s.layer + own.get(s.hook, 0.0)) for s, c in variants)
    block = 2.0 * (shape.attention_numbers + shape.mlp_numbers)
    flops = sum(n * c * (shape.variant_flops(s) + block * (s.hook is Hook.RESID_PRE)) for s, c in variants)
    return Work(
        flops, blocks * _passed_on(shape), rows * shape.vocabulary, math.ceil(n / chunk) if rows else 0
    )


def _passed_on(shape: Shape) -> int:
    """Numbers of one token that a block hands from kernel to kernel, as the memory budget counts them."""
    return 10 * shape.width + 4 * shape.mlp_width


@dataclass(frozen=True, slots=True)
class Timed:
    """A measured run: its name, what it did, and seconds."""

    name: str
    work: Work
    seconds: float


def _weights(matrix: Any, target: Any) -> tuple[float, ...]:
    """Non-negative least squares; columns may differ by ten orders of magnitude."""
    scale = np.where(matrix.max(0) > 0, matrix.max(0), 1.0)
    found, _ = nnls(matrix / scale, target)
    return tuple((found / scale).tolist())


@dataclass(frozen=True, slots=True)
class EngineCost:
    """FLOP/s of the best matrix product, and seconds for one of each other count."""

    rate: float
    each: tuple[float, ...]

    @classmethod
    def fitted(cls, runs: Sequence[Timed], rate: float) -> EngineCost:
        """The numbers with the least squared relative errors."""
        matrix = np.array([[count / run.seconds for count in run.work.counts[1:]] for run in runs])
        return cls(
            rate, _weights(matrix, np.array([1 - run.work.flops / rate / run.seconds for run in runs]))
        )

    def seconds(self, work: Work) -> float:
        """What a call takes."""
        rest = zip(self.each, work.counts[1:], strict=True)
        return work.flops / self.rate + sum(each * count for each, count in rest)

    def error(self, run: Timed) -> float:
        """Predicted over measured, minus 1."""
        return self.seconds(run.work) / run.seconds - 1


def _atlas(shape: Shape) -> list[tuple[Site, int]]:
    return [(Site(layer, hook), PER_SITE) for layer in range(shape.layers) for hook in HOOKS]


def measured_8b() -> tuple[list[Timed], float]:
    """The atlases and clean passes that `benchmarks.gpu` timed on an H100, and its best rate."""
    tables: list[list[list[Any]]] = json.loads((RESULTS / "gpu-h100.json").read_text(encoding="utf-8"))
    by_head = {table[0][0]: table[1:] for table in tables}
    rate = 1e12 * max(value for name, value in by_head["ceiling"] if name.startswith("bfloat16"))
    shape, tokens = Shape(), 64
    runs = []
    for n, seconds, *_ in by_head["prompts, atlas"]:
        work = clean_work(shape, n, tokens) + patch_work(shape, n, _atlas(shape))
        runs.append(Timed(f"atlas, {n} prompts", work, seconds))
    for head, rows in by_head.items():
        if head.startswith("variants at "):
            site = Site.parse(head.removeprefix("variants at "))
            for count, seconds, *_ in rows:
                variants = [(site, count)] if isinstance(count, int) else []
                work = clean_work(shape, 150, tokens) + patch_work(shape, 150, variants)
                runs.append(Timed(f"{site} × {len(variants) and count}", work, seconds))
    for name, seconds, *_ in by_head["model"]:
        layers, vocabulary = (int(name.split()[i].strip(",")) for i in (0, 3))
        other = Shape(layers=layers, vocabulary=vocabulary)
        work = clean_work(other, 150, tokens) + patch_work(other, 150, _atlas(other))
        runs.append(Timed(f"atlas, {name}", work, seconds))
    return runs, rate


def measured_width() -> tuple[list[Timed], float, dict[str, tuple[float, ...]]]:
    """Blocks as wide as a 70B model's, which `benchmarks.width` timed; their rate; costs of fits."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / "width.json").read_text(encoding="utf-8"))
    (rate,) = [float(row["ceiling_flops"]) for row in rows if row["kind"] == "machine"]
    runs = []
    for row in rows:
        if row["kind"] == "engine" and row["width"] == LLAMA_70B.width:
            shape = Shape(row["layers"], row["width"], LLAMA_70B.mlp_width, LLAMA_70B.heads)
            name = f"{row['layers']} layers of width {row['width']}, {row['tokens']} tokens"
            clean = clean_work(shape, row["n"], row["tokens"])
            runs.append(Timed(f"clean pass, {name}", clean, row["clean_s"]))
            patched = clean + patch_work(shape, row["n"], _atlas(shape))
            runs.append(Timed(f"atlas, {name}", patched, row["atlas_s"]))
    costs = {}
    for device, threads in (("cuda", 0), ("cpu", 16)):
        # From 1.5 rows a dimension on, fits go by way of moments: another algorithm.
        of = [r for r in rows if r["kind"] == "fit" and (r["device"], r["threads"]) == (device, threads)]
        of = [r for r in of if r["n"] < 1.5 * r["width"]]
        took = np.array([r["spectrum_s"] + r["procrustes_scaled_s"] + r["maps_s"] / 2 for r in of])
        terms = np.array([_fit_terms(r["n"], r["width"]) for r in of])
        costs[device] = _weights(terms / took[:, None], np.ones(len(of)))
    return runs, rate, costs


def _fit_terms(n: int, d: int) -> tuple[float, float]:
    r = min(n, d)
    return float(r * n * d), float(r**3)


def statistics_s() -> float:
    """Seconds a cell and prompt of the report's statistics, all on the host, of `benchmarks.sweep_8b`."""
    text = (RESULTS / "sweep-8b.md").read_text(encoding="utf-8")
    (report,) = re.findall(r"\| report on test \| ([\d.]+)", text)
    (cells,) = re.findall(r"; (\d+) cells", text)
    return float(report) / int(cells) / 150


def tracking_ms() -> float:
    """Milliseconds a run through a server on PostgreSQL, of `benchmarks.tracking_cost`."""
    text = (RESULTS / "tracking-cost.md").read_text(encoding="utf-8")
    (ms,) = re.findall(r"\| `mlflow server`, 1 worker, on PostgreSQL \| ours \| (\d+) \|", text)
    return float(ms)


def validation() -> list[tuple[object, ...]]:
    """Rows of runs that were predicted without having been seen."""
    runs, rate = measured_8b()
    rows: list[tuple[object, ...]] = []

    def predict(how: str, unseen: Sequence[Timed], cost: EngineCost) -> None:
        for run in unseen:
            rows.append(
                (run.name, how, run.seconds, cost.seconds(run.work), f"{100 * cost.error(run):+.1f} %")
            )

    large = [run for run in runs if re.match(r"atlas, (200|400|800) prompts$", run.name)]
    predict("≤ 150 prompts", large, EngineCost.fitted([run for run in runs if run not in large], rate))
    middle = [run for run in runs if re.match(r"atlas, (8|16) layers", run.name)]
    predict("4 and 32 layers", middle, EngineCost.fitted([run for run in runs if run not in middle], rate))
    wide, wide_rate, _ = measured_width()
    predict("width 4096", wide, EngineCost(wide_rate, EngineCost.fitted(runs, rate).each))
    return rows


def sweep(n_train: int, tokens: int = 64, n_val: int = 1000, n_test: int = 1000) -> list[tuple[object, ...]]:
    """Hours of each stage of 80 layers × 4 hooks × 10 ranks × 4 α on one slot, and where they come from."""
    runs, rate = measured_8b()
    engine = EngineCost.fitted(runs, rate)
    _, _, fits = measured_width()
    sites = [Site(layer, hook) for layer in range(LLAMA_70B.layers) for hook in Hook]
    controls = 1 + (N_CONTROLS - 1) * ALPHAS  # zero has no scale
    cells = len(sites) * RANKS * ALPHAS

    def score(n: int, variants: int) -> float:
        clean = clean_work(LLAMA_70B, n, tokens)
        work = clean + clean + patch_work(LLAMA_70B, n, [(site, variants) for site in sites], chunk=2)
        return engine.seconds(work)

    record = 2 * engine.seconds(clean_work(LLAMA_70B, n_train, tokens))
    terms = _fit_terms(n_train, LLAMA_70B.width)
    fit = {
        device: len(sites) * sum(a * t for a, t in zip(fits[device], terms, strict=True)) for device in fits
    }
    stages = [
        ("record train", record, "extrapolated from the 8B runs"),
        ("fit on 16 cores (as the code does)", fit["cpu"], "a site of this width was timed"),
        ("fit on one GPU instead", fit["cuda"], "a site of this width was timed"),
        (
            "score val and test",
            score(n_val, 2 + controls) + score(n_test, 2 + RANKS * ALPHAS + controls),
            "extrapolated",
        ),
        (
            "statistics on the host",
            cells * n_test * statistics_s(),
            "extrapolated from 200 cells of 150 prompts",
        ),
        ("track, beside the rest", cells * tracking_ms() / 1000, "extrapolated from 200 cells"),
    ]
    return [(name, f"{seconds / 3600:.2g}", how) for name, seconds, how in stages]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; floats to three digits."""
    lines = [head, ["---"] * len(head), *rows]
    text = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="also write the tables there")
    out = parser.parse_args().out
    text = "\n\n".join(
        (
            f"`python -m benchmarks.scale{f' --out {out}' if out else ''}`",
            "## Runs that were not fitted to",
            table(("run", "predicted from", "measured, s", "predicted, s", "error"), validation()),
            *(
                part
                for n in (2000, 8000)
                for part in (f"## {n} train prompts", table(("stage", "hours", "how known"), sweep(n)))
            ),
        )
    )
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
