"""Two pairs compared by their runs."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from cli.conftest import Invoke
from cli.test_report import tables
from cli.test_run import runs_of

from mechdiff_mlflow.measures import stats
from mechdiff_mlflow.measures.bootstrap import Bootstrap
from mechdiff_mlflow.report.comparison import matches
from mechdiff_mlflow.tracking.commands.documents import evidence_of
from mechdiff_mlflow.tracking.runs.results import tables_of
from mechdiff_mlflow.tracking.store.store import open_store

SWEEP = ("--sites", "L2/attn_out:0.7,L3/resid_post:1", "--ranks", "2,full", "--targets", "10")


@pytest.fixture
def twin(toy: Path) -> Path:
    """The same models under another name: there is nothing to find."""
    spec = toy.with_name("twin.yaml")
    spec.write_text(toy.read_text().replace("name: toy", "name: twin"))
    return spec


def test_compare(toy: Path, twin: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    for spec in (toy, twin):
        mechdiff("sweep", "--pair", str(spec), *SWEEP)
    shown = mechdiff("compare", str(toy), str(twin)).output
    assert "no evidence of a difference" in shown
    assert "drops further" not in shown
    text = (here / "mechdiff-compare.md").read_text()
    transport = next(t for t in tables(text) if "verdict" in t[0] and "cell" in t[0])
    assert len(transport) == 4
    assert all(row["difference, points"].startswith(("0.0 [-", "-0.0 [-")) for row in transport)
    (run,) = runs_of(client)["compare"]
    assert {"mechdiff-compare.md", "mechdiff-compare.html"} <= {
        item.path for item in client.list_artifacts(run.info.run_id)
    }
    # The interval is that of two independent sets of prompts.
    store = open_store()
    found = matches(evidence_of(store, "toy", "toy"), evidence_of(store, "twin", "twin"))[0]
    runs = [found.first.run_id, found.second.run_id]
    rows = tables_of(store, runs, "per_prompt.json")
    (a, b) = ((rows[run]["KL_raw"], rows[run]["KL_mapped"]) for run in runs)
    gap = stats.drop_difference(a, b, bootstrap=Bootstrap(seed=0))
    assert transport[0]["difference, points"] == f"{gap.estimate:.1f} [{gap.low:.1f}, {gap.high:.1f}]"


def test_what_cannot_be_compared(toy: Path, twin: Path, mechdiff: Invoke) -> None:
    assert "name two or more different ones" in mechdiff("compare", str(toy), str(toy), code=1).output
    mechdiff("sweep", "--pair", str(toy), *SWEEP)
    assert "There is no experiment 'twin'" in mechdiff("compare", str(toy), str(twin), code=1).output
    mechdiff("run", "--pair", str(twin), "--layer", "1", "--hook", "resid_post", "--alpha", "1", code=1)
    assert "no patched cell in common" in mechdiff("compare", str(toy), str(twin), code=1).output
