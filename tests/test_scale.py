"""The model of a 70B sweep: counts by hand and of real tensors, closed forms, and runs it did not see."""

from __future__ import annotations

import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import Shape
from benchmarks.scale import report, sizes
from benchmarks.scale.__main__ import filled
from benchmarks.scale.driver_cost import PROBED, FitCost, TimedFit
from benchmarks.scale.engine_cost import EngineCost, Timed, Work, clean_work, measured_8b, patch_work
from benchmarks.scale.plan import (
    Placement,
    Way,
    shards,
    stages,
    tracking_left_s,
    tracking_s,
    week,
)
from benchmarks.scale.probe import Probe, tracked_sweeps
from benchmarks.scale.simulation import Faults, Stage, simulate
from benchmarks.scale.sizes import LLAMA_8B, LLAMA_70B, Workload
from mechdiff_mlflow.controls import control_map
from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.maps import AffineMap, Weight
from mechdiff_mlflow.pairs import load_pair
from mechdiff_mlflow.sites import Hook, Site
from mechdiff_mlflow.solvers import PairedSpectrum, fit_spectrum
from mechdiff_mlflow.spec import Alpha, Cell, PairSpec, Rank

ROOT = Path(__file__).parents[1]
SMALL = Shape(layers=2, width=8, mlp_width=16, heads=2, key_heads=1, vocabulary=10)


def test_counts_of_a_small_model_are_those_of_a_hand_calculation() -> None:
    # A block has 8·4·(2·2 + 2·1) + 3·8·16 = 192 + 384 weights; it hands on 10·8 + 4·16 = 144 numbers a token.
    clean = clean_work(SMALL, 3, 5)
    assert clean == Work(2 * 3 * (5 * 2 * 576 + 80), 3 * 5 * 2 * 144, 3 * 10, 0)
    # attn_out of block 0: the MLP of its own block (half of it), the block above, a row of logits.
    assert patch_work(SMALL, 3, [(Site(0, Hook.ATTN_OUT), 4)], chunk=2) == Work(
        12 * 2 * (576 + 384 + 80), 12 * 1.5 * 144, 12 * 10, 2
    )
    # What enters block 1 passes it; what leaves it, and what its MLP adds, pass nothing.
    flops = {hook: patch_work(SMALL, 1, [(Site(1, hook), 1)]).flops for hook in Hook}
    assert flops[Hook.RESID_PRE] == 2 * (576 + 80)
    assert flops[Hook.RESID_POST] == flops[Hook.MLP_OUT] == 2 * 80


def test_a_fit_finds_the_numbers_that_made_the_runs() -> None:
    truth = EngineCost(1e12, (2e-9, 3e-8, 0.5))
    works = [
        clean_work(SMALL, n, tokens) + patch_work(SMALL, n, [(Site(0, Hook.RESID_PRE), v)], chunk=n)
        for n in (1, 7)
        for tokens in (3, 50)
        for v in (0, 2, 90)
    ]
    found = EngineCost.fitted([Timed("", work, truth.seconds(work)) for work in works], truth.rate)
    assert found.seconds_each == pytest.approx(truth.seconds_each)
    truth_of_fits = FitCost((1e-9, 3e-9))
    sizes_of = [(10, 50), (40, 50), (90, 50)]
    fits = [TimedFit("cpu", 1, n, d, truth_of_fits.seconds(n, d)) for n, d in sizes_of]
    assert FitCost.fitted(fits).each == pytest.approx(truth_of_fits.each)


def test_more_of_anything_takes_longer() -> None:
    runs, rate = measured_8b()
    engine = EngineCost.fitted(runs, rate)

    def seconds(shape: Shape = LLAMA_8B, n: int = 100, tokens: int = 64, variants: int = 4) -> float:
        site = Site(1, Hook.RESID_POST)
        return engine.seconds(clean_work(shape, n, tokens) + patch_work(shape, n, [(site, variants)]))

    base = seconds()
    for more in (
        seconds(n=101),
        seconds(tokens=65),
        seconds(variants=5),
        seconds(replace(LLAMA_8B, layers=33)),
        seconds(replace(LLAMA_8B, width=4224)),
        seconds(replace(LLAMA_8B, vocabulary=130000)),
    ):
        assert more > base


def test_runs_that_the_model_has_not_seen_are_predicted_within_a_tenth() -> None:
    table = report.validation(report.Model.measured())
    errors = [float(text) for text in re.findall(r"\| ([+-][\d.]+) % \|", table)]
    assert len(errors) == 19
    assert max(map(abs, errors)) < 10


@pytest.mark.parametrize(("n", "d", "rank"), [(12, 64, 3), (50, 64, None), (12, 64, None)])
def test_bytes_of_a_stored_map_are_those_of_its_file(n: int, d: int, rank: int | None) -> None:
    torch.manual_seed(0)
    spectrum = PairedSpectrum.from_rows(torch.randn(n, d), torch.randn(n, d))
    made = fit_spectrum("procrustes_scaled", spectrum, "update").map(rank)
    overhead = len(AffineMap(torch.zeros(1), torch.zeros(1), Weight.from_dense(torch.zeros(1, 1))).to_bytes())
    stored = len(made.to_bytes())
    expected = sizes.map_bytes(d, rank or n - 1)
    assert expected < stored < expected + 2 * overhead


