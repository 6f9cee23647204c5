"""What a killed command left is finished by `mechdiff resume`, and shown by `mechdiff runs --stuck`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.conftest import Invoke
from cli.test_run import runs_of
from mlflow import MlflowClient
from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from mechdiff_mlflow.cli import resume
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.requests import PatchRequest
from mechdiff_mlflow.tracking.commands import computing
from mechdiff_mlflow.tracking.content.tag_names import ROOT_TAG
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.runs.resuming import RESUME_TAG, Command, user_of
from mechdiff_mlflow.tracking.runs.tracker import OpenRun
from mechdiff_mlflow.tracking.store import store as stores
from mechdiff_mlflow.tracking.store.store import open_store

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
    gone = Command(("sweep",), str(tmp_path / "gone"), code_version(), parent=True)
    with pytest.raises(MechdiffError, match=r"go there \(on that machine\) and resume"):
        gone.check(parent, is_ours=True)
    assert "does not say which command it is of" in refused(argv="sweep")
    child, *_ = runs_of(client)["patch"]
    shown = " ".join(mechdiff("resume", child.info.run_id, code=1).output.split())
    assert f"resume its parent {run_id}" in shown
    assert "--repair and --id are for stuck runs" in mechdiff("runs", "--repair", code=1).output
    assert "are KILLED now" in mechdiff("runs", "--stuck", "--repair").output
    assert [run.info.status for run in runs_of(client)["sweep"]] == ["KILLED"]


@pytest.fixture
def planted(client: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Makes a run with a command in its tag, as a colleague with access can; no pair may load."""
    monkeypatch.setattr(computing, "load_pair", lambda *_, **__: pytest.fail("it went as far as the models"))
    experiment = client.create_experiment("planted")

    def plant(*argv: object, **more: object) -> str:
        fields = {"argv": argv, "folder": "", "code": code_version(), "parent": True, **more}
        tags = {
            RESUME_TAG: json.dumps(fields),
            "mlflow.user": "mallory",
            "mechdiff.process": "far, process 1",
        }
        return str(client.create_run(experiment, tags=tags, run_name="bait").info.run_id)

    return plant


def untouched(client: MlflowClient, run_id: str) -> bool:
    run = client.get_run(run_id)
    return run.info.status == "RUNNING" and not any(
        key.startswith("mechdiff.lease.") for key in run.data.tags
    )


def said(mechdiff: Invoke, *words: str, code: int = 1) -> str:
    return " ".join(mechdiff(*words, code=code).output.split())


def test_a_planted_run_is_not_resumed_and_its_code_is_never_trusted(
    mechdiff: Invoke, client: MlflowClient, toy: Path, here: Path, planted: Callable[..., str]
) -> None:
    evil = here.parent / "evil.yaml"
    evil.write_text(f"{toy.read_text()}\ntrust_remote_code: true\n")
    run_id = planted("run", "--pair", str(evil), "--layer", "2")
    shown = said(mechdiff, "resume", code=0)
    assert "Nothing of yours in" in shown
    assert f"Of others or from other machines (1): {run_id} bait (mallory on far)" in shown
    for words in ((run_id,), (run_id, "--yes")):
        assert "names a file outside of this folder with --pair" in said(mechdiff, "resume", *words)
    for folder in (toy.parent, here):  # prompts lie beside the spec
        (folder / "trusting.yaml").write_text(evil.read_text())
    inside = planted("run", "--pair", "trusting.yaml", "--layer", "2")
    shown = said(mechdiff, "resume", inside)
    assert f"You did not begin run {inside} on this machine (mallory on far)" in shown
    assert "`mechdiff run --pair trusting.yaml " in shown
    assert " --layer 2 " in shown
    for words in ((), ("--", "--pair", str(toy.parent / "trusting.yaml"))):
        shown = said(mechdiff, "resume", inside, "--yes", *words)
        assert "says trust_remote_code: true, and nothing on this machine says that you began" in shown
    assert untouched(client, run_id)
    assert untouched(client, inside)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["run", "--tracking-uri", "http://evil.example"], "with '--tracking-uri', which is not taken"),
        (["run", "--address", "10.0.0.1:6379"], "with '--address', which is not taken from a store"),
        (["run", "--promote", "--address=10.0.0.1:1"], "with '--promote', which is not taken from a store"),
        (["run", "--promote", "--pair=/etc/passwd"], "with '--promote', which is not taken from a store"),
        (["run", "--pair=/etc/passwd"], "with '--pair=/etc/passwd', which is not taken from a store"),
        (["run", "--help"], "with '--help', which is not taken from a store"),
        (["run", "--layer"], "with '--layer', which is not taken from a store"),
        (["sweep", "--exec", "rm"], "with '--exec', which is not taken from a store"),
        (["run", "more"], "with 'more', which is not taken from a store"),
        (["run", "--layer", "two"], "'two' is not a whole number"),
        (["run", "--pair", "../toy.yaml"], "names a file outside of this folder with --pair"),
        (["patch", "--map", "/etc/passwd"], "names a file outside of this folder with --map"),
        (["run", "--promote", "champion"], "moves an alias with --promote 'champion'"),
        (["atlas", "--promote-best", "3"], "moves an alias with --promote-best '3'"),
        (["resume", "--yes"], "asks for `resume`, which is not resumed"),
        (["maps"], "asks for `maps`, which is not resumed"),
        ([], "does not say which command it is of"),
        ([1, 2], "does not say which command it is of"),
    ],
)
def test_what_a_store_says_is_data(
    mechdiff: Invoke, client: MlflowClient, planted: Callable[..., str], argv: list[object], sentence: str
) -> None:
    run_id = planted(*argv)
    assert sentence in said(mechdiff, "resume", run_id, "--yes")
    assert untouched(client, run_id)


