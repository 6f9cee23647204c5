"""The files around the package agree with it and with each other."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.maps.affine import Family
from mechdiff_mlflow.solvers import PairedSpectrum
from mechdiff_mlflow.solvers.regression import ridge

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = yaml.safe_load((ROOT / "MLproject").read_text())
CONDA: dict[str, Any] = yaml.safe_load((ROOT / "conda.yaml").read_text())
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENTRY_POINTS = sorted(PROJECT["entry_points"])
WITH_VALUES = {"force": "forced"}
"""Flags, and the options of the same meaning that take a value, as every parameter of MLproject does."""


def command_of(entry_point: str) -> tuple[click.Command, list[str]]:
    """The click command that an entry point calls, and the words after it."""
    words = shlex.split(PROJECT["entry_points"][entry_point]["command"])
    assert words[:3] == ["python", "-m", "mechdiff_mlflow"]
    return cli.commands[words[3]], words[4:]


def test_entry_points() -> None:
    assert ENTRY_POINTS == ["fit", "main", "patch", "promote", "rank_sweep", "report"]


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_every_parameter_of_an_entry_point_reaches_the_option_of_its_name(entry_point: str) -> None:
    command, words = command_of(entry_point)
    options = {option.opts[0]: option.name for option in command.params if isinstance(option, click.Option)}
    passed = {}
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            passed[value.strip("{}")] = options[word]
    arguments = [p.name for p in command.params if isinstance(p, click.Argument)]
    passed.update({name: name for name in arguments})
    parameters = set(PROJECT["entry_points"][entry_point]["parameters"])
    assert passed.keys() == parameters
    assert all(name == WITH_VALUES.get(parameter, parameter) for parameter, name in passed.items()), passed


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_defaults_are_those_of_the_command_line_and_never_empty(entry_point: str) -> None:
    command, _ = command_of(entry_point)
    for name, parameter in PROJECT["entry_points"][entry_point]["parameters"].items():
        option = next(p for p in command.params if p.name == WITH_VALUES.get(name, name))
        if option.required and "default" not in parameter:
            continue
        assert str(parameter["default"]) != ""
        if not option.required:
            assert str(parameter["default"]) == str(option.default)


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_the_readme_describes_every_parameter(entry_point: str) -> None:
    for name in PROJECT["entry_points"][entry_point]["parameters"]:
        assert f"`{name}`" in README, f"README.md does not describe the parameter {name}"


def test_the_defaults_in_the_readme_are_those_of_mlproject() -> None:
    known = {
        name: parameter["default"]
        for entry in reversed(PROJECT["entry_points"].values())
        for name, parameter in entry["parameters"].items()
        if "default" in parameter
    }
    table = README.partition("| parameter | default |")[2].partition("\n\n")[0]
    rows = [[re.findall("`([^`]*)`", cell) for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    alike = [zip(names, texts, strict=True) for names, texts in rows if len(names) == len(texts)]
    shown = {name: text for row in alike for name, text in row}
    assert len(shown) > 20
    assert {name: str(known[name]) for name in shown if name in known} == shown


def test_the_worked_example_of_a_solver_is_one() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(import.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    p = PairedSpectrum.from_rows(torch.randn(20, 4).double(), torch.randn(20, 4).double())
    none, half, whole = (names["damped_ridge"](p, Family.UPDATE, ridge=0.1, strength=x) for x in (0, 0.5, 1))
    assert not none.right.any()
    assert torch.equal(whole.right, ridge(p, Family.UPDATE, ridge=0.1).right)
    assert torch.equal(2 * half.right, whole.right)


def pins(lines: list[str]) -> dict[str, str]:
    found = (re.match(r"([\w-]+)==([\w.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def test_conda_yaml_pins_what_is_tested_and_nothing_of_ours() -> None:
    runtime, _, _ = (ROOT / "constraints.txt").read_text().partition("# Development")
    pip = CONDA["dependencies"][-1]["pip"]
    assert pins(pip) == pins(runtime.splitlines())
    assert len(pins(pip)) == len(pip), "everything in conda.yaml is pinned"
    assert CONDA["dependencies"][:-1] == ["python=3.11.7", "pip"]


def test_every_dependency_is_pinned_for_the_environments() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    dependencies = re.search(r"\ndependencies = \[(.*?)\n\]", text, re.DOTALL)
    assert dependencies is not None
    names = set(re.findall(r'"([\w-]+)', dependencies[1]))
    assert names == set(pins(CONDA["dependencies"][-1]["pip"]))
