"""Every command that README.md and docs/ show runs as it is written, page after page in one store."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import mlflow
import pytest
import torch
import yaml
from cli.conftest import empty_store, here  # noqa: F401
from cli.test_examples import COMMANDS
from click.testing import CliRunner

import mechdiff_mlflow as md
from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.spec import pair_spec as spec

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/the-experiment.md", "docs/is-my-number-real.md", "docs/winners.md")
"""In the order in which they are read: the first promotes the champion that later ones use."""

NOT_RUN = {
    "mechdiff atlas --engine ray --workers 4": "makes a Ray cluster; tests/workers does",
    "mechdiff atlas --engine ray --workers 16 --address auto": "joins a Ray cluster",
    "mlflow run . -P engine=ray -P address=10.0.0.1:6379 -P workers=16": "joins a Ray cluster",
    "mechdiff import mechdiff/artifacts/rq3/manifest.json --root .": "needs the predecessor's files",
    "mechdiff export winners --pair cultural": "exports what that import registers",
    "mechdiff run --tuned org/my-fine-tune --prompts prompts.jsonl --layer 20": "is somebody's own",
    "mechdiff atlas --tuned org/my-fine-tune --prompts prompts.jsonl": "is somebody's own",
    "mechdiff pair init --tuned mechdiff_mlflow/spec/demo/adapters/smollm2-kazakh --base "
    "HuggingFaceTB/SmolLM2-135M-Instruct --pair unquantised --prompts train.jsonl,val.jsonl,test.jsonl "
    "--out unquantised.yaml": "downloads a model",
    "mechdiff atlas --pair unquantised.yaml --n 100 --n-train 300": "is of that model",
    "mechdiff compare smollm2-kazakh unquantised.yaml": "is of that model",
}
"""Commands that cannot run here, and why."""

BEFORE = {
    "mechdiff compare cultural-demo cognitive-demo --out reports/comparison.md": [
        "mechdiff sweep --pair cognitive-demo"
    ],
}
"""What a page tells in words to do first."""

N_PROMPTS = {"train": 150, "val": 16, "test": 24}
"""Of train more than the models are wide."""


def pages() -> list[Path]:
    first = [ROOT / page for page in PAGES]
    return [*first, *(page for page in sorted((ROOT / "docs").glob("*.md")) if page not in first)]


def shown(page: Path) -> list[str]:
    """The commands in the code blocks of a page: of ours, and `mlflow run`."""
    blocks = re.findall(
        r"^```\w*\n(.*?)^```|((?:^ {4}[^\n]*\n)+)", page.read_text(), re.MULTILINE | re.DOTALL
    )
    lines = "\n".join(fenced or indented for fenced, indented in blocks).replace("\\\n", " ").splitlines()
    typed = (shlex.join(shlex.split(line, comments=True)) for line in lines if _is_ours(line))
    return list(typed)


def _is_ours(line: str) -> bool:
    return re.match(r"\s*(mechdiff [a-z]|mlflow run )", line) is not None


@pytest.fixture
def demo_pairs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped pairs with fewer prompts: no command says how many there are."""
    folder = tmp_path_factory.mktemp("pairs")
    found = {}
    for name, path in spec.shipped_pairs().items():
        fields = yaml.safe_load(path.read_text())
        for side in ("base", "tuned"):
            model = fields[side].get("model")
            if model:
                fields[side]["model"] = str((path.parent / model).resolve())
        for split, file in fields["prompts"].items():
            lines = (path.parent / file).read_text().splitlines()
            kept = lines[: N_PROMPTS[split]]
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(kept) + "\n")
            fields["prompts"][split] = f"{name}-{split}.jsonl"
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(yaml.safe_dump(fields))
    monkeypatch.setattr(spec, "shipped_pairs", lambda: found)


def test_the_commands_of_the_pages_run_as_written(here: Path, demo_pairs: None) -> None:  # noqa: F811
    ran = []
    for line in [line for page in pages() for line in shown(page) if line not in NOT_RUN]:
        words = shlex.split(line)
        if words[0] == "mlflow":  # tests/test_mlflow_run.py
            continue
        for before in BEFORE.get(line, []):
            _type(before)
        _type(line)
        ran.append(line)
    assert len(ran) > 12


def _type(line: str) -> None:
    result = CliRunner().invoke(cli, shlex.split(line)[1:], prog_name="mechdiff")
    assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_python_of_the_readme_runs_as_written(here: Path, demo_pairs: None) -> None:  # noqa: F811
    """From a pair to a table and a figure; then a map, applied and attached to live models."""
    first, second = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(first, names)
    assert list(names["done"].table["drop_pct"]) == [names["done"].patches[0].drop_pct.estimate]
    assert (here / "drop-over-k.png").read_bytes().startswith(b"\x89PNG")
    pair = load_pair(spec.PairSpec.load("cultural-demo"))
    base, tuned = pair.base.model, pair.tuned.model
    rows = torch.ones(2, names["map_"].d_in)
    inputs = {**pair.tuned.tokenizer("Which fruit?", return_tensors="pt"), "max_new_tokens": 1}
    inputs.pop("token_type_ids", None)
    names |= {"base_activations": rows, "base": base, "tuned": tuned, "inputs": inputs}
    exec(second, names)
    assert names["tuned_like"].shape == (2, names["map_"].d_out)


def test_python_is_tracked_as_the_command_is(here: Path, demo_pairs: None) -> None:  # noqa: F811
    """Params, metrics, tags and the words that `resume` reads are the same."""
    _type("mechdiff run --layer 26 --alpha 1.6 --n 12 --seed 3")
    client = mlflow.MlflowClient(f"sqlite:///{here / 'mlflow.db'}")
    request = md.RunRequest(layer=26, alpha=md.Alpha((1.6,)), n=12, seed=3)
    done = md.run(request)
    runs = [
        run for run in client.search_runs([done.experiment_id]) if run.data.tags["mechdiff.kind"] == "run"
    ]
    (typed,) = [run for run in runs if run.info.run_id != done.run_id]
    ours = client.get_run(done.run_id)
    assert ours.data.params == typed.data.params
    assert ours.data.metrics == typed.data.metrics
    words = [json.loads(run.data.tags["mechdiff.resume"])["argv"] for run in (ours, typed)]
    assert words[0] == words[1]
    same = ("mechdiff.command", "mechdiff.kind", "mlflow.runName", "pair_fingerprint")
    assert {key: ours.data.tags[key] for key in same} == {key: typed.data.tags[key] for key in same}
    assert ours.info.status == typed.info.status == "FINISHED"


def test_what_is_not_run_is_shown_somewhere() -> None:
    assert set(NOT_RUN) | set(BEFORE) <= {line for page in pages() for line in shown(page)}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_commands_within_sentences_have_the_options_that_they_name(page: Path) -> None:
    for code in re.findall(r"`mechdiff ([^`]+)`", page.read_text()):
        words = " ".join(code.split()).split()
        known = next((COMMANDS[" ".join(words[:n])] for n in (2, 1) if " ".join(words[:n]) in COMMANDS), None)
        if known is None:
            assert words[0] in ("COMMAND", "COMMAND`"), code
            continue
        options = {option for p in known.params if isinstance(p, click.Option) for option in p.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= options | {"--help"}, (
            code
        )