def test_a_tag_that_is_no_command_disturbs_nobody(
    mechdiff: Invoke, client: MlflowClient, planted: Callable[..., str]
) -> None:
    for text in ("[" * 4000, "{", '{"argv": NaN}', "{}"):
        client.set_tag(planted("run"), RESUME_TAG, text)
    assert "Nothing of yours" in said(mechdiff, "resume", code=0) or "nothing to resume" in said(
        mechdiff, "resume", code=0
    )


def test_the_proof_of_a_run_proves_nothing_on_another_and_without_it_the_printed_remedy_works(
    mechdiff: Invoke, client: MlflowClient, toy: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_in(mechdiff, "sweep", toy, monkeypatch, *SWEEP)
    (mine,) = runs_of(client)["sweep"]
    (record,) = (here / "cache" / "mechdiff" / "began").iterdir()
    assert record.stat().st_mode & 0o077 == 0
    assert json.loads(record.read_text())["run_id"] == mine.info.run_id
    bait = client.create_run(mine.info.experiment_id, tags={RESUME_TAG: mine.data.tags[RESUME_TAG]})
    assert f"{bait.info.run_id}, which you did not begin on" in said(mechdiff, "resume", bait.info.run_id)
    record.unlink()
    assert "Of others or from other machines (2)" in said(mechdiff, "resume", code=0)
    shown = said(mechdiff, "resume", mine.info.run_id, "--", "--pair", str(toy))
    assert f"run mechdiff resume {mine.info.run_id} --yes" in shown
    shown = said(mechdiff, "resume", mine.info.run_id, "--yes", "--", "--pair", str(toy), code=0)
    assert f"Resuming sweep of 3 cells (run {mine.info.run_id}). mechdiff sweep --pair {toy}" in shown
    assert client.get_run(mine.info.run_id).info.status == "FINISHED"
    assert list(record.parent.iterdir()) == []  # nothing is kept of what is finished


@pytest.mark.parametrize("name", resume.RESUMABLE)
def test_a_command_as_we_write_it_is_read_as_it_was(name: str) -> None:
    request = resume.RESUMABLE[name]
    given = {"map": "a@champion"} if request is PatchRequest else {}
    words = request(**given).words(lambda field, option: not option.is_resumed)
    assert resume._validated("r", words, (), is_ours=True) == words
    assert resume._validated("r", words, (), is_ours=False)[:3] == words[:3]


def test_who_one_is_is_the_login_where_there_is_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"sqlite:///{here / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    assert user_of(stores.Store("http://127.0.0.1:5", store.client)) == "login ann"
    assert not user_of(store).startswith("login")


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
