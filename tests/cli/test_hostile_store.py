"""What others wrote into a store costs its own row and a warning: no command fails, no terminal obeys."""

from __future__ import annotations

import logging
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner, Result
from mlflow.entities import Metric, Param, RunTag

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.tracking.store.server_check import rebase

ESCAPE, BIDI = "\x1b]0;owned\x07", "\u202e"
DEEP = "[" * 7_000
NAME = "toy-L2-attn_out"


@dataclass(frozen=True)
class Planted:
    """A copy of a good patch run with some of its fields replaced, which must cost that run alone."""

    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    is_listed: bool = False


RUNS = {
    "layer is text": Planted({"layer": "abc"}),
    "layer is negative": Planted({"layer": "-1"}),
    "layer is huge": Planted({"layer": "9" * 5_000}),
    "layer is a fraction": Planted({"layer": "2.5"}),
    "layer is NaN": Planted({"layer": "nan"}),
    "layer is true": Planted({"layer": "true"}),
    "hook is markup": Planted({"hook": "[/red]x"}),
    "k is markup": Planted({"k": "[/red]x"}),
    "k is zero": Planted({"k": "0"}),
    "k is deep": Planted({"k": "[" * 5_900}),
    "alpha is a word": Planted({"alpha": "fast"}),
    "alpha is infinite": Planted({"alpha": "inf"}),
    "n is a list": Planted({"n": "[1, 2]"}),
    "n is huge": Planted({"n": "1e400"}),
    "solver is HTML": Planted({"solver": "<img src=x onerror=alert(1)>"}),
    "solver is an escape": Planted({"solver": ESCAPE}),
    "split turns the text": Planted({"split": BIDI + "tset"}),
    "drop is NaN": Planted(metrics={"drop_pct": float("nan")}),
    "drop is infinite": Planted(metrics={"drop_pct": float("inf")}),
    "an end of the interval is NaN": Planted(metrics={"ci/drop_pct_low": float("nan")}),
    "null is markup": Planted(tags={"null": f"[/red]`<b>{ESCAPE}|x"}, is_listed=True),
    "lease is a list": Planted(tags={"mechdiff.lease.1": "[]", "mechdiff.lease.2": DEEP}, is_listed=True),
    "artifacts are deep": Planted(tags={"mechdiff.artifacts": DEEP}, is_listed=True),
    "undefined is HTML": Planted(
        tags={"mechdiff.undefined.skill_pct": "<script>alert(1)</script>\n# H ](javascript:x)"},
        is_listed=True,
    ),
    "name is an escape": Planted(tags={"mlflow.runName": f"[red]{ESCAPE}{BIDI}"}, is_listed=True),
}
MOVES = {
    "no JSON": "promote",
    "deep": DEEP,
    "list": "[1]",
    "null": "null",
    "other types": '{"action": 3, "source": null, "target": 1}',
    "huge number": '{"action": "promote", "source": null, "target": ' + "9" * 5_000 + "}",
    "late": '{"action": "promote", "source": null, "target": 1, "when_ms": 9223372036854775807}',
    "boolean": '{"action": "promote", "source": true, "target": 1}',
    "missing": '{"action": "promote"}',
    "markup": '{"action": "[/red]x", "source": 1, "target": 1, "why": "[/b]\\u001b]0;owned\\u0007"}',
}


def run_of(client: mlflow.MlflowClient, like: mlflow.entities.Run, planted: Planted, status: str) -> str:
    made = client.create_run(like.info.experiment_id, tags={"mechdiff.command": "mechdiff patch"})
    known = like.data
    params = {**known.params, **planted.params}
    tags = {k: v for k, v in known.tags.items() if not k.startswith(("mlflow.", "mechdiff.lease"))}
    metrics = {**known.metrics, **planted.metrics}
    client.log_batch(
        made.info.run_id,
        [Metric(k, v, 0, 0) for k, v in metrics.items()],
        [Param(k, v) for k, v in params.items()],
        [RunTag(k, v[:7_999]) for k, v in {**tags, **planted.tags}.items()],
    )
    client.set_terminated(made.info.run_id, status) if status != "RUNNING" else None
    return str(made.info.run_id)


