"""The tables of docs/scale.md. Every column says where its numbers come from.

m measured, f fitted to measured runs, x extrapolated beyond them, c counted from shapes, a assumed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.scale import sizes
from benchmarks.scale.driver_cost import DriverCost, FitCost, measured_controls, measured_fits
from benchmarks.scale.engine_cost import (
    RESULTS,
    EngineCost,
    Timed,
    clean_work,
    measured_8b,
    measured_width,
    patch_work,
)
from benchmarks.scale.plan import Placement, Way, slot_seconds, stages, tracking_s, week
from benchmarks.scale.simulation import Faults, Outcome, Stage, simulate
from benchmarks.scale.sizes import GPUS, LLAMA_70B, Workload, with_tokens

SLOTS = (1, 2, 4, 8, 16, 64)
WRAP = 115
DRIVER_BYTES = 1e12
MTBF_HOURS = (24 * 30, 24, 4)
RESTART_S = 60.0
"""Until a lost actor has a process again; assumed. Then it reads its weights."""

ALL_PROMPTS = Workload(LLAMA_70B, n_train=8000)
FEWER = Workload(LLAMA_70B, n_train=2000)


@dataclass(frozen=True)
class Model:
    """Both fitted parts, and what they were fitted to."""

    runs: list[Timed]
    engine: EngineCost
    driver: DriverCost

    @classmethod
    def measured(cls) -> Model:
        """From the result files."""
        runs, rate = measured_8b()
        return cls(runs, EngineCost.fitted(runs, rate), DriverCost.measured())

    @property
    def scatter(self) -> float:
        """Root mean square of the relative errors: how much a task's time varies."""
        return (sum(self.engine.error(run) ** 2 for run in self.runs) / len(self.runs)) ** 0.5

    @property
    def as_it_is(self) -> Way:
        """The driver fits, and does the statistics in one process."""
        return Way("as it is", fit_on_slots=False, statistics_workers=1)

    @property
    def mended(self) -> Way:
        """What this page proposes."""
        return Way("mended", fit_on_slots=True, statistics_workers=self.driver.cpu_threads)

    def plan(self, work: Workload, n_slots: int, way: Way) -> list[Stage]:
        """On slots of 80 GB GPUs with both models resident."""
        at = Placement.of(work, GPUS[0], sequential=False)
        return stages(work, n_slots, at, way, self.engine, self.driver)

    def faults(self, work: Workload, mtbf_hours: float) -> Faults:
        """The measured scatter, and failures so often."""
        load = Placement.of(work, GPUS[0], sequential=False).load_s(work)
        return Faults(self.scatter, mtbf_hours * 3600, RESTART_S + load)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; numbers to three digits."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _percent(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f} %"  # never -0.0


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e12:.2f} TB" if n_bytes >= 1e12 else f"{n_bytes / 1e9:.3g} GB"


def validation(model: Model) -> str:
    """Runs that the model predicts without having seen them."""
    rows: list[Sequence[object]] = []

    def held_out(how: str, wanted: Callable[[Timed], bool]) -> None:
        seen = EngineCost.fitted([run for run in model.runs if not wanted(run)], model.engine.rate)
        rows.extend(_predicted(how, run, seen) for run in model.runs if wanted(run))

    held_out("runs of ≤ 150 prompts", lambda run: _prompts(run) > 150)
    held_out("4 and 32 layers", lambda run: run.name.startswith(("8 layers", "16 layers")))
    wide, rate = measured_width()
    seen = replace(model.engine, rate=rate)
    wide = [run for run in wide if "width 8192" in run.name]
    rows.extend(_predicted("width 4096", run, seen) for run in wide)
    other, other_rate = measured_8b(RESULTS / "gpu-h200.json")
    unlike = replace(model.engine, rate=other_rate)
    left_out = [
        abs(EngineCost.fitted(model.runs[:i] + model.runs[i + 1 :], model.engine.rate).error(run))
        for i, run in enumerate(model.runs)
    ]
    summary = (
        f"Leaving out one of the {len(model.runs)} runs after another, the median error is "
        f"{100 * median(left_out):.1f} %, the worst {100 * max(left_out):.1f} %; the scatter about the fit "
        f"to all, {100 * model.scatter:.1f} %, is what the simulation varies tasks by. Width 8192 was run on "
        f"another H100 and is predicted with the {rate / 1e12:.0f} TFLOP/s of its own products; with the "
        f"{model.engine.rate / 1e12:.0f} of the 8B pair's, which all tables below use, the errors are "
        f"{_range(model.engine, wide)}. Of the {len(other)} runs on an H200 before, with its "
        f"{other_rate / 1e12:.0f} TFLOP/s and all else as on the H100: {_range(unlike, other)}."
    )
    head = ("run", "predicted from", "measured, s (m)", "predicted, s (x)", "error")
    return table(head, rows) + "\n\n" + textwrap.fill(summary, WRAP)


