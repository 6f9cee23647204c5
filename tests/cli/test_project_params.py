"""What `mlflow run` logs of its parameters is what the command means by them, however they are spelled."""

from __future__ import annotations

import shlex
from pathlib import Path

import mlflow
import pytest
from cli.conftest import Invoke
from cli.test_bad_input import refused
from cli.test_run import SITE
from mlflow.projects._project_spec import load_project

from mechdiff_mlflow import load_map
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap, identity_map

ROOT = Path(__file__).parents[2]
STOPPED = "Stopped by the test."
COMMANDS = "mechdiff_mlflow.tracking.commands"

OTHER = {
    "layer": "003",
    "hook": "resid_post",
    "solver": "reduced_rank",
    "family": "content",
    "k": "0",
    "alpha": "0.30,.7,1e0",
    "shrink": "0.050",
    "ridge": "1e-2",
    "output_metric": "tuned_covariance",
    "directions": "08",
    "unembedding": "joint",
    "alpha_fit": "inside",
    "off_span": "zero",
    "position": "last_content",
    "split": "val",
    "n": "012",
    "n_train": "020",
    "permutations": "00",
    "seed": "007",
    "dtype": "float64",
    "engine": "local",
    "address": "auto",
    "workers": "02",
    "sites": "L3/attn_out:0.30, L2-resid_post",
    "alphas": "0.5, 1.0",
    "ranks": "1, 8,0",
    "targets": "L3/attn_out:30.0, 12",
    "out": "some where's.md",
}
MORE = {
    "alpha": "auto",
    "split": "test",  # what is chosen on the prompts of val that it reports may not be promoted
    "promote": "best",
    "force": "yes",
    "targets": "30.0,12.0",
    "sites": "L26/attn_out:0.30,L24/resid_post:.7",
    "k": "08",
}


