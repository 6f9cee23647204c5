"""From a sweep and a number of GPU slots to the stages that the simulation runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from benchmarks.scale import sizes
from benchmarks.scale.driver_cost import DriverCost
from benchmarks.scale.engine_cost import EngineCost, clean_work, patch_work
from benchmarks.scale.simulation import Faults, Outcome, Stage, simulate
from benchmarks.scale.sizes import Workload

WEEK_S = 7 * 24 * 3600.0

TASKS_A_SLOT = 4
"""Shards that each slot gets in the mean; more even out, fewer cost less at the barriers."""

READ_RATE = 2e9
"""Bytes a second that a slot reads weights at; assumed, from a fast local disk."""

STORE_RATE = 1e9
"""Bytes a second to and from the artifact store; assumed, 10 Gbit/s Ethernet."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a pair lives.

    Args:
        gpu: What GPUs a slot is made of.
        n_gpus: How many. `device_map` computes one block after another, so a slot is as fast as one GPU.
        sequential: Whether one model is held at a time, so that weights are read again and again.
    """

    gpu: sizes.Gpu
    n_gpus: int
    sequential: bool

    @classmethod
    def of(cls, work: Workload, gpu: sizes.Gpu, *, sequential: bool) -> Placement:
        """The fewest GPUs."""
        return cls(gpu, sizes.gpus_needed(work.shape, gpu, 1 if sequential else 2), sequential)

    def free_bytes(self, work: Workload) -> float:
        """Beside the weights, on one GPU."""
        weights = sizes.weights_bytes(work.shape) * (1 if self.sequential else 2)
        return self.gpu.n_bytes - weights / self.n_gpus

    def load_s(self, work: Workload) -> float:
        """Reading weights: both once; or, one at a time, tuned, base, tuned to check and base, tuned."""
        return (5 if self.sequential else 2) * sizes.weights_bytes(work.shape) / READ_RATE


@dataclass(frozen=True, slots=True)
class Way:
    """How the driver's part is done.

    Args:
        name: For tables.
        fit_on_slots: Whether sites are fitted on the slots' GPUs, dealt out, or on the driver one by one.
        statistics_workers: Processes that do the cells' statistics.
    """

    name: str
    fit_on_slots: bool
    statistics_workers: int


def stages(
    work: Workload, n_slots: int, placement: Placement, way: Way, engine: EngineCost, driver: DriverCost
) -> list[Stage]:
    """What a sweep does between its barriers."""
    n, d, n_sites = work.n_train, work.shape.width, len(work.sites)
    fit = driver.gpu_fit if way.fit_on_slots else driver.cpu_fit
    controls_s = driver.probe.control_builds_per_site * n_sites * driver.controls_s(n, d)
    recording = [
        2 * engine.seconds(clean_work(work.shape, size, work.tokens))
        for size in shards(n_slots, work.n_train)
    ]
    scoring = _scoring(
        *("score test", work, work.n_test, work.test_rows, len(work.alphas)),
        *(n_slots, placement, engine, driver),
    )
    statistics = Stage(
        "statistics", (driver.statistics_s(work.n_test),) * work.n_cells, way.statistics_workers
    )
    return [
        Stage("load", (placement.load_s(work),) * n_slots, n_slots, on_slots=True),
        Stage("record", tuple(recording), n_slots, on_slots=True),
        Stage("fit", (fit.seconds(n, d),) * n_sites, n_slots if way.fit_on_slots else 1, way.fit_on_slots),
        Stage("controls", (controls_s,), 1),
        _scoring("score val", work, work.n_val, work.val_rows, 0, n_slots, placement, engine, driver),
        scoring,
        statistics,
        Stage("track", (tracking_left_s(work, scoring.undisturbed_s + statistics.undisturbed_s, driver),), 1),
    ]


def tracking_s(work: Workload, driver: DriverCost) -> float:
    """One cell's: what was measured with small maps, and its map's bytes, sent and read back."""
    return driver.tracked_ms / 1000 + 2 * sizes.maps_bytes(work) / work.n_cells / STORE_RATE


def tracking_left_s(work: Workload, beside_s: float, driver: DriverCost) -> float:
    """What is left of tracking all cells after so many seconds in which it went on beside.

    Maps are sent from the moment they are fitted, and each run is finished once its statistics are there.
    """
    last_s = tracking_s(work, driver)  # of the last cell; measured, 0.05 s were left of 200 (`sweep-8b.md`)
    return max(work.n_cells * tracking_s(work, driver) - beside_s, last_s)


def shards(n_slots: int, n: int, chunk: int = sizes.MOST.batch_size) -> list[int]:
    """Prompts of each task: whole chunks, dealt as evenly as they go."""
    n_chunks = math.ceil(n / chunk)
    n_tasks = min(n_chunks, TASKS_A_SLOT * n_slots)
    cuts = [round(i * n_chunks / n_tasks) * chunk for i in range(n_tasks + 1)]
    return [min(b, n) - min(a, n) for a, b in itertools.pairwise(cuts)]


def _scoring(
    name: str,
    work: Workload,
    n: int,
    rows: int,
    n_map_sets: int,
    n_slots: int,
    placement: Placement,
    engine: EngineCost,
    driver: DriverCost,
) -> Stage:
    """Patched runs of a split, and a clean run of both models for what they start from."""
    variants = [(site, rows) for site in work.sites]
    chunk = sizes.bounds_beside(work, placement.free_bytes(work), rows * len(work.sites)).batch_size
    seconds = []
    for size in shards(n_slots, n, chunk):
        clean = clean_work(work.shape, size, work.tokens).times(2)
        done = clean + patch_work(work.shape, size, variants, chunk)
        mapping = size * len(work.sites) * mapping_flops(work, n_map_sets) / driver.product_flops
        seconds.append(engine.seconds(done) + mapping)
    return Stage(name, tuple(seconds), n_slots, on_slots=True)


def mapping_flops(work: Workload, n_map_sets: int) -> float:
    """Float64 products on the CPU that make one prompt's replacements at one site.

    Coral, the random rotation and the wrong layer's map; and each scale's maps of every rank.
    """
    d, r = work.shape.width, work.span
    full = 2 * min(2 * d * r, d * d)
    coral = 2 * (d * d if 4 * r >= d else 4 * d * r)
    low = sum(4 * d * k for k in work.ranks if k is not None)
    has_full = None in work.ranks
    return coral + 4 * d * r + full + n_map_sets * (low + has_full * full)


def week(plan: list[Stage], faults: Faults, seed: int = 0) -> tuple[int, list[Outcome]]:
    """Sweeps finished in seven days, the pair kept in memory between them, and all that were begun."""
    outcomes = [simulate(plan, faults, seed)]
    resident = [stage for stage in plan if stage.name != "load"]
    while sum(outcome.makespan_s for outcome in outcomes) <= WEEK_S:
        outcomes.append(simulate(resident, faults, seed + len(outcomes)))
    return len(outcomes) - 1, outcomes


def slot_seconds(plan: list[Stage]) -> float:
    """Work of all slots, one after another, loading apart."""
    return sum(stage.work_s for stage in plan if stage.on_slots and stage.name != "load")