def test_a_pickled_map_of_low_rank_carries_the_factors_of_every_rank() -> None:
    torch.manual_seed(0)
    n, d = 40, 256
    solution = fit_spectrum(
        "procrustes_scaled", PairedSpectrum.from_rows(torch.randn(n, d), torch.randn(n, d))
    )
    low, full = (len(pickle.dumps(solution.map(k))) for k in (1, None))
    work = Workload(replace(SMALL, layers=1, width=d), n, ranks=(1,), alphas=(1.0,), hooks=(Hook.ATTN_OUT,))
    assert low == pytest.approx(full, rel=0.1)
    assert low == pytest.approx(sizes.pickled_maps_bytes(work), rel=0.2)


@pytest.mark.parametrize("n", [10, 40])
def test_bytes_of_factors_and_controls_are_those_of_their_tensors(n: int) -> None:
    d = 64
    torch.manual_seed(0)
    spectrum = PairedSpectrum.from_rows(torch.randn(n, d), torch.randn(n, d))
    factors = fit_spectrum("procrustes_scaled", spectrum, "update").factors
    work = Workload(replace(SMALL, width=d), n_train=n)
    parts = (spectrum.vx, spectrum.vy, spectrum.ux, spectrum.uy, spectrum.cross, factors.left, factors.right)
    assert sizes.factors_bytes(work) == sum(part.nbytes for part in parts if part is not None)
    coral = control_map("coral", spectrum).weight
    rotation = control_map("random_orthogonal", spectrum).weight
    own = [coral.left, coral.right, rotation.right]  # the rotation's left factor is the spectrum's
    assert sizes.controls_bytes(work) == sum(part.nbytes for part in own if part is not None)


def test_rows_of_a_site_are_those_that_a_study_scores(toy: Path) -> None:
    study = Study(load_pair(PairSpec.load(str(toy))), Protocol())
    site, alphas = Site(3, Hook.RESID_POST), (0.5, 0.7, 1.0)
    cells = [
        Cell(site, "procrustes_scaled", "update", Rank(k), Alpha((alpha,)))
        for k in (1, 4)
        for alpha in alphas
    ]
    study.patch([fit.to_patch for fit in study.fit(cells)])
    work = Workload(SMALL, n_train=40, ranks=(1, 4), alphas=alphas)
    assert work.val_rows == len(study._rows["val"][site].patched)
    scored = len(study._rows["test"][site].patched)
    assert 2 + len(cells) < scored <= work.test_rows


def test_a_70b_model_has_the_weights_and_needs_the_gpus_that_it_is_known_for() -> None:
    assert sizes.weights_bytes(LLAMA_70B) == pytest.approx(141e9, rel=0.01)
    assert sizes.weights_bytes(LLAMA_8B) == pytest.approx(16e9, rel=0.01)
    needed = {
        (gpu.name, models): sizes.gpus_needed(LLAMA_70B, gpu, models)
        for gpu in sizes.GPUS
        for models in (1, 2)
    }
    assert needed == {("80 GB", 1): 2, ("80 GB", 2): 4, ("141 GB", 1): 1, ("141 GB", 2): 2}
    # Sxx, Syy and Sxy are smaller than bfloat16 rows from six prompts a dimension on.
    d = LLAMA_70B.width
    for n in (6 * d - 1, 6 * d + 1):
        work = Workload(LLAMA_70B, n_train=n)
        smaller = min(sizes.rows_bytes(work, n), sizes.moments_bytes(work))
        assert sizes.train_bytes(work) == smaller


def test_without_variation_and_failures_the_simulation_is_the_closed_form() -> None:
    for tasks, workers in ((1, 1), (7, 3), (12, 4), (3, 8)):
        stage = Stage("work", (2.5,) * tasks, workers, on_slots=True)
        found = simulate([stage, Stage("write", (1.0,) * 5, 2)])
        assert found.stage_s["work"] == stage.undisturbed_s == 2.5 * math.ceil(tasks / workers)
        assert found.makespan_s == stage.undisturbed_s + 3.0
        assert (found.lost, found.failures, found.slot_busy_s) == (0, 0, 2.5 * tasks)


def test_every_task_is_done_once_whatever_fails() -> None:
    stage = Stage("work", tuple(50.0 + i for i in range(40)), 4, on_slots=True)
    calm = simulate([stage])
    lost = 0
    for seed in range(30):
        found = simulate([stage], Faults(mtbf_s=200.0, reload_s=30.0), seed)
        assert found.done == {"work": 40}
        assert found.slot_busy_s == pytest.approx(stage.work_s)
        assert found.makespan_s >= calm.makespan_s - 100  # another order may end more evenly
        assert found.failures >= found.lost
        lost += found.lost
    assert lost > 100
    assert simulate([stage], Faults(cv=0.1, mtbf_s=200.0), 3) == simulate(
        [stage], Faults(cv=0.1, mtbf_s=200.0), 3
    )


