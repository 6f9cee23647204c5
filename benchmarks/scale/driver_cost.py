"""Seconds of what is not the engine: factorisations, maps, controls, statistics and tracking."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.scale.engine_cost import RESULTS
from benchmarks.scale.probe import Probe

PROBED = RESULTS / "scale-probe.json"
TRACKED_SERVER = "tracking cost, `mlflow server`, 1 worker, on PostgreSQL"

PROBED_N = 1000
"""Prompts of the statistics that `probe` times."""


@dataclass(frozen=True, slots=True)
class TimedFit:
    """A site's factorisation, and one solver's factors and maps of ten ranks."""

    device: str
    threads: int
    n: int
    d: int
    seconds: float

    @property
    def terms(self) -> tuple[float, float]:
        """What thin factorisations of n × d are made of, with r = min(n, d)."""
        r = min(self.n, self.d)
        return (float(r * self.n * self.d), float(r**3))


@dataclass(frozen=True, slots=True)
class FitCost:
    """Seconds = a·r·n·d + b·r³, of one device; r = min(n, d)."""

    each: tuple[float, float]

    @classmethod
    def fitted(cls, runs: Sequence[TimedFit]) -> FitCost:
        """The non-negative numbers with the least squared relative errors."""
        matrix = np.array([[term / run.seconds for term in run.terms] for run in runs])
        scale = matrix.max(0)
        found, _ = nnls(matrix / scale, np.ones(len(runs)))
        a, b = (found / scale).tolist()
        return cls((a, b))

    def seconds(self, n: int, d: int) -> float:
        """Of one site."""
        terms = TimedFit("", 0, n, d, 1.0).terms
        return sum(each * term for each, term in zip(self.each, terms, strict=True))


def measured_fits(solver: str = "procrustes_scaled", path: Path = RESULTS / "width.json") -> list[TimedFit]:
    """Those of `benchmarks.width`; of a size timed twice the second, the first warmed up."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    found: dict[tuple[str, int, int, int], TimedFit] = {}
    for row in rows:
        # More rows than that go by way of the moments: another algorithm, which the sweeps here do not reach.
        if row["kind"] == "fit" and row["n"] < 1.5 * row["width"]:
            # The maps were timed for two solvers together.
            seconds = row["spectrum_s"] + row[f"{solver}_s"] + row["maps_s"] / 2
            key = (row["device"], row["threads"], row["n"], row["width"])
            found[key] = TimedFit(*key, seconds)
    return list(found.values())


def measured_controls(threads: int = 16, path: Path = RESULTS / "width.json") -> dict[tuple[int, int], float]:
    """Seconds of building all controls of a site, by prompts and width."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    built = [row for row in rows if row["kind"] == "controls" and row["threads"] == threads]
    return {(row["n"], row["width"]): row["seconds"] for row in built}


@dataclass(frozen=True, slots=True)
class DriverCost:
    """What the driver and the CPUs beside a GPU do.

    Args:
        gpu_fit: Of one site, on one GPU.
        cpu_fit: Of one site, on `cpu_threads` threads together.
        cpu_threads: Of `cpu_fit`.
        single_fit: Of one site, on one thread.
        controls_each: Of r·n·d of one site, all its controls, on all threads; r = min(n, d).
        product_flops: Of float64 products on all threads, FLOP/s.
        probe: Of the statistics.
        run_ms: Of tracking one cell, by store.
    """

    gpu_fit: FitCost
    cpu_fit: FitCost
    cpu_threads: int
    single_fit: FitCost
    controls_each: float
    product_flops: float
    probe: Probe
    run_ms: dict[str, float]

    @classmethod
    def measured(cls) -> DriverCost:
        """From the result files."""
        runs = measured_fits()
        threads = max(run.threads for run in runs)
        by_kind = {
            name: FitCost.fitted([run for run in runs if (run.device, run.threads) == key])
            for name, key in (("gpu", ("cuda", 0)), ("cpu", ("cpu", threads)), ("single", ("cpu", 1)))
        }
        rows: list[dict[str, Any]] = json.loads((RESULTS / "width.json").read_text(encoding="utf-8"))
        product = max(row["flops"] for row in rows if row["kind"] == "product")
        # The larger of the sizes, which is the sweep's own.
        (n, d), seconds = max(measured_controls(threads).items())
        each = seconds / (n**2 * d)
        probe = Probe.load_from(PROBED)
        return cls(
            by_kind["gpu"],
            by_kind["cpu"],
            threads,
            by_kind["single"],
            each,
            product,
            probe,
            tracking_ms(),
        )

    @property
    def tracked_ms(self) -> float:
        """A run's share of the time of one command's writers, to a server on PostgreSQL."""
        return self.run_ms[TRACKED_SERVER]

    def controls_s(self, n: int, d: int) -> float:
        """One site's controls on all threads: their products and the QR grow as r·n·d."""
        return self.controls_each * min(n, d) * n * d

    def statistics_s(self, n_test: int) -> float:
        """One cell's on one thread, in proportion to its prompts."""
        return self.probe.statistics_s * n_test / PROBED_N


def tracking_ms(folder: Path = RESULTS) -> dict[str, float]:
    """Milliseconds a run by store: a team's server, and those of `benchmarks.tracking_cost`."""
    found = {}
    text = (folder / "team-server.md").read_text(encoding="utf-8")
    # | auth_cache_ttl_seconds | people at once | ms a run of one person | runs a second in all |
    for people, rate in re.findall(r"\| 60 \| (\d+) \| \d+ \| ([\d.]+) \|", text):
        found[f"a team's server, {people} at once"] = 1000 / float(rate)
    # | store | way | ms a cell | …
    text = (folder / "tracking-cost.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ours \| (\d+) \|", text, re.MULTILINE)
    return found | {f"tracking cost, {store}": float(ms) for store, ms in rows}
