"""Every command has help with an example, and every example runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import mlflow
import pytest
from cli.conftest import Invoke
from cli.test_run import runs_of

from mechdiff_mlflow.cli import cli

PAIRLESS = ("promote", "fetch", "maps", "doctor", "compare", "runs", "resume", "server-check", "pair")
PLACE = {"26": "3", "24": "2", "L26": "L3", "L24": "L2", "cultural-demo": "toy", "1,8,32,full": "1,8,full"}


def every(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands by their words, those of groups too: `maps`, `maps history`."""
    for name, command in group.commands.items():
        yield f"{path}{name}", command
        if isinstance(command, click.Group):
            yield from every(command, f"{path}{name} ")


COMMANDS = dict(every(cli))


def examples(name: str) -> list[str]:
    return re.findall(r"^ *mechdiff (.+)$", COMMANDS[name].help or "", re.MULTILINE)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_says_what_it_does_with_an_example_of_itself(name: str, mechdiff: Invoke) -> None:
    assert examples(name)
    assert all(example.startswith(name) for example in examples(name))
    shown = mechdiff(*name.split(), "--help").output
    assert "Example:" in shown
    for parameter in COMMANDS[name].params:
        assert not isinstance(parameter, click.Option) or parameter.help, f"{parameter.name} has no help"


WITH_A_CHAMPION = (
    "promote",
    "fetch",
    "patch",
    "report",
    "report-pass",
    "compare",
    "import",
    "export",
    "runs",
    "steer",
    "adapter",
)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_example_runs(name: str, toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    """On the toy pair, which has 4 layers: sites are moved, nothing else."""
    if name in WITH_A_CHAMPION or name.startswith("maps"):
        for alpha in ("1", "0.9") if name == "maps rollback" else ("1",):
            site = ("--layer", "3", "--hook", "attn_out", "--alpha", alpha)
            mechdiff("run", "--pair", str(toy), *site, "--promote", "--force")
    if name == "import":
        mechdiff("export", "winners", "--pair", str(toy))
    if name == "compare":
        (toy.parent / "twin.yaml").write_text(toy.read_text().replace("name: toy", "name: twin"))
        twin = ("--pair", str(toy.parent / "twin.yaml"))
        mechdiff("run", *twin, "--layer", "3", "--hook", "attn_out", "--alpha", "1")
    for example in examples(name):
        words = shlex.split(re.sub(r"cultural-demo-L26", "toy-L3", example))
        words = [re.sub(r"L26|L24|\b26\b|\b24\b|1,8,32,full", lambda m: PLACE[m[0]], word) for word in words]
        words = [str(toy) if word == "cultural-demo" else word for word in words]
        words = [str(toy.parent / "twin.yaml") if word == "cognitive-demo" else word for word in words]
        if name == "promote":
            words[1] = runs_of(client)["fit"][0].info.run_id
        if name.startswith("pair"):
            own = {"org/adapter": toy.parent / "tuned", "prompts.jsonl": toy.parent / "train.jsonl"}
            words = [str(own.get(word, word)) for word in words] + ["--base", str(toy.parent / "base")]
        if name == "run":
            words.append("--force")  # what is kept of the pair of the example is harmful on the toy pair
        pairless = name.split()[0] in PAIRLESS or "--pair" in words
        pair = [] if pairless else ["--pair", str(toy)]
        mechdiff(*words, *pair)