@pytest.fixture(scope="module")
def hostile_store(
    toy: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str], str]:
    """A store with a sweep, a winner, and everything above planted; ids of the planted runs; a good one."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copy(empty_store, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    words = ["sweep", "--pair", str(toy), "--sites", "L2/attn_out,L3/attn_out", "--alphas", "1"]
    done = CliRunner().invoke(cli, [*words, "--ranks", "2", "--targets", "10", "--tracking-uri", uri])
    assert done.exit_code == 0, done.output
    client = mlflow.MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("toy")
    good = client.search_runs(
        [experiment.experiment_id], "params.layer = '2' and tags.`mechdiff.kind` = 'patch'"
    )
    (folder / "policy.yaml").write_text("ci_above_zero: false\nallow_leak: true\n")
    words = ["promote", good[0].info.run_id, "--name", NAME, "--policy", str(folder / "policy.yaml")]
    done = CliRunner().invoke(cli, [*words, "--tracking-uri", uri])
    assert done.exit_code == 0, done.output
    ids = {name: run_of(client, good[0], planted, "FINISHED") for name, planted in RUNS.items()}
    stuck = Planted(
        tags={"mlflow.runName": f"[/red]{ESCAPE}", "mechdiff.lease.1": DEEP, "mechdiff.resume": "[]"}
    )
    run_of(client, good[0], stuck, "RUNNING")
    for i, text in enumerate(MOVES.values()):
        client.set_registered_model_tag(NAME, f"mechdiff.move.champion.{500 + i:06d}.{i:08x}", text[:4_999])
    client.set_registered_model_tag(NAME, "mechdiff.turn.00", DEEP[:4_000])
    for i, value in enumerate(("abc", "nan", "1e999", f"[/red]{ESCAPE}", DEEP[:4_000])):
        model = f"toy-L3-{'abcde'[i]}"
        client.create_registered_model(model, {"mechdiff.kind": "map"})
        version = client.create_model_version(
            model, str(folder), run_id=good[0].info.run_id, tags={"drop_pct": value, "k": value}
        )
        client.set_registered_model_alias(model, "champion", version.version)
    client.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.mechdiff", DEEP[:4_000])
    client.set_experiment_tag(experiment.experiment_id, "mlflow.note.content", ESCAPE)
    return folder / "mlflow.db", ids, good[0].info.run_id


@pytest.fixture
def at(here: Path, hostile_store: tuple[Path, dict[str, str], str]) -> Path:
    shutil.copytree(hostile_store[0].parent, here, dirs_exist_ok=True)
    rebase(f"sqlite:///{here / 'mlflow.db'}")
    return here


COMMANDS = {
    "runs": ["runs"],
    "runs of a site": ["runs", "--pair", "toy", "--site", "L2/attn_out"],
    "runs --best": ["runs", "--best"],
    "runs --json": ["runs", "--json"],
    "runs --stuck": ["runs", "--stuck"],
    "maps": ["maps"],
    "history": ["maps", "history", NAME],
    "diff": ["maps", "diff", f"{NAME}/1", f"{NAME}@champion"],
    "report": ["report", "--pair", "PAIR"],
    "resume": ["resume"],
    "promote": ["promote", "GOOD", "--name", NAME],
    "fetch": ["fetch", f"{NAME}@champion", "-o", "map.pt"],
    "rollback": ["maps", "rollback", NAME],
    "demote": ["maps", "demote", NAME],
}
REFUSED = ("resume", "promote", "rollback")
"""May end with exit code 1 and one sentence: nothing to resume, nothing to go back to, a rule."""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_the_other_rows_and_obeys_nothing(
    name: str,
    at: Path,
    toy: Path,
    hostile_store: tuple[Path, dict[str, str], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, ids, good = hostile_store
    words = [word.replace("PAIR", str(toy)).replace("GOOD", good) for word in COMMANDS[name]]
    with caplog.at_level(logging.WARNING, "mechdiff_mlflow"):
        done: Result = CliRunner().invoke(cli, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0 or name in REFUSED, done.output
    warned = "\n".join(record.getMessage() for record in caplog.records)
    for text in (done.output, warned):
        assert "\x1b" not in text
        assert "\x07" not in text
        assert BIDI not in text
        assert len(text) < 200_000
    if name in ("runs", "runs of a site", "runs --json"):
        assert good in done.output
        for planted, run_id in ids.items():
            assert (run_id in done.output) == RUNS[planted].is_listed, planted
            elsewhere = name == "runs of a site" and {"layer", "hook"} & RUNS[planted].params.keys()
            assert f"run {run_id}" in warned or RUNS[planted].is_listed or elsewhere, planted
    if name == "maps":
        assert NAME in done.output
        for i in "abcde":
            assert f"map toy-L3-{i}/1: drop_pct is" in warned
    if name == "history":
        assert re.search(r"promote +none +1 ", done.output)
        assert warned.count(f"a move of {NAME}") == len(MOVES) - 1
    if name == "report":
        for path in ("mechdiff-report.md", "mechdiff-report.html"):
            text = (at / path).read_text(encoding="utf-8")
            assert "<script>alert" not in text
            assert "<img src=x" not in text
            assert "\x1b" not in text
            assert "](javascript" not in text
            assert {"L2/attn_out", "L3/attn_out"} <= set(re.findall(r"L\d/attn_out", text))
        # NaN is what a table has where a run has no such metric: n/a there.
        told = [p for p, run in RUNS.items() if (not run.is_listed and "NaN" not in p) or "layer" in p]
        assert [p for p in told if f"run {ids[p]}" not in warned] == []
