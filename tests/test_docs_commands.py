"""Every command that README.md and docs/ show runs as it is written, in the order of the pages, in one store."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from cli.conftest import empty_store, here  # noqa: F401
from click.testing import CliRunner

from mechdiff_mlflow import spec
from mechdiff_mlflow.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/the-experiment.md", "docs/is-my-number-real.md", "docs/winners.md")
"""In the order in which they are read: the first promotes the champion that later ones use."""

NOT_RUN = {
    "mechdiff atlas --engine ray --workers 4": "makes a Ray cluster; tests/workers does",
    "mechdiff atlas --engine ray --workers 16 --address auto": "joins a Ray cluster",
    "mlflow run . -P engine=ray -P address=10.0.0.1:6379 -P workers=16": "joins a Ray cluster",
    "mechdiff import mechdiff/artifacts/rq3/manifest.json --root .": "needs the predecessor's files",
    "mechdiff export winners --pair cultural": "exports what that import registers",
}
"""Commands that cannot run here, and why."""


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
    """The shipped pairs with fewer prompts to report on; no command says how many."""
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
            kept = lines if split == "train" else lines[:24]
            (folder / f"{name}-{split}.jsonl").write_text("\n".join(kept) + "\n")
            fields["prompts"][split] = f"{name}-{split}.jsonl"
        found[name] = folder / f"{name}.yaml"
        found[name].write_text(yaml.safe_dump(fields))
    monkeypatch.setattr(spec, "shipped_pairs", lambda: found)


def test_the_commands_of_the_pages_run_as_written(here: Path, demo_pairs: None) -> None:  # noqa: F811
    import time

    shutil.copytree(ROOT / "examples", here / "examples")
    ran = 0
    for page in pages():
        for line in shown(page):
            words = shlex.split(line)
            if words[0] == "mlflow" or line in NOT_RUN:
                continue
            t = time.process_time()
            result = CliRunner().invoke(cli, words[1:], prog_name="mechdiff")
            print(f"{time.process_time() - t:6.1f} {result.exit_code} {page.name}: {line}", flush=True)
            if result.exit_code:
                print(result.output[-600:])
            ran += 1
    assert ran
