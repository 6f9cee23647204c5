"""A sample of the hostile corpus by way of the command line: one sentence, exit code 1 or 2, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from cli.conftest import Invoke
from cli.test_bad_input import refused, statuses
from hostile.corpus import CASES, MARKER, Case

ROOT = Path(__file__).parents[2]
MAPS = [case for case in CASES if case.reader == "map" and case.name != "NUL in the name"][::16]
SPECS = [case for case in CASES if case.reader == "spec"][::6]
WORDS = [case for case in CASES if case.reader == "pair" and "\\x00" not in case.name]


def written(case: Case, here: Path) -> Any:
    (here / "input").mkdir()
    return case.write(here / "input")


@pytest.mark.parametrize("case", MAPS, ids=str)
def test_maps(case: Case, toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    given = str(written(case, here))
    if not given.isprintable():
        return  # no shell passes it on
    line = refused(mechdiff("patch", "--map", given, "--pair", str(toy), code=1).output)
    assert line.isprintable()
    assert "RUNNING" not in statuses(client)
    assert not (here / MARKER).exists()


@pytest.mark.parametrize("case", [*SPECS, *WORDS], ids=str)
def test_pairs(case: Case, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    line = refused(mechdiff("run", "--pair", written(case, here), "--layer", "3", code=1).output)
    assert line.isprintable()
    assert "RUNNING" not in statuses(client)
    assert not (here / MARKER).exists()


def test_a_process_of_its_own_ends_with_one_sentence(toy: Path, here: Path) -> None:
    case = next(case for case in CASES if case.name == "os.system in a part (pt)")
    done = subprocess.run(
        [sys.executable, "-m", "mechdiff_mlflow", "patch", "--map", written(case, here), "--pair", toy],
        capture_output=True,
        text=True,
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr + done.stdout
    assert not (here / MARKER).exists()


def test_parameters_of_a_project_are_words_to_the_shell(here: Path) -> None:
    """MLflow hands the commands of MLproject to a shell; it must have quoted what the user gave."""
    import shlex

    from mlflow.projects._project_spec import load_project

    hostile = f"x'; touch {MARKER}; $(touch {MARKER}) `touch {MARKER}` \"#"
    for entry in ("main", "fit", "patch", "rank_sweep", "report", "promote"):
        point = load_project(str(ROOT)).get_entry_point(entry)
        given = dict.fromkeys(point.parameters, hostile)
        words = shlex.split(point.compute_command(given, str(here)))
        assert words.count(hostile) == len(given)
