import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import fits, gpu, sweep_8b, tracking_cost
from benchmarks.tracking_cost import FLUENT, OURS, WAYS, Sweep, check
from mechdiff_mlflow.maps.affine import AffineMap, identity_map
from mechdiff_mlflow.solvers import SOLVERS
from mechdiff_mlflow.tracking.content.records import Dataset, RunRecord
from mechdiff_mlflow.tracking.store.store import open_store


def test_fits_compares_every_ranked_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.md"
    monkeypatch.setattr(sys, "argv", ["fits", "--d=96", "--n=40", "--device=cpu", f"--out={out}"])
    fits.main()
    report = out.read_text(encoding="utf-8")
    rows = re.findall(r"\| (\w+) \| (\w+) \| [\d.]+ \| (\S+) \|", report)
    assert {name for name, _, _ in rows} == {row.name for row in SOLVERS.values() if row.ranked}
    assert all(float(difference) < 1e-8 for _, _, difference in rows)
    assert "Nothing is extrapolated" in report


def test_fits_refuses_unknown_solvers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fits", "--dense=svd"])
    with pytest.raises(SystemExit):
        fits.main()
    assert "unknown solvers svd; use procrustes_scaled" in capsys.readouterr().err


@pytest.fixture
def _no_active_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `mlflow.set_experiment` remembers is forgotten."""
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "")
    yield
    mlflow.set_tracking_uri(None)


def _small_sweep() -> Sweep:
    zero = torch.zeros(4, dtype=torch.float64)
    cell = RunRecord(
        kind="patch",
        name="cell",
        params={"layer": 3, "alpha": 0.5, "aligned": True},
        metrics={"KL_raw": 2.0, "drop_pct": 30.0},
        tags={"null": "zero"},
        datasets=(Dataset("toy-test", "test", "d1", 2, "test.jsonl"),),
        tables={"per_prompt.json": pd.DataFrame({"prompt": ["a", "b"], "KL_raw": [1.0, 3.0]})},
        texts={"spec.yaml": "name: toy\n"},
        map=AffineMap(zero, zero, identity_map(4).weight),
    )
    headline = RunRecord(kind="sweep", name="sweep", stepped_metrics={"drop_pct/L3": {1: 20.0, 4: 30.0}})
    return Sweep([replace(cell, name=f"cell {i}") for i in range(2)], headline)


@pytest.mark.usefixtures("_no_active_store")
def test_the_ways_of_tracking_store_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    sweep = _small_sweep()
    for way, log in WAYS.items():
        timing = log(sweep, store, way)
        assert timing.sweep_s(2) == pytest.approx(2 * timing.cell_s + timing.parent_s)
        check(sweep, store, way, way)
    runs = store.client.search_runs([store.experiment(way) for way in WAYS])
    assert len(runs) == 3 * (2 + 1)
    with pytest.raises(SystemExit, match="logged 2 runs of 1"):
        check(replace(sweep, cells=sweep.cells[:1]), store, FLUENT, FLUENT)
    other = replace(sweep.cells[0], metrics={"KL_raw": 2.5})
    with pytest.raises(SystemExit, match="run cell 0 is not what was logged"):
        check(replace(sweep, cells=[other, sweep.cells[1]]), store, OURS, OURS)


def test_wide_maps_have_the_ranks_of_the_narrow_ones() -> None:
    sweep = _small_sweep()
    cells = [replace(c, map=c.map.with_meta(k="2")) for c in sweep.cells if c.map is not None]
    wide = tracking_cost.widened(replace(sweep, cells=cells), 64)
    assert [(cell.map.d_in, cell.map.weight.left.shape[1]) for cell in wide.cells if cell.map] == [
        (64, 2)
    ] * 2


def test_a_whole_sweep_says_what_tracking_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.md"
    words = "--layers=4 --width=32 --vocabulary=300 --tokens=8 --prompts=24,8,8 --ranks=1 --device=cpu"
    monkeypatch.setattr(sys, "argv", ["sweep_8b", *words.split(), f"--out={out}"])
    sweep_8b.main()
    report = out.read_text(encoding="utf-8")
    [all_of_it] = re.findall(r"^\| all \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", report, re.M)
    tracked, *plain = map(float, all_of_it)
    [said] = re.findall(r"\*\*Tracking costs (-?[\d.]+) s", report)
    assert float(said) == pytest.approx(tracked - sum(plain) / 2, abs=0.03)
    assert "8 cells, all found whole" in report


def test_gpu_counts_the_products_of_the_model_that_it_builds() -> None:
    shape = gpu.Shape(layers=2, width=32, mlp_width=48, heads=4, key_heads=2, vocabulary=60)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    block = model.model.layers[0]
    assert shape.attention_numbers == sum(p.numel() for p in block.self_attn.parameters())
    assert shape.mlp_numbers == sum(p.numel() for p in block.mlp.parameters())
    products = 2 * (block.self_attn.parameters, block.mlp.parameters)
    n_block = sum(p.numel() for parameters in products for p in parameters())
    assert shape.clean_flops(3, 5) == 2 * 3 * (5 * n_block + model.lm_head.weight.numel())


def test_gpu_reports_tables_as_text_and_as_numbers(tmp_path: Path) -> None:
    report = gpu.Report()
    report.table("task", "seconds")
    report.row("atlas", 0.123456)
    report.write(tmp_path / "gpu.md")
    assert "| atlas | 0.123 |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "gpu.json").read_text()) == [[["task", "seconds"], ["atlas", 0.123456]]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_says_that_it_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        gpu.main()
