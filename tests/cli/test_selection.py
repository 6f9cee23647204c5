"""What was chosen on which prompts goes with the map, and a worse map does not replace a better one."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import mlflow
import pytest
from cli.conftest import Invoke
from cli.test_run import SITE, runs_of

from mechdiff_mlflow import load_map

GOOD = ("--layer", "3", "--hook", "attn_out", "--alpha", "1")


def other_pair(toy: Path, folder: Path, lines: list[str]) -> str:
    """A copy of the pair's folder whose `test` prompts are others."""
    shutil.copytree(toy.parent, folder)
    (folder / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / toy.name)


def lines_of(toy: Path, split: str) -> list[str]:
    return (toy.parent / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()


def last_patch(client: mlflow.MlflowClient) -> mlflow.entities.Run:
    return max(runs_of(client)["patch"], key=lambda run: run.info.start_time)


def test_a_choice_follows_the_map_to_every_measurement(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("fit", "--pair", str(toy), *SITE)
    (fit,) = runs_of(client)["fit"]
    words = ("patch", "--map", f"runs:/{fit.info.run_id}", "--pair")
    shown = mechdiff(*words, str(toy), "--split", "val").output
    assert "Leak: alpha chosen on the reported prompts" in shown.replace(", off_span", "")
    patch = last_patch(client)
    assert patch.data.tags["selection_leak"] == "true"
    refused = mechdiff("promote", patch.info.run_id, code=1).output
    assert "allow_leak: Leak: alpha" in refused
    mechdiff(*words, str(toy))
    assert last_patch(client).data.tags["selection_leak"] == "false"
    # Another name and another spelling of the same prompts, and a few of them among others.
    shouted = [json.dumps({"text": json.loads(line)["text"].upper() + " ?"}) for line in lines_of(toy, "val")]
    mixed = [*lines_of(toy, "test")[:12], *shouted[:4]]
    for name, lines, says in (
        ("copy", shouted, "Leak: alpha"),
        ("mixed", mixed, "(4 of 16 prompts)"),
        ("train", lines_of(toy, "train")[:16], "Leak: weights"),
    ):
        taken = {"train": "train.jsonl"}.get(name, "val.jsonl")
        pair = other_pair(toy, here / name, lines)
        # Splits must not share prompts: what was chosen on is no split of the other pair.
        (here / name / taken).write_text("\n".join(lines_of(toy, "test")[12:]), encoding="utf-8")
        shown = mechdiff(*words, pair, "--allow-pair-mismatch").output
        assert says in shown, shown
        assert last_patch(client).data.tags["selection_leak"] == "true"


def test_the_best_of_a_sweep_stays_so_until_other_prompts_measure_it(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("sweep", "--pair", str(toy), "--sites", "L3/attn_out:1", "--ranks", "4,full", "--targets", "10")
    best = max(runs_of(client)["patch"], key=lambda run: run.data.metrics["skill_pct"])
    mechdiff("promote", best.info.run_id)
    version = client.get_model_version_by_alias("toy-L3-attn_out", "champion")
    assert "It is a cell (one of 2) reported together" in version.description
    mechdiff("report-pass", "--pair", str(toy))
    assert last_patch(client).data.tags["selection_leak"] == "true"
    mechdiff("report", "--pair", str(toy))
    report = (here / "mechdiff-report.md").read_text()
    assert "Leak: cell (one of 2) chosen on the reported prompts" in report
    assert "report-pass) --pair COPY.yaml --allow-pair-mismatch" in report
    # The advice, followed.
    fresh = [json.dumps({"text": f"well subject{i} verb{j} does"}) for i in range(4) for j in range(4)]
    pair = other_pair(toy, here / "fresh", fresh)
    mechdiff("report-pass", "--pair", pair, "--allow-pair-mismatch")
    assert last_patch(client).data.tags["selection_leak"] == "false"
    mechdiff("report", "--pair", pair)
    assert "Leak:" not in (here / "mechdiff-report.md").read_text().partition("## Caveats")[2]


def test_a_worse_map_does_not_replace_a_better_one_and_the_work_stays(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("run", "--pair", str(toy), *GOOD, "--promote")
    shown = mechdiff("run", "--pair", str(toy), *GOOD[:4], "--alpha", "0.6", "--promote", code=1).output
    assert "KL_mapped" in shown
    assert "force: it is worse on the same prompts; the present version has drop" in shown
    assert [run.info.status for run in runs_of(client)["run"]] == ["FINISHED"] * 2
    assert load_map("toy-L3-attn_out@champion").alpha == 1
    # What the refusal says to type works.
    words = shown.rsplit("waive it: mechdiff ", 1)[1].rstrip(".\n").split()
    said = mechdiff(*words).output
    assert "toy-L3-attn_out@champion: version 1 with drop" in said
    assert "gives way to version 2 with drop" in said
    assert load_map("toy-L3-attn_out@champion").alpha == 0.6
    assert words[-1] == "--force"
    mechdiff(*words[:-1], "--forced", "no")  # as `mlflow run -e promote` says it; the map has the alias
    again = mechdiff(*words[:-1], "--forced", "yes").output
    assert "is this very map already, version 2; nothing moves" in again


@pytest.mark.parametrize("by", ["--tracking-uri", "MLFLOW_TRACKING_URI"])
def test_what_a_refusal_says_to_type_works_wherever_the_store_was_named(
    toy: Path, here: Path, mechdiff: Invoke, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    (here / "a b").mkdir()
    (here / "mlflow.db").rename(here / "a b" / "mlflow.db")
    uri = f"sqlite:///{here}/a b/mlflow.db"
    given = ("--tracking-uri", uri) if by.startswith("--") else ()
    if not given:
        monkeypatch.setenv(by, uri)
    mechdiff("run", "--pair", str(toy), *GOOD, "--promote", *given)
    shown = mechdiff(
        "run", "--pair", str(toy), *GOOD[:4], "--alpha", "0.6", "--promote", *given, code=1
    ).output
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    waive = shlex.split(shown.rsplit("waive it: ", 1)[1])
    assert "gives way to version 2 with drop" in mechdiff(*waive[1:]).output
    assert not list(Path().iterdir())
    shown = mechdiff("maps", "--tracking-uri", uri).output
    assert "toy-L3-attn_out" in shown


def test_what_cannot_be_promoted_is_refused_before_the_work(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    shown = mechdiff("run", "--pair", str(toy), *SITE, "--split", "val", "--promote", code=1).output
    assert "α would be chosen on the val prompts that are reported" in shown
    assert client.get_experiment_by_name("toy") is None
    mechdiff("run", "--pair", str(toy), *SITE, "--split", "val", "--promote", "--force")


@pytest.mark.parametrize("family", ["update"])
def test_a_map_that_does_harm_is_said_to(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient, family: str
) -> None:
    words = ("--layer", "3", "--hook", "attn_out", "--alpha", "30", "--family", family)
    shown = mechdiff("run", "--pair", str(toy), *words, "--promote", code=1).output
    assert "is not linearly transportable by these maps: KL rises" in shown
    assert "ci_above_zero" in shown
    (patch,) = runs_of(client)["patch"]
    mechdiff("promote", patch.info.run_id, "--force")
    card = client.get_model_version_by_alias("toy-L3-attn_out", "champion").description
    assert "the map is **worse** than no map at all:" in card
    assert "It is **worse** than the best control" in card
    assert "beaten" not in card