def begun(
    client: mlflow.MlflowClient,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    entry: str,
    given: dict[str, str],
) -> list[str]:
    """Do what `mlflow run` does before it starts a command; its words."""
    point = load_project(str(ROOT)).get_entry_point(entry)
    logged, extra = point.compute_parameters(given, str(here))
    found = client.get_experiment_by_name("chosen")
    experiment = found.experiment_id if found else client.create_experiment("chosen")
    run = client.create_run(experiment)
    for key, value in {**logged, **extra}.items():
        client.log_param(run.info.run_id, key, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    return shlex.split(point.compute_command(given, str(here)))[3:]


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command ends where it would load the pair, with its run open and its params compared."""

    def stop(*args: object, **more: object) -> None:
        raise MechdiffError(STOPPED)

    monkeypatch.setattr(f"{COMMANDS}.session.workers_of", stop)
    monkeypatch.setattr(f"{COMMANDS}.documents.reports.report", stop)


@pytest.mark.parametrize("entry", ["main", "fit", "patch", "rank_sweep", "report"])
@pytest.mark.parametrize("spelled", [{}, OTHER, {**OTHER, **MORE}], ids=["defaults", "other", "more"])
def test_every_parameter_of_every_entry_point_in_other_words(
    toy: Path,
    here: Path,
    mechdiff: Invoke,
    client: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    stops: None,
    entry: str,
    spelled: dict[str, str],
) -> None:
    parameters = load_project(str(ROOT)).get_entry_point(entry).parameters
    given = {name: text for name, text in spelled.items() if name in parameters} | {"pair": str(toy)}
    if entry == "patch":
        given |= {"alpha": "0.30"} if spelled else {}
        monkeypatch.setattr(f"{COMMANDS}.measuring.load_map", lambda name, store: a_map())
    if entry == "report":
        monkeypatch.setattr(f"{COMMANDS}.documents.evidence_of", lambda store, pair, experiment: None)
    words = begun(client, here, monkeypatch, entry, given)
    assert STOPPED in refused(mechdiff(*words, code=1).output)


def a_map() -> AffineMap:
    about = {
        "site": "L3/attn_out",
        "solver": "ridge",
        "family": "update",
        "k": "full",
        "position": "decision",
    }
    return identity_map(16).with_meta(**about)


def test_another_value_is_refused_with_the_parameter_to_give(
    toy: Path,
    here: Path,
    mechdiff: Invoke,
    client: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    stops: None,
) -> None:
    given = {"pair": str(toy), "sites": "L3/attn_out:0.30", "targets": "30"}
    for option, text, remedy in (
        ("--targets", "31", "-P targets=31"),
        ("--sites", "L3/attn_out:0.31", "-P sites=L3/attn_out:0.31"),
        ("--split", "val", "-P split=val"),
        ("--alphas", "0.5", "-P alphas=0.5"),
    ):
        words = begun(client, here, monkeypatch, "rank_sweep", given)
        line = refused(mechdiff(*words, option, text, code=1).output)
        assert remedy in line
        assert STOPPED not in line


@pytest.mark.parametrize("entry", ["main", "promote"])
def test_a_refused_promotion_is_done_with_the_parameter(
    toy: Path,
    here: Path,
    mechdiff: Invoke,
    client: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    entry: str,
) -> None:
    """One that does harm."""
    given = {"pair": str(toy), "layer": "3", "alpha": "30", "promote": "champion"}
    shown = mechdiff(*begun(client, here, monkeypatch, "main", given), code=1).output
    if entry == "promote":
        given = {"run": shown.rsplit("waive it: mechdiff promote ", 1)[1].split()[0]}
        mechdiff(*begun(client, here, monkeypatch, entry, given), code=1)
    mechdiff(*begun(client, here, monkeypatch, entry, {**given, "force": "yes"}))
    assert load_map("toy-L3-attn_out@champion").alpha == 30
    assert (
        "unknown; use one of no, yes"
        in mechdiff(*begun(client, here, monkeypatch, entry, {**given, "force": "1"}), code=1).output
    )


def test_a_report_is_of_the_experiment_that_was_chosen(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = begun(client, here, monkeypatch, "main", {"pair": str(toy), "layer": "3", "alpha": "1"})
    mechdiff(*words)
    words = begun(client, here, monkeypatch, "report", {"pair": str(toy)})
    mechdiff(*words)
    assert client.get_experiment_by_name("toy") is None
    assert "α=1" in (here / "mechdiff-report.md").read_text()


def test_where_runs_go(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option, then the environment, then the active run, then the pair's name."""
    fit = ("fit", "--pair", str(toy), *SITE, "--alpha", "1")

    def names(*more: str) -> set[str]:
        before = {run.info.run_id for run in everywhere()}
        mechdiff(*fit, *more)
        new = [run for run in everywhere() if run.info.run_id not in before]
        return {client.get_experiment(run.info.experiment_id).name for run in new}

    def everywhere() -> list[mlflow.entities.Run]:
        return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))

    assert names() == {"toy"}
    mlflow.set_tracking_uri(f"sqlite:///{here / 'mlflow.db'}")
    try:
        mine = client.create_experiment("mine", (here / "artifacts").as_uri())
        with mlflow.start_run(experiment_id=mine) as outer:
            assert names() == {"mine"}
            (inner,) = [r for r in client.search_runs([mine]) if r.info.run_id != outer.info.run_id]
            assert inner.data.tags["mlflow.parentRunId"] == outer.info.run_id
            assert names("--experiment", "asked") == {"asked"}
            monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment("by-id"))
            assert names() == {"by-id"}
            monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "by-name")
            assert names() == {"by-name"}
            assert names("--experiment", "asked") == {"asked"}
        assert client.get_run(outer.info.run_id).info.status == "FINISHED"
    finally:
        mlflow.set_tracking_uri(None)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "12345")
    line = refused(mechdiff(*fit, code=1).output)
    assert "MLFLOW_EXPERIMENT_ID is '12345'" in line
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    mechdiff(*fit)
