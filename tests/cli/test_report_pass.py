"""The report pass: winners by alias, each with the α of its version."""

from __future__ import annotations

from pathlib import Path

import mlflow
from cli.conftest import Invoke
from cli.test_run import SITE, runs_of


def test_every_winner_is_measured_again_with_its_own_alpha(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("run", "--pair", str(toy), *SITE, "--alpha", "0.5", "--promote", "--force")
    mechdiff(
        "run",
        "--pair",
        str(toy),
        "--layer",
        "2",
        "--hook",
        "attn_out",
        "--alpha",
        "0.25",
        "--promote",
        "--force",
    )
    before = {run.info.run_id for run in runs_of(client)["patch"]}

    shown = mechdiff("report-pass", "--pair", str(toy)).output
    assert "40 test prompts (of the 500 aimed at)" in shown
    (parent,) = runs_of(client)["report_pass"]
    again = [run for run in runs_of(client)["patch"] if run.info.run_id not in before]
    assert {run.data.tags["mlflow.parentRunId"] for run in again} == {parent.info.run_id}
    assert {run.data.params["hook"]: float(run.data.params["alpha"]) for run in again} == {
        "resid_post": 0.5,
        "attn_out": 0.25,
    }
    for run in again:
        first = next(
            r
            for r in runs_of(client)["patch"]
            if r.info.run_id in before and r.data.params["hook"] == run.data.params["hook"]
        )
        for key in ("KL_raw", "KL_mapped", "drop_pct"):
            assert run.data.metrics[key] == first.data.metrics[key]
    mechdiff("report", "--pair", str(toy))
    assert "picked on the reported split" not in (here / "mechdiff-report.md").read_text()


def test_no_winner_and_too_many_prompts(toy: Path, mechdiff: Invoke) -> None:
    assert (
        "No map of pair 'toy' has the alias 'best'"
        in mechdiff("report-pass", "--pair", str(toy), "--alias", "best", code=1).output
    )
    mechdiff("run", "--pair", str(toy), *SITE, "--alpha", "1", "--promote", "--force")
    shown = mechdiff("report-pass", "--pair", str(toy), "--n", "41", code=1).output
    assert "41 test prompts were asked for and there are 40" in shown
