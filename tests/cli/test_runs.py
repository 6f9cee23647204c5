"""Measured runs are found: by the command, and by the searches that the documentation lists."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlflow
import pytest
from cli.conftest import Invoke
from click.testing import CliRunner

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.tracking.store.server_check import rebase

DOCS = Path(__file__).parents[2] / "docs" / "winners.md"


@pytest.fixture(scope="module")
def store_of_a_sweep(toy: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a sweep over two sites, two scales and two ranks."""
    folder = tmp_path_factory.mktemp("swept")
    shutil.copy(empty_store, folder / "mlflow.db")
    words = ["sweep", "--pair", str(toy), "--sites", "L2/attn_out,L3/attn_out", "--alphas", "0.5,1"]
    words += ["--ranks", "2,full", "--targets", "10", "--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    return folder / "mlflow.db"


@pytest.fixture
def swept(toy: Path, here: Path, store_of_a_sweep: Path) -> Path:
    """The pair, with the runs of the sweep in the store of `here`."""
    shutil.copytree(store_of_a_sweep.parent, here, dirs_exist_ok=True)
    rebase(f"sqlite:///{here / 'mlflow.db'}")
    return toy


def found(mechdiff: Invoke, *words: str) -> list[dict[str, object]]:
    rows = json.loads(mechdiff("runs", "--json", *words).output)
    assert isinstance(rows, list)
    return rows


def test_runs_are_listed_best_first(swept: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    rows = found(mechdiff, "--pair", str(swept))
    assert len(rows) == 8
    drops = [row["value"] for row in rows]
    assert drops == sorted(drops, reverse=True)
    for row in rows:
        run = client.get_run(str(row["run_id"]))
        assert row["value"] == run.data.metrics["drop_pct"]
        assert (row["low"], row["high"]) == tuple(
            run.data.metrics[f"ci/drop_pct_{end}"] for end in ("low", "high")
        )
    divergences = [row["value"] for row in found(mechdiff, "--pair", "toy", "--metric", "KL_mapped")]
    assert divergences == sorted(divergences)
    at_site = found(mechdiff, "--pair", "toy", "--site", "L3/attn_out")
    assert {row["site"] for row in at_site} == {"L3/attn_out"}
    assert len(at_site) == 4
    best = found(mechdiff, "--best")
    assert [row["run_id"] for row in best if row["site"] == "L3/attn_out"] == [at_site[0]["run_id"]]
    assert len(best) == 2
    table = mechdiff("runs", "--pair", "toy", "--site", "L3/attn_out", "--best").output
    assert str(at_site[0]["run_id"]) in table
    mechdiff("promote", str(at_site[0]["run_id"]))
    mechdiff("fetch", str(at_site[0]["run_id"]), "-o", "map.pt")


def test_nothing_found_says_what_there_is(swept: Path, mechdiff: Invoke) -> None:
    shown = " ".join(mechdiff("runs", "--metric", "accuracy", code=1).output.split())
    assert "No patch run of any pair at any site has the metric 'accuracy'" in shown
    assert "KL_mapped" in shown
    shown = mechdiff("runs", "--pair", "o'ther", code=1).output
    assert "run mechdiff run or sweep first" in shown


def test_prompt_sets_are_logged_by_name_digest_and_split(
    swept: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    prompts = load_pair(PairSpec.load(str(swept))).prompts
    expected = [
        {"name": f"toy-{split}", "digest": prompts[split].digest, "split": split}
        for split in ("test", "train", "val")
    ]
    for row in found(mechdiff, "--pair", "toy"):
        assert row["prompts"] == expected
    [experiment] = [e for e in client.search_experiments() if e.name == "toy"]
    for row in expected:
        for where in (f"dataset.name = '{row['name']}'", f"dataset.digest = '{row['digest']}'"):
            runs = client.search_runs([experiment.experiment_id], f"{where} and metrics.drop_pct > -1e9")
            assert len(runs) == 8, where


def test_the_searches_in_the_documentation_find_runs(
    swept: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("run", "--pair", str(swept), "--layer", "3", "--split", "val", "--alpha", "0.5,1")
    [experiment] = [e for e in client.search_experiments() if e.name == "toy"]
    text = DOCS.read_text().partition("## Finding runs")[2].partition("\n## ")[0]
    block = re.search(r"```sql\n(.*?)```", text, re.DOTALL)
    assert block is not None
    filters = [line.partition("  --")[0].strip() for line in block[1].splitlines() if line.strip()]
    assert len(filters) >= 8
    digest = load_pair(PairSpec.load(str(swept))).prompts["test"].digest
    fingerprint = load_pair(PairSpec.load(str(swept))).fingerprint
    for where in filters:
        here = where.replace("cultural-demo", "toy").replace("'26'", "'3'").replace("L26", "L3")
        here = here.replace("…digest…", digest).replace("…fingerprint…", fingerprint)
        assert client.search_runs([experiment.experiment_id], here), here
