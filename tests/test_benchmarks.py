import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import fits, gpu
from mechdiff_mlflow.solvers import SOLVERS


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
