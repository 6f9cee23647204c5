"""`mlflow run .` as a user types it, in a process of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from cli.conftest import empty_store  # noqa: F401
from mlflow.entities import Run
from test_docs_commands import shown

ROOT = Path(__file__).parents[1]


@pytest.fixture
def mlflow_run(tmp_path: Path, toy: Path) -> object:
    """Calls `mlflow run` with an own store; gives the process and the client."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {
        "MLFLOW_TRACKING_URI": uri,
        # MLproject says "python", which has to be this one.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }

    def run(*words: str) -> tuple[subprocess.CompletedProcess[str], list[Run]]:
        process = subprocess.run(
            [
                sys.executable,
                "-m",
                "mlflow",
                "run",
                str(ROOT),
                "--env-manager",
                "local",
                "-P",
                f"pair={toy}",
                *words,
            ],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        client = mlflow.MlflowClient(uri)
        return process, client.search_runs([e.experiment_id for e in client.search_experiments()])

    return run


def test_mlflow_run_makes_the_tree_that_the_command_line_makes(mlflow_run: object, toy: Path) -> None:
    process, runs = mlflow_run("-P", "layer=3", "-P", "hook=resid_post", "-P", "k=4")
    assert process.returncode == 0, process.stderr
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


@pytest.mark.parametrize("line", [line for line in shown(ROOT / "README.md") if line.startswith("mlflow")])
def test_the_lines_of_the_readme_run_as_they_are_written(
    tmp_path: Path,
    empty_store: Path,  # noqa: F811
    line: str,
) -> None:
    shutil.copy(empty_store, tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {
        "MLFLOW_TRACKING_URI": uri,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    words = [sys.executable, "-m", *shlex.split(line)]
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert len(runs) > 2
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_bad_value_fails_the_run_with_its_reason(mlflow_run: object) -> None:
    process, runs = mlflow_run("-P", "layer=99", "-P", "hook=resid_post")
    assert process.returncode != 0
    (run,) = runs
    assert run.info.status == "FAILED"
    reason = "Layer 99 does not exist: the model has 4 layers, 0 to 3."
    assert run.data.tags["mechdiff.failure"] == reason
    assert f"Error: {reason}" in process.stderr
    assert "Traceback" not in process.stderr.partition("mlflow.cli")[0]
