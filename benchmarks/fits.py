"""Every solver × rank × family of one site, against the dense route; time, memory and agreement.

    python -m benchmarks.fits --d 4096 --n 450 --threads 1 --out benchmarks/results/fits-cpu.md

The fast route makes one spectrum and takes every solver, setting, family and rank from it. The dense route
(`dense_reference.py`, d×d matrices) makes one map of rank 32 of each (solver, family) it is asked for: what
it would take for each of the ten ranks is more, and is not counted.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.dense_reference import dense_weight
from mechdiff_mlflow.maps.affine import Family
from mechdiff_mlflow.solvers import SOLVERS, OffSpan, PairedSpectrum, Solution, fit_spectrum

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, None)
DENSE_RANK = 32
T = TypeVar("T")


def site(n: int, d: int, device: str) -> tuple[Tensor, Tensor]:
    """Base rows of falling variance; tuned ones changed in 16 directions, with noise."""
    g = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device="cpu", generator=g)

    x = normal(n, d) * torch.arange(1, d + 1, device="cpu") ** -0.5
    y = x + x @ normal(d, 16) @ normal(16, d) / d**0.5 + 0.01 * normal(n, d)
    return x.to(device), y.to(device)


def variants(solver: str, d: int, device: str) -> list[dict[str, object]]:
    g = torch.Generator("cpu").manual_seed(1)
    rows = torch.randn(64, d, dtype=torch.float64, device="cpu", generator=g).to(device)
    return {
        "reduced_rank": [
            {},
            {"output_metric": "tuned_covariance"},
            {"output_metric": "fisher", "fisher": rows},
        ],
        "logit_subspace": [{"basis": rows}],
    }.get(solver, [{}])


def fast_route(x: Tensor, y: Tensor, device: str) -> tuple[dict[tuple[str, Family], Solution], int]:
    """Solutions by the first setting of each solver, and how many maps were made in all."""
    spectrum, kept, n_maps = PairedSpectrum.from_rows(x, y), {}, 0
    for solver in SOLVERS.values():
        for family in solver.families:
            for settings in variants(solver.name, x.shape[1], device):
                solution = fit_spectrum(solver.name, spectrum, family, **settings)
                ranks = [k for k in RANKS if k is None or k <= x.shape[1]] if solver.ranked else [None]
                for rank in ranks:
                    solution.map(rank)
                n_maps += len(ranks)
                kept.setdefault((solver.name, family), solution)
    return kept, n_maps


def timed(run: Callable[[], T], device: str) -> tuple[T, float]:
    """The result, and seconds: of CPU time on the CPU, of wall time (synchronised) on a GPU."""
    if device == "cpu":
        start = time.process_time()
        return run(), time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def peak_gib(device: str) -> float:
    if device == "cpu":
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return torch.cuda.max_memory_allocated() / 2**30


def compare(n: int, d: int, dense: list[str], device: str) -> list[str]:
    """The report, as lines of markdown; printed as they come."""
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    say(f"## d={d}, N={n}: {where}, torch {torch.__version__}")
    x, y = site(n, d, device)
    fast_route(x, y, device)  # libraries load and GPU kernels compile once
    (solutions, n_maps), fast_s = timed(lambda: fast_route(x, y, device), device)
    kind = "CPU time" if device == "cpu" else "wall time"
    say("")
    say(
        f"Fast route: {n_maps} maps (all solvers and settings, both families, ranks "
        f"{', '.join('full' if k is None else str(k) for k in RANKS)}) in {fast_s:.2f} s of {kind}, "
        f"peak memory {peak_gib(device):.2f} GiB {'(whole process)' if device == 'cpu' else '(GPU)'}."
    )
    wanted = [key for key in solutions if key[0] in dense and SOLVERS[key[0]].ranked]
    if not wanted:
        return lines
    say("")
    say(f"| solver | family | dense route, one map of rank {DENSE_RANK}, s | relative difference |")
    say("| --- | --- | ---: | ---: |")
    total = 0.0
    for solver, family in wanted:
        settings, rule = variants(solver, d, device)[0], str(OffSpan.natural(family))
        weight, dense_s = timed(
            lambda s=solver, f=family, k=settings, r=rule: dense_weight(s, x, y, str(f), DENSE_RANK, r, **k),
            device,
        )
        found = solutions[solver, family].map(DENSE_RANK).dense()
        difference = float(torch.linalg.norm(found - weight) / torch.linalg.norm(weight))
        say(f"| {solver} | {family} | {dense_s:.2f} | {difference:.1e} |")
        total += dense_s
    say("")
    n_pairs = sum(SOLVERS[name].ranked for name, _ in solutions)
    say(
        f"The dense route made {len(wanted)} of those {n_maps} maps, one for each of {len(wanted)} of the "
        f"{n_pairs} pairs of solver and family, in {total:.1f} s of {kind}: {total / fast_s:.0f} times what "
        "the fast route took for all of them. Nothing is extrapolated."
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", type=int, default=4096, help="width of both models")
    parser.add_argument("--n", type=int, default=450, help="number of prompts")
    parser.add_argument(
        "--dense",
        default="all",
        help="solvers to run by the dense route too: all, none, or names with commas (minutes each on a CPU)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "both"), default="both", help="both where there is CUDA"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the report there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = {"all": list(SOLVERS), "none": []}.get(args.dense, args.dense.split(","))
    if unknown := set(names) - set(SOLVERS):
        parser.error(f"unknown solvers {', '.join(sorted(unknown))}; use {', '.join(SOLVERS)}")
    devices = ("cpu", "cuda") if args.device == "both" else (args.device,)
    lines = [f"`python -m benchmarks.fits {' '.join(sys.argv[1:])}`", ""]
    for device in devices:
        if device == "cuda" and not torch.cuda.is_available():
            print("No CUDA here: the GPU is left out.")
            continue
        with torch.device(device):  # where the dense route makes its matrices
            lines += [*compare(args.n, args.d, names, device), ""]
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
