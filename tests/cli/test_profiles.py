"""Layers and heads on the toy pair."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import toy as toys
from cli.conftest import Invoke
from cli.test_run import SITE, artifacts, runs_of
from mlflow.entities import Run


def table(client: mlflow.MlflowClient, run: Run, name: str) -> pd.DataFrame:
    return pd.DataFrame(**json.loads(Path(client.download_artifacts(run.info.run_id, name)).read_text()))


def test_layers(toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    shown = mechdiff("layers", "--pair", str(toy)).output
    (run,) = runs_of(client)["layers"]
    found = table(client, run, "layers.json")
    assert list(found["layer"]) == list(range(toys.N_LAYERS))
    same = found["layer"] < toys.FIRST_CHANGED
    for direction in ("tuned_from_base", "base_from_tuned"):
        assert (found.loc[same, f"KL_{direction}"] == 0).all()
        assert (found.loc[~same, f"KL_{direction}"] > 10 * found.loc[~same, f"floor_{direction}"]).all()
    assert found.loc[same, "cka"].tolist() == pytest.approx([1.0] * toys.FIRST_CHANGED, abs=1e-9)
    assert (found.loc[~same, "cka"] < 0.999).all()
    assert "first changes the next token's distribution after layer 2" in shown
    assert {"layers.json", "figures.html", "figures"} <= artifacts(client, run)

    # One direction is the raw patch of the main job.
    mechdiff("run", "--pair", str(toy), *SITE, "--alpha", "1")
    (patch,) = runs_of(client)["patch"]
    assert found["KL_tuned_from_base"][3] == pytest.approx(patch.data.metrics["KL_raw"], rel=1e-6)
    # The other is what a pair the other way round measures.
    swapped = toy.with_name("swapped.yaml")
    text = toy.read_text().replace("name: toy", "name: swapped").replace("model: base", "model: b")
    swapped.write_text(text.replace("model: tuned", "model: base").replace("model: b}", "model: tuned}", 1))
    mechdiff("run", "--pair", str(swapped), *SITE, "--alpha", "1")
    (patch,) = runs_of(client, "swapped")["patch"]
    assert found["KL_base_from_tuned"][3] == pytest.approx(patch.data.metrics["KL_raw"], rel=1e-6)
    mechdiff("report", "--pair", str(toy))
    assert "## Layers" in (here / "mechdiff-report.md").read_text()


def test_heads(toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    shown = mechdiff("heads", "--pair", str(toy), "--layer", "3", "--n-random", "4").output
    (run,) = runs_of(client)["heads"]
    found = table(client, run, "heads.json")
    assert list(found["choice"]) == ["single"] * 2 + ["greedy"] * 2 + ["random"] * 2
    greedy = found[found["choice"] == "greedy"].set_index("size")
    assert greedy.loc[2, "coverage"] == 1
    single = found[found["choice"] == "single"].set_index("heads")
    assert greedy.loc[1, "KL"] == single.loc[greedy.loc[1, "heads"], "KL"]
    assert (found["coverage"] - found["KL"] / found["KL_all"]).abs().max() < 1e-9
    assert "It takes all 2 heads" in shown or "Heads " in shown
    curve = client.get_metric_history(run.info.run_id, "coverage/greedy")
    assert {p.step: p.value for p in curve} == greedy["coverage"].to_dict()
    mechdiff("run", "--pair", str(toy), *SITE, "--alpha", "1")
    mechdiff("report", "--pair", str(toy))
    assert "Replacing all heads at `L3/attn_out`" in (here / "mechdiff-report.md").read_text()


def test_heads_where_nothing_differs(toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    assert "no further than noise" in mechdiff("heads", "--pair", str(toy), "--layer", "0", code=1).output
    assert runs_of(client)["heads"][0].info.status == "FAILED"