def _range(cost: EngineCost, runs: Sequence[Timed]) -> str:
    errors = [cost.error(run) for run in runs]
    return f"{_percent(min(errors))} to {_percent(max(errors))}"


def _prompts(run: Timed) -> int:
    words = run.name.replace(",", "").split()
    return int(words[words.index("prompts") - 1]) if "prompts" in words else 0


def _predicted(how: str, run: Timed, seen: EngineCost) -> tuple[object, ...]:
    return (run.name, how, run.seconds, seen.seconds(run.work), _percent(seen.error(run)))


def fits(model: Model) -> str:
    """One site's factorisation and fit: measured sizes, then those of the sweep."""
    driver = model.driver
    kinds: tuple[tuple[str, tuple[str, int], FitCost], ...] = (
        ("one GPU", ("cuda", 0), driver.gpu_fit),
        (f"{driver.cpu_threads} threads", ("cpu", driver.cpu_threads), driver.cpu_fit),
        ("1 thread", ("cpu", 1), driver.single_fit),
    )
    runs = measured_fits()
    rows: list[Sequence[object]] = []
    for name, key, cost in kinds:
        for run in sorted((r for r in runs if (r.device, r.threads) == key), key=lambda r: (r.d, r.n)):
            found = cost.seconds(run.n, run.d)
            size = f"{run.n} × {run.d}"
            rows.append((name, size, run.seconds, found, _percent(found / run.seconds - 1)))
        for work in (FEWER, ALL_PROMPTS):
            if not any((r.device, r.threads, r.n, r.d) == (*key, work.n_train, 8192) for r in runs):
                rows.append((name, f"{work.n_train} × 8192", "", cost.seconds(work.n_train, 8192), ""))
    for n, d in measured_controls():
        found = driver.controls_s(n, d)
        seconds = measured_controls()[n, d]
        rows.append(("controls, 16 threads", f"{n} × {d}", seconds, found, _percent(found / seconds - 1)))
    rows.append(("controls, 16 threads", "8000 × 8192", "", driver.controls_s(8000, 8192), ""))
    gpu = [run for run in runs if run.device == "cuda"]
    (largest,) = [run for run in gpu if run.n == ALL_PROMPTS.n_train]
    unseen = FitCost.fitted([run for run in gpu if run is not largest]).seconds(largest.n, largest.d)
    note = (
        f"From the other runs on the GPU, {largest.n} × {largest.d} would take {unseen:.1f} s; it took "
        f"{largest.seconds:.1f} ({_percent(unseen / largest.seconds - 1)})."
    )
    head = ("where", "prompts × width", "measured, s (m)", "model, s (f; x where alone)", "error")
    return table(head, rows) + "\n\n" + note


