"""Measure at the width of a 70B model what docs/scale.md would else extrapolate from an 8B one.

    python -m benchmarks.width --out benchmarks/results/width.json

A 70B model does not fit on one GPU, some of its blocks do. On one GPU, random weights, bfloat16: the clean
pass and the atlas of few blocks of both widths, at 64 and 256 tokens a prompt, and the best matrix product of
the same minute. In float64, on the CPU with several numbers of threads and on the GPU: the factorisation of
a site, two fits, their maps of ten ranks, its controls, and the product that applies a dense map. Fits that
are not reached within `--limit` seconds are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.fits import RANKS, site
from benchmarks.gpu import HOOKS, PER_SITE, Shape, noisy, prompts_of, seconds
from mechdiff_mlflow.engine import PatchEngine
from mechdiff_mlflow.solvers import PairedSpectrum, controls, fit_spectrum
from mechdiff_mlflow.spec.sites import Site

SHAPES = ((8, 4096, 14336, 32), (4, 8192, 28672, 64), (8, 8192, 28672, 64))
"""Layers, width, MLP and heads: an 8B model's blocks, then a 70B one's."""

PROMPTS = ((150, 64), (38, 256))
SOLVERS = ("procrustes_scaled", "reduced_rank")
FITS = (
    *(("cuda", 0, n, d) for n, d in ((450, 4096), (450, 4096), (1000, 8192), (2000, 8192), (4000, 4096))),
    *(("cpu", 16, n, d) for n, d in ((450, 4096), (1000, 4096), (2000, 8192))),
    *(("cpu", threads, n, 4096) for threads in (4, 1) for n in (450, 1000)),
    *(("cpu", 16, n, d) for n, d in ((1000, 8192), (4000, 4096))),
    *(("cuda", 0, n, 8192) for n in (8000, 12288)),
)
"""Device, threads, prompts, width; the first on the GPU is a warm-up, the last goes by way of the moments."""

CONTROLS = ((16, 1000, 4096), (1, 1000, 4096), (16, 2000, 8192), (4, 1000, 4096))
"""Threads, prompts, width."""


def engine_rows(keep: Callable[..., None]) -> None:
    for layers, width, mlp, heads in SHAPES:
        shape = Shape(layers, width, mlp, heads)
        engine = PatchEngine(shape.model(0), batch_size=150, max_rows=38400, head_rows=8192)
        sites = [Site(layer, hook) for layer in range(layers) for hook in HOOKS]
        groups = [noisy(at, PER_SITE) for at in sites]
        for n, tokens in PROMPTS:
            prompts = prompts_of(n, tokens, shape.vocabulary)
            clean = seconds(lambda e=engine, p=prompts: e.capture(p, [], device="cuda"), 5)
            atlas = seconds(lambda e=engine, p=prompts, g=groups: e.score(p, g), 5)
            keep("engine", layers=layers, width=width, n=n, tokens=tokens, clean_s=clean, atlas_s=atlas)
        del engine
        torch.cuda.empty_cache()


def fit_row(device: str, threads: int, n: int, d: int) -> dict[str, float]:
    x, y = site(n, d, device)
    marks = [time.perf_counter()]

    def mark() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    spectrum = PairedSpectrum.from_rows(x, y)
    mark()
    solutions = []
    for solver in SOLVERS:
        solutions.append(fit_spectrum(solver, spectrum, "update"))
        mark()
    for solution in solutions:
        for rank in RANKS:
            solution.map(rank)
    mark()
    names = ("spectrum_s", *(f"{solver}_s" for solver in SOLVERS), "maps_s")
    return dict(zip(names, (b - a for a, b in itertools.pairwise(marks)), strict=True))


def controls_s(n: int, d: int) -> float:
    """Median of three, of all controls of a site."""
    spectrum = PairedSpectrum.from_rows(*site(n, d, "cpu"))
    other = fit_spectrum("procrustes_scaled", spectrum, "update").map()
    names = controls.applicable_controls(spectrum, other=other)
    found = []
    for _ in range(3):
        begun = time.perf_counter()
        for name in names:
            controls.control_map(name, spectrum, other=other)
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=float, default=1200, help="seconds after which no size is begun")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("Error: there is no CUDA device here; run this on a machine with one.")
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    rows: list[dict[str, object]] = []

    def keep(kind: str, **values: object) -> None:
        rows.append({"kind": kind, **values})
        print(json.dumps(rows[-1]), flush=True)

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 * 20 / seconds(lambda: [a @ b for _ in range(20)], 5)
    where = f"{torch.cuda.get_device_name()}, {platform.machine()}, torch {torch.__version__}"
    keep("machine", gpu=where, ceiling_flops=rate)
    engine_rows(keep)
    for device, threads, n, d in FITS:
        if time.perf_counter() - started > args.limit:
            break
        torch.set_num_threads(threads or 16)
        keep("fit", device=device, threads=threads, n=n, width=d, **fit_row(device, threads, n, d))
    for threads, n, d in CONTROLS:
        torch.set_num_threads(threads)
        keep("controls", threads=threads, n=n, width=d, seconds=controls_s(n, d))
    for threads in (16, 4, 1):
        torch.set_num_threads(threads)
        x, w = (torch.randn(s, 4096, dtype=torch.float64) for s in (1000, 4096))
        begun = time.perf_counter()
        x @ w
        keep("product", threads=threads, flops=2 * 1000 * 4096**2 / (time.perf_counter() - begun))
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
