"""What a killed command left is finished by `mechdiff resume`, and shown by `mechdiff runs --stuck`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.conftest import Invoke
from cli.test_run import runs_of
from mlflow import MlflowClient
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from mechdiff_mlflow.tracking.keys import ROOT_TAG
from mechdiff_mlflow.tracking.recovery import RESUME_TAG
from mechdiff_mlflow.tracking.runs import OpenRun

SWEEP = ("--sites", "L3/attn_out:1", "--ranks", "1,2,full", "--targets", "30")


class Crash(BaseException):
    """Stands for SIGKILL."""


def crash_in(mechdiff: Invoke, command: str, toy: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run a command that dies after its first run below the parent, leaving all as it is then."""
    log = OpenRun._log
    done: list[str] = []

    def log_one(self: OpenRun, *arguments: object) -> str:
        if done:
            raise Crash
        done.append(log(self, *arguments))  # type: ignore[arg-type]
        return done[0]

    with monkeypatch.context() as patched:
        patched.setattr(OpenRun, "_log", log_one)
        patched.setattr(OpenRun, "_finish", lambda self, *_: None)
        with pytest.raises(Crash):
            mechdiff(command, "--pair", str(toy), *words)


def test_a_killed_sweep_is_resumed(
    mechdiff: Invoke, client: MlflowClient, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_in(mechdiff, "sweep", toy, monkeypatch, *SWEEP)
    left = runs_of(client)
    assert [run.info.status for run in left["sweep"]] == ["RUNNING"]
    (whole,) = [run for run in left["patch"] if run.info.status == "FINISHED"]
    (parent,) = left["sweep"]
    assert "dead" in mechdiff("runs", "--stuck").output
    shown = " ".join(mechdiff("resume").output.split())
    assert f"Resuming sweep of 3 cells (run {parent.info.run_id})" in shown
    assert "min k for 30 %" in shown
    found = runs_of(client)
    assert {run.info.status for runs in found.values() for run in runs} == {"FINISHED"}
    assert (len(found["sweep"]), len(found["patch"])) == (1, 3)
    assert {run.info.run_id for run in left["patch"]} <= {run.info.run_id for run in found["patch"]}
    (same,) = [run for run in found["patch"] if run.info.run_id == whole.info.run_id]
    assert same.info.end_time == whole.info.end_time
    assert "No run is stuck" in mechdiff("runs", "--stuck").output
    assert "there is nothing to resume" in mechdiff("resume").output
    assert "is finished; there is nothing to resume" in mechdiff("resume", parent.info.run_id).output


def test_a_lone_fit_is_resumed_in_its_own_run(
    mechdiff: Invoke, client: MlflowClient, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(OpenRun, "_finish", lambda self, *_: None)
        patched.setattr(OpenRun, "pin", _crash)
        with pytest.raises(Crash):
            mechdiff("fit", "--pair", str(toy), "--layer", "3")
    (left,) = runs_of(client)["fit"]
    mechdiff("resume", left.info.run_id, "--", "--batch-size", "8")
    (fit,) = runs_of(client)["fit"]
    assert (fit.info.run_id, fit.info.status) == (left.info.run_id, "FINISHED")
    assert fit.data.params["layer"] == "3"


def _crash(*_: object) -> None:
    raise Crash


def test_what_cannot_be_resumed_says_why(
    mechdiff: Invoke, client: MlflowClient, toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crash_in(mechdiff, "sweep", toy, monkeypatch, *SWEEP)
    (parent,) = runs_of(client)["sweep"]
    run_id = parent.info.run_id
    fields = json.loads(parent.data.tags[RESUME_TAG])

    def refused(**changes: object) -> str:
        client.set_tag(run_id, RESUME_TAG, json.dumps({**fields, **changes}))
        return " ".join(mechdiff("resume", run_id, code=1).output.split())

    assert "was begun with mechdiff 0.0.1 and this is" in refused(code="0.0.1")
    assert "asks for `export`, which is not resumed" in refused(argv=["export", "--out", "/etc/x"])
    assert "go there (on that machine) and resume" in refused(folder=str(tmp_path / "gone"))
    assert "does not say which command it is of" in refused(argv="sweep")
    child, *_ = runs_of(client)["patch"]
    shown = " ".join(mechdiff("resume", child.info.run_id, code=1).output.split())
    assert f"resume its parent {run_id}" in shown
    assert "--repair and --id are for stuck runs" in mechdiff("runs", "--repair", code=1).output
    assert "are KILLED now" in mechdiff("runs", "--stuck", "--repair").output
    assert [run.info.status for run in runs_of(client)["sweep"]] == ["KILLED"]


def test_orphans_are_listed_and_ended_past_what_may_not_be(
    mechdiff: Invoke, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mlflow gc` took the parent away; one of its runs may not be written."""
    experiment_id = client.create_experiment("toy")
    top = client.create_run(experiment_id).info.run_id
    locked, child = (client.create_run(experiment_id, tags={ROOT_TAG: top}).info.run_id for _ in range(2))
    plain = client.create_run(experiment_id).info.run_id
    client._tracking_client.store._hard_delete_run(top)
    shown = " ".join(mechdiff("runs", "--stuck").output.split())
    assert all(run_id[:8] in shown for run_id in (locked, child, plain))
    assert shown.count("orphan") == 2
    set_tag = SqlAlchemyStore.set_tag

    def refuse(self: SqlAlchemyStore, run_id: str, tag: RunTag) -> None:
        if run_id == locked:
            raise MlflowException("endpoint /api/2.0/mlflow/runs/set-tag failed with error code 403")
        set_tag(self, run_id, tag)

    with monkeypatch.context() as patched:
        patched.setattr(SqlAlchemyStore, "set_tag", refuse)
        said = mechdiff("runs", "--stuck", "--repair", code=1).output
    assert "1 of 3 are KILLED now." in said
    assert f"Left:   {locked}: " in said
    assert "1 of 2 runs could not be ended" in " ".join(said.split())
    assert [client.get_run(one).info.status for one in (locked, child)] == ["RUNNING", "KILLED"]
    assert "1 of 2 are KILLED now." in mechdiff("runs", "--stuck", "--repair").output
    assert "is not stuck" in mechdiff("runs", "--stuck", "--repair", "--id", child, code=1).output
    mechdiff("runs", "--stuck", "--repair", "--id", plain)
    assert client.get_run(plain).info.status == "KILLED"