def pair(model: Model) -> str:
    """Where a pair fits."""
    work = FEWER
    rows: list[Sequence[object]] = []
    for gpu in GPUS:
        for sequential in (False, True):
            at = Placement.of(work, gpu, sequential=sequential)
            columns = work.test_rows * len(work.sites)
            at_once = sizes.bounds_beside(work, at.free_bytes(work), columns)
            few = sizes.bounds_beside(work, at.free_bytes(work), columns // 20)
            rows.append(
                (
                    f"{gpu.name}, {'one model at a time' if sequential else 'both models'}",
                    at.n_gpus,
                    _gb(at.free_bytes(work)),
                    at.load_s(work),
                    f"1/{at.n_gpus}",
                    f"{at_once.batch_size} / {few.batch_size}",
                )
            )
    head = (
        *("slot", "GPUs a slot (c)", "free on each (c)", "loading, s (a)", "of its GPUs at work (c)"),
        "prompts a chunk, 320 sites / 16 sites (c)",
    )
    return table(head, rows)


def n_bytes(model: Model) -> str:
    """What is held, sent and stored."""
    columns = []
    for work in (ALL_PROMPTS, FEWER):
        held = sizes.driver_bytes(work)
        traffic = sizes.traffic_bytes(work, nodes=4)
        columns.append(
            {
                "weights, two models": _gb(2 * sizes.weights_bytes(work.shape)),
                "keys and values kept, a prompt of 64 / 256 tokens": " / ".join(
                    f"{sizes.kept_keys_values(with_tokens(work, t)) / 1e6:.0f} MB" for t in (64, 256)
                ),
                "train rows, both models, 320 sites": _gb(sizes.rows_bytes(work, work.n_train)),
                "the same as second moments": _gb(sizes.moments_bytes(work)),
                "val and test rows": _gb(sizes.rows_bytes(work, work.n_val + work.n_test)),
                "driver: factorisations and factors": _gb(held["factorisations and factors"]),
                "driver: controls, one set a site": _gb(held["controls"]),
                "sites a command with 1 TB on the driver": str(sizes.sites_that_fit(work, DRIVER_BYTES)),
                "object store: recordings to the driver": _gb(traffic["recordings to the driver"]),
                "object store: maps to 4 nodes": _gb(traffic["maps to the nodes"]),
                "the same maps, pickled one by one as views": _gb(sizes.pickled_maps_bytes(work)),
                "object store: scores to the driver": _gb(traffic["scores to the driver"]),
                "journal on disk": _gb(sizes.journal_bytes(work)),
                "a stored map of rank 8 / full": " / ".join(
                    f"{sizes.map_bytes(work.shape.width, k) / 1e6:.3g} MB" for k in (8, work.span)
                ),
                "stored maps, all cells": _gb(sizes.maps_bytes(work)),
            }
        )
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return table(("bytes (c)", "8,000 train prompts", "2,000 train prompts"), rows)


def gpu_work(model: Model) -> str:
    """FLOP and seconds at one GPU's speed."""
    rows: list[Sequence[object]] = []
    for tokens in (64, 256):
        work = with_tokens(ALL_PROMPTS, tokens)
        calls = {
            "clean runs of 10,000 prompts, both models": clean_work(work.shape, 10_000, tokens).times(2),
            "atlas: raw and identity at 320 sites, 1,000 prompts": clean_work(work.shape, 1000, tokens)
            + patch_work(work.shape, 1000, [(s, 2) for s in work.sites], 2),
            f"score val, {work.val_rows} runs a site": clean_work(work.shape, 1000, tokens)
            + patch_work(work.shape, 1000, [(s, work.val_rows) for s in work.sites], 2),
            f"score test, {work.test_rows} runs a site": clean_work(work.shape, 1000, tokens)
            + patch_work(work.shape, 1000, [(s, work.test_rows) for s in work.sites], 2),
        }
        for name, done in calls.items():
            seconds = model.engine.seconds(done)
            share = 100 * done.flops / seconds / model.engine.rate
            rows.append((f"{name}, {tokens} tokens", f"{done.flops:.2e}", seconds, f"{share:.0f} %"))
    return table(("task", "FLOP (c)", "s at one GPU's speed (x)", "of the best rate (x)"), rows)


def makespan(model: Model) -> str:
    """Stages by number of slots."""
    rows: list[Sequence[object]] = []
    for work, way in ways(model):
        for n_slots in SLOTS:
            plan = model.plan(work, n_slots, way)
            found = simulate(plan, Faults(cv=model.scatter))
            rows.append(_makespan_row(work, way, n_slots, plan, found))
    head = (
        *("way, train prompts", "slots", "record", "fit", "controls", "score", "statistics", "track"),
        *("hours in all", "slots' work / slots", "longest"),
    )
    tracked = ", ".join(f"{name} {ms:.0f}" for name, ms in model.driver.run_ms.items())
    all_h = FEWER.n_cells * tracking_s(FEWER, model.driver) / 3600
    note = (
        f"Milliseconds a run (m): {tracked}. Used: {model.driver.tracked_ms:.0f}, and its map's bytes. That "
        f"is {all_h:.2g} hours with 2,000 train prompts; *track* is what is left of it when all is computed."
    )
    return table(head, rows) + "\n\n" + textwrap.fill(note, WRAP)


def ways(model: Model) -> tuple[tuple[Workload, Way], ...]:
    """Sweeps and ways that are set side by side."""
    return tuple((work, way) for way in (model.as_it_is, model.mended) for work in (ALL_PROMPTS, FEWER))


def _makespan_row(
    work: Workload, way: Way, n_slots: int, plan: list[Stage], found: Outcome
) -> tuple[object, ...]:
    hours = {name: seconds / 3600 for name, seconds in found.stage_s.items()}
    hours["score"] = hours.pop("score val") + hours.pop("score test")
    return (
        f"{way.name}, {work.n_train:,}",
        n_slots,
        *(hours[name] for name in ("record", "fit", "controls", "score", "statistics", "track")),
        found.makespan_s / 3600,
        slot_seconds(plan) / n_slots / 3600,
        max(hours, key=lambda name: hours[name]),
    )


def faults(model: Model) -> str:
    """What failures cost the slots' stages."""
    rows: list[Sequence[object]] = []
    work = FEWER
    for n_slots in (8, 64):
        plan = model.plan(work, n_slots, model.mended)
        calm = simulate(plan, Faults(cv=model.scatter)).makespan_s
        for hours in MTBF_HOURS:
            runs = [simulate(plan, model.faults(work, hours), seed) for seed in range(50)]
            spans = sorted(run.makespan_s for run in runs)
            rows.append(
                (
                    n_slots,
                    hours,
                    sum(run.failures for run in runs) / len(runs),
                    sum(run.lost for run in runs) / len(runs),
                    _percent(spans[len(spans) // 2] / calm - 1),
                    _percent(spans[-3] / calm - 1),
                )
            )
    head = (
        *(
            "slots",
            "hours between failures of a slot (a)",
            "failures a sweep",
            "tasks lost",
            "longer, median",
        ),
        "longer, 95 %",
    )
    return table(head, rows)


def mlflow_rows(model: Model) -> str:
    """Rows, files and bytes of one sweep."""
    probe, work = model.driver.probe, FEWER
    rows: list[Sequence[object]] = []
    for name, each in probe.rows_per_cell.items():
        total = each * work.n_cells + probe.rows_per_sweep[name]
        rows.append((f"rows of `{name}`", each, round(total)))
    rows.append(("rows in all", sum(probe.rows_per_cell.values()), round(rows_of(model, work))))
    rows.append(("artifact files", probe.files_per_cell, round(probe.files_per_cell * work.n_cells)))
    rows.append(
        (
            "database (SQLite)",
            f"{probe.database_bytes_per_cell / 1e3:.0f} kB",
            _gb(probe.database_bytes_per_cell * work.n_cells),
        )
    )
    table_bytes = probe.bytes_per_prompt * work.n_test
    rows.append(
        ("per-prompt tables, texts apart", f"{table_bytes / 1e3:.0f} kB", _gb(table_bytes * work.n_cells))
    )
    rows.append(("maps", "", _gb(sizes.maps_bytes(work))))
    return table(("of a sweep of 12,800 cells", "a cell (m)", "in all (x)"), rows)


def rows_of(model: Model, work: Workload) -> float:
    """Of all tables."""
    probe = model.driver.probe
    return sum(each * work.n_cells + probe.rows_per_sweep[name] for name, each in probe.rows_per_cell.items())


def a_week(model: Model) -> str:
    """Sweep after sweep for seven days, slots failing once a day each."""
    rows: list[Sequence[object]] = []
    probe = model.driver.probe
    for work, way in ways(model):
        for n_slots in (1, 64):
            finished, begun = week(model.plan(work, n_slots, way), model.faults(work, 24.0))
            cells = finished * work.n_cells
            rows.append(
                (
                    f"{way.name}, {work.n_train:,}",
                    n_slots,
                    finished,
                    sum(run.lost for run in begun),
                    cells,
                    f"{finished * rows_of(model, work) / 1e6:.3g} M",
                    _gb(cells * probe.database_bytes_per_cell),
                    _gb(finished * sizes.maps_bytes(work)),
                )
            )
    head = ("way, train prompts", "slots", "sweeps", "tasks lost", "runs", "MLflow rows", "database", "maps")
    return table(head, rows)


SECTIONS: dict[str, Callable[[Model], str]] = {
    "validation": validation,
    "fits": fits,
    "pair": pair,
    "bytes": n_bytes,
    "work": gpu_work,
    "makespan": makespan,
    "faults": faults,
    "mlflow": mlflow_rows,
    "week": a_week,
}
