"""Promotion, its policy and the history of an alias, from the command line."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
import pytest
from cli.conftest import Invoke
from tracking.conftest import make_map

from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.content.tag_names import SELECTION_LEAK
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import open_store

NAME = "demo-L3-attn_out"


@pytest.fixture
def measured(here: Path) -> list[str]:
    """Measured maps of one site: weak (drop 12 %, [-2, 20]) and strong (drop 40 %, [35, 44], skill 25)."""
    tracker = Tracker(open_store(f"sqlite:///{here / 'mlflow.db'}"), "demo")
    runs = []
    skill = {"skill_pct": 25.0, "ci/skill_pct_low": 20.0, "ci/skill_pct_high": 30.0}
    for seed, (drop, low, high, more) in enumerate(((12.0, -2.0, 20.0, {}), (40.0, 35.0, 44.0, skill))):
        params = {"pair": "demo", "layer": 3, "hook": "attn_out", "k": 2, "alpha": 1.0}
        metrics = {"KL_raw": 1.0, "KL_mapped": 1 - drop / 100, "drop_pct": drop, **more}
        metrics |= {"ci/drop_pct_low": low, "ci/drop_pct_high": high}
        tags = {SELECTION_LEAK: "false"}
        with tracker.run("run", "L3/attn_out") as run:
            fit = run.log(RunRecord(kind="fit", name="fit", params=params, map=make_map(seed)))
            patch = RunRecord(
                kind="patch", name="patch", params=params, metrics=metrics, tags=tags, map_run=fit
            )
            runs.append(run.log(patch, under=fit))
    return runs


def test_what_happened_to_an_alias_can_be_seen_and_undone(mechdiff: Invoke, measured: list[str]) -> None:
    weak, strong = measured
    assert "@champion has no" not in mechdiff("promote", weak, "--force", "--why", "first [look]").output
    mechdiff("promote", strong, "--min-skill", "20", "--min-drop", "30")
    history = mechdiff("maps", "history", NAME).output
    assert "first [look]" in history
    assert "min_drop_pct 30, min_skill_pct 20" in history
    assert "version 1 is @champion again" in mechdiff("maps", "rollback", NAME, "--why", "typo").output
    mechdiff("maps", "demote", NAME)
    assert "No map has an alias" in mechdiff("maps").output
    mechdiff("maps", "rollback", NAME)
    assert NAME in mechdiff("maps").output
    history = mechdiff("maps", "history", NAME).output
    actions = [word for word in history.split() if word in ("promote", "rollback", "demote")]
    assert actions == ["promote", "promote", "rollback", "demote", "rollback"]
    assert "has ever been @second" in mechdiff("maps", "history", NAME, "--alias", "second").output


def test_two_versions_side_by_side(mechdiff: Invoke, measured: list[str]) -> None:
    for run in measured:
        mechdiff("promote", run, "--force")
    shown = mechdiff("maps", "diff", f"{NAME}/1", f"{NAME}@champion").output
    cells = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines()]
    rows = {line[0]: line[1:] for line in cells}
    assert rows["drop_pct"] == ["12.0", "40.0"]
    assert {"cosine of W", "cosine of W − I"} <= rows.keys()
    assert "alpha" not in rows
    assert "no version 3" in mechdiff("maps", "diff", f"{NAME}/3", f"{NAME}/1", code=1).output


def test_the_store_may_be_named_before_or_after_the_word(
    mechdiff: Invoke, measured: list[str], here: Path
) -> None:
    mechdiff("promote", measured[1])
    (here / "mlflow.db").rename(here / "elsewhere.db")
    uri = f"sqlite:///{here / 'elsewhere.db'}"
    assert "promote" in mechdiff("maps", "--tracking-uri", uri, "history", NAME).output
    assert "promote" in mechdiff("maps", "history", NAME, "--tracking-uri", uri).output


def test_a_policy_file_decides_and_options_go_on_top(
    mechdiff: Invoke, measured: list[str], here: Path, client: mlflow.MlflowClient
) -> None:
    weak, strong = measured
    (here / "policy.yaml").write_text("min_drop_pct: 30\nci_above_zero: true\n")
    refusal = mechdiff("promote", weak, "--policy", "policy.yaml", code=1).output
    assert "min_drop_pct: drop_pct is 12, at least 30 is asked for" in refusal
    assert "ci_above_zero: ci/drop_pct_low is -2" in refusal
    assert client.search_registered_models() == []
    refusal = mechdiff("promote", strong, "--policy", "policy.yaml", "--min-drop", "50", code=1).output
    assert "drop_pct is 40, at least 50" in refusal
    refusal = mechdiff("promote", strong, "--policy", "policy.yaml", "--min-skill", "26", code=1).output
    assert "by the rule min_skill_pct: skill_pct is 25, at least 26 is asked for" in refusal
    refusal = mechdiff("promote", weak, "--no-ci-above-zero", "--min-skill", "1", code=1).output
    assert "by the rule min_skill_pct: no skill_pct" in refusal
    mechdiff("promote", strong, "--policy", "policy.yaml")
    assert client.get_registered_model(NAME).aliases == {"champion": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("min_drop: 30", "min_drop: unknown key, remove it; its keys are min_drop_pct,"),
        ("min_drop_pct: thirty", "min_drop_pct: Input should be a valid number"),
        ("ci_above_zero: 1", "ci_above_zero: Input should be a valid boolean"),
        ("- 30", "Input should be a valid dictionary"),
        ("a: [", "is not valid YAML at line 1"),
        ("!!python/object/apply:os.system [echo]", "is not valid YAML"),
        ("min_drop_pct: .nan", "min_drop_pct is nan"),
        ("#" * 70_000, "over 65536"),
    ],
)
def test_a_wrong_policy_file_is_refused(mechdiff: Invoke, here: Path, text: str, words: str) -> None:
    (here / "policy.yaml").write_text(text)
    shown = " ".join(mechdiff("promote", "0" * 32, "--policy", "policy.yaml", code=1).output.split())
    assert words in shown


def test_a_missing_policy_file_is_refused(mechdiff: Invoke) -> None:
    assert "cannot be read" in mechdiff("promote", "0" * 32, "--policy", "no.yaml", code=1).output