def test_a_task_that_is_repeated_until_it_survives_takes_what_theory_says() -> None:
    """E[T] = (1/λ + R)·(e^{λs} − 1) for Poisson failures; Daly (2006), A higher order estimate."""
    mtbf, reload_s, task = 100.0, 20.0, 80.0
    stage = Stage("work", (task,), 1, on_slots=True)
    found = [
        simulate([stage], Faults(mtbf_s=mtbf, reload_s=reload_s), seed).makespan_s for seed in range(3000)
    ]
    expected = (mtbf + reload_s) * math.expm1(task / mtbf)
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.08)


def test_variation_keeps_the_mean() -> None:
    stage = Stage("work", (1.0,) * 4000, 1, on_slots=True)
    assert simulate([stage], Faults(cv=0.3)).makespan_s == pytest.approx(4000, rel=0.02)


def test_tasks_that_no_slot_lives_through_are_refused() -> None:
    with pytest.raises(ValueError, match="make shards smaller"):
        simulate([Stage("work", (1000.0,), 1, on_slots=True)], Faults(mtbf_s=100.0))


def test_shards_are_whole_chunks_of_all_prompts() -> None:
    for n_slots in (1, 3, 64, 1000):
        found = shards(n_slots, 10_000)
        assert sum(found) == 10_000
        assert len(found) == min(4 * n_slots, math.ceil(10_000 / 32))
        assert all(size % 32 == 0 for size in found[:-1])


def test_slots_shorten_what_they_do_and_the_driver_is_what_is_left() -> None:
    model = report.Model.measured()
    at = Placement.of(report.FEWER, sizes.GPUS[0], sequential=False)
    way = Way("all on the driver", fit_on_slots=False, statistics_workers=1)
    spans, on_slots = [], []
    for n_slots in report.SLOTS:
        plan = stages(report.FEWER, n_slots, at, way, model.engine, model.driver)
        spans.append(simulate(plan).makespan_s)
        on_slots.append(sum(stage.work_s for stage in plan if stage.on_slots and stage.name != "load"))
    assert spans == sorted(spans, reverse=True)
    assert on_slots == pytest.approx([on_slots[0]] * len(on_slots), rel=0.05)
    driver = sum(stage.undisturbed_s for stage in plan if not stage.on_slots)
    assert spans[-1] > driver > 0.9 * spans[-1]


def test_what_is_written_while_cells_are_computed_is_not_waited_for_again() -> None:
    driver, work = report.Model.measured().driver, report.FEWER
    alone = tracking_left_s(work, 0.0, driver)
    assert alone == pytest.approx(work.n_cells * tracking_s(work, driver))
    assert tracking_left_s(work, alone / 2, driver) == pytest.approx(alone / 2)
    # The last run is written after all statistics, however long they take.
    last = tracking_s(work, driver)
    assert tracking_left_s(work, 10 * alone, driver) == pytest.approx(last)
    assert 0 < last < alone / 4


def test_a_week_ends_with_the_week() -> None:
    plan = [Stage("load", (3600.0,), 1, on_slots=True), Stage("work", (3600.0,) * 10, 1, on_slots=True)]
    finished, begun = week(plan, Faults())
    assert finished == 16  # one hour of loading, then ten hours each
    assert sum(run.makespan_s for run in begun) > 7 * 24 * 3600


@pytest.mark.slow
def test_a_cell_leaves_in_mlflow_what_the_committed_probe_says(tmp_path: Path) -> None:
    found, committed = tracked_sweeps(tmp_path), Probe.load_from(PROBED)
    now, then = (sum(rows.values()) for rows in (found["rows_per_cell"], committed.rows_per_cell))
    assert now == pytest.approx(then, rel=0.2), "run python -m benchmarks.scale --probe again"
    assert found["files_per_cell"] == pytest.approx(committed.files_per_cell, rel=0.2)
    assert found["control_builds_per_site"] == committed.control_builds_per_site == 1
    assert committed.rows_per_cell["runs"] == committed.rows_per_cell["logged_models"] == 1


def test_the_page_shows_the_tables_of_the_result_file() -> None:
    result = (ROOT / "benchmarks" / "results" / "scale.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"## (\w+)\n\n(.*?)\n(?=\n## |\Z)", result, re.DOTALL))
    assert blocks.keys() == report.SECTIONS.keys()
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- scale: (\w+) -->", page)) == blocks.keys()
    assert filled(page, {name: text.rstrip("\n") for name, text in blocks.items()}) == page


def test_the_result_file_is_what_the_model_says_today() -> None:
    result = (ROOT / "benchmarks" / "results" / "scale.md").read_text(encoding="utf-8")
    model = report.Model.measured()
    for name in ("validation", "fits", "pair", "bytes", "work", "mlflow"):
        assert report.SECTIONS[name](model) in result, f"{name}: run python -m benchmarks.scale again"
