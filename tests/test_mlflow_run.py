"""`mlflow run .` as a user types it, in a process of its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import mlflow.cli
import pytest
from cli.conftest import empty_store, here  # noqa: F401
from click.testing import CliRunner, Result
from mlflow.entities import Run
from mlflow.projects.backend import local
from mlflow.projects.utils import get_run_env_vars
from test_docs_commands import demo_pairs, shown  # noqa: F401

from mechdiff_mlflow.cli import cli as mechdiff

ROOT = Path(__file__).parents[1]


def runs_in(store: Path) -> list[Run]:
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    return list(client.search_runs([e.experiment_id for e in client.search_experiments()]))


def test_mlflow_run_makes_the_tree_that_the_command_line_makes(here: Path, toy: Path) -> None:  # noqa: F811
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{here / 'mlflow.db'}",
        # MLproject says "python", which has to be this one.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    words = ["--env-manager", "local", "-P", f"pair={toy}"]
    for parameter in ("layer=3", "hook=resid_post", "k=4"):
        words += ["-P", parameter]
    process = subprocess.run(
        [sys.executable, "-m", "mlflow", "run", str(ROOT), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    runs = runs_in(here / "mlflow.db")
    by_kind = {run.data.tags["mechdiff.kind"]: run for run in runs}
    assert len(runs) == len(by_kind) == 3
    parent, fit, patch = (by_kind[kind] for kind in ("run", "fit", "patch"))
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.info.experiment_id for run in runs} == {parent.info.experiment_id}
    assert {run.data.tags["mlflow.parentRunId"] for run in (fit, patch)} == {parent.info.run_id}
    assert parent.data.tags["mlflow.project.entryPoint"] == "main"
    assert parent.info.run_name.startswith("L3/resid_post"), "a generated name is replaced"
    # What was asked for stands on the parent once, what it came to on the children.
    assert parent.data.params["alpha"] == "auto"
    assert parent.data.params["k"] == patch.data.params["k"] == "4"
    assert float(patch.data.params["alpha"]) > 0
    shared = parent.data.params.keys() & patch.data.params.keys()
    assert {
        "pair",
        "layer",
        "hook",
        "solver",
        "family",
        "k",
        "alpha",
        "shrink",
        "split",
        "n",
        "seed",
    } <= shared
    assert f"mechdiff promote {fit.info.run_id}" in process.stdout


@pytest.fixture
def mlflow_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:  # noqa: F811
    """`mlflow run` that does all it does, but for the shell that the test above starts: commands run here."""

    def run_here(command: str, work_dir: str, experiment_id: str, run_id: str) -> local.LocalSubmittedRun:
        python, flag, module, *words = shlex.split(command)
        assert (python, flag, module) == ("python", "-m", "mechdiff_mlflow")
        done = CliRunner().invoke(mechdiff, words, env=get_run_env_vars(run_id, experiment_id))
        assert "Traceback" not in done.output
        print(done.output)
        return local.LocalSubmittedRun(run_id, subprocess.Popen(["false" if done.exit_code else "true"]))

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'mlflow.db'}")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(local, "_run_entry_point", run_here)
    return lambda words: CliRunner().invoke(mlflow.cli.cli, ["run", *words])


@pytest.mark.parametrize("line", [line for line in shown(ROOT / "README.md") if line.startswith("mlflow")])
def test_the_lines_of_the_readme_run_as_they_are_written(
    mlflow_run: Callable[..., Result],
    here: Path,  # noqa: F811
    demo_pairs: None,  # noqa: F811
    line: str,
) -> None:
    done = mlflow_run(shlex.split(line)[2:])
    assert done.exit_code == 0, done.output + repr(done.exception)
    runs = runs_in(here / "mlflow.db")
    assert len(runs) > 2
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_bad_value_fails_the_run_with_its_reason(
    mlflow_run: Callable[..., Result],
    here: Path,  # noqa: F811
    toy: Path,
) -> None:
    words = [".", "--env-manager", "local", "-P", f"pair={toy}", "-P", "layer=99", "-P", "hook=resid_post"]
    done = mlflow_run(words)
    assert done.exit_code != 0
    (run,) = runs_in(here / "mlflow.db")
    assert run.info.status == "FAILED"
    reason = "Layer 99 does not exist: the model has 4 layers, 0 to 3."
    assert run.data.tags["mechdiff.failure"] == reason
    assert f"Error: {reason}" in done.output
