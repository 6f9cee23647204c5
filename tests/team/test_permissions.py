"""What each command does for accounts with READ, EDIT and MANAGE, as docs/team-server.md says."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner, Result
from mlflow.server.auth.client import AuthServiceClient
from mlflow.tracking import MlflowClient
from team.server import ADMIN, Server

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.tracking.registry.moves import history
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.server import login_name
from mechdiff_mlflow.tracking.store.store import open_store

PAGE = Path(__file__).parents[2] / "docs" / "team-server.md"
NAME = "toy-L2-mlp_out"
SWEEP = ("--sites", "L2/mlp_out", "--ranks", "2,full", "--alphas", "1", "--targets", "10")
REFUSED = "has no permission for this"


def mechdiff(*words: str) -> Result:
    result = CliRunner().invoke(cli, list(words), prog_name="mechdiff")
    assert "Traceback" not in result.output
    return result


def enter(server: Server, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.login(user).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def owned(team: Server, toy: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Runs and a champion of ann's, in an experiment of her own."""
    enter(team, "ann", monkeypatch)
    for words in (
        (
            "run",
            "--pair",
            str(toy),
            "--layer",
            "2",
            "--hook",
            "mlp_out",
            "--alpha",
            "1",
            "--promote",
            "--force",
        ),
        ("sweep", "--pair", str(toy), *SWEEP),
    ):
        result = mechdiff(*words, "--experiment", "of-ann")
        assert result.exit_code == 0, result.output
    client = MlflowClient(team.uri_of("ann"))
    experiment = client.get_experiment_by_name("of-ann").experiment_id
    runs = client.search_runs([experiment], order_by=["attributes.start_time ASC"])
    fit = next(run for run in runs if run.data.tags["mechdiff.kind"] == "fit")
    cell = next(run for run in runs if "mechdiff.map_sha256" in run.data.tags and "k=2" in run.info.run_name)
    return {"experiment": experiment, "fit": fit.info.run_id, "cell": cell.info.run_id, "toy": str(toy)}


def test_the_table_of_permissions(
    team: Server, owned: dict[str, str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bob tries everything with READ, then EDIT, then MANAGE; the page says what he found."""
    pair = ("--pair", owned["toy"], "--experiment", "of-ann")
    one = ("--layer", "2", "--hook", "mlp_out", "--alpha", "1")
    tries = {
        "mechdiff runs": ("runs", "--pair", "toy"),
        "mechdiff fetch": ("fetch", f"{NAME}@champion", "-o", "map.pt"),
        "mechdiff maps": ("maps",),
        "mechdiff maps history": ("maps", "history", NAME),
        "mechdiff report": ("report", *pair),
        "mechdiff fit": ("fit", *pair, *one),
        "mechdiff promote FIT": ("promote", owned["fit"], "--name", NAME, "--alias", "bobs", "--force"),
        "mechdiff promote CELL": ("promote", owned["cell"], "--name", NAME, "--alias", "third", "--force"),
        "mechdiff run --promote": ("run", *pair, *one, "--promote", "staging", "--force"),
        "mechdiff maps demote": ("maps", "demote", NAME, "--alias", "champion"),  # last: MANAGE may
    }
    ann = AuthServiceClient(team.uri_of("ann"))
    enter(team, "bob", monkeypatch)
    allowed = {}
    for level in ("READ", "EDIT", "MANAGE"):
        for right in (("bob", "experiment", owned["experiment"]), ("bob", "registered_model", NAME)):
            if level != "READ":
                ann.revoke_user_permission(*right)
            ann.grant_user_permission(*right, level)
        for what, words in tries.items():
            words = tuple(word for word in words if word != "--force" or "--force" in help_of(words[0]))
            result = mechdiff(*words)
            if result.exit_code:
                assert REFUSED in result.output, (level, what, result.output)
            else:
                allowed.setdefault(what, level)
            if level == "READ":
                versions = MlflowClient(team.uri_of("ann")).search_model_versions(f"name = '{NAME}'")
                assert all("mechdiff.verified" in version.tags for version in versions), what
                assert len(versions) == 1
    for right in (("bob", "experiment", owned["experiment"]), ("bob", "registered_model", NAME)):
        ann.revoke_user_permission(*right)
    rows = re.findall(r"^\| `(.*?)`.* \| (READ|EDIT|MANAGE) \|", PAGE.read_text(), re.MULTILINE)
    assert dict(rows) == allowed
    assert [move.who for move in history(open_store(), NAME, "bobs")] == ["bob"]


def help_of(command: str) -> str:
    return CliRunner().invoke(cli, [command, "--help"]).output


def test_who_may_not_promote_is_told_before_models_load(
    team: Server, owned: dict[str, str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(team, "bob", monkeypatch)
    monkeypatch.setattr(Tracker, "run", lambda *_, **__: pytest.fail("it went on"))
    site = ("--layer", "2", "--hook", "mlp_out")
    for words in (("run", *site, "--promote"), ("atlas", "--hooks", "mlp_out", "--promote-best", "1")):
        result = mechdiff(*words, "--pair", owned["toy"], "--experiment", "of-bob")
        assert REFUSED in result.output
    monkeypatch.setattr(Tracker, "run", lambda *_, **__: 1 / 0)
    others = ("--hooks", "attn_out", "--promote-best", "1")  # whose names are free
    result = mechdiff("atlas", *others, "--pair", owned["toy"], "--experiment", "of-bob")
    assert "ZeroDivisionError" in result.output


@pytest.mark.parametrize(
    ("user", "password"),
    [
        ("zoë", "50%-of-all-12"),
        ("zoë", "ключ-от-всего-12"),
        ("p%c", "100%25-and-more"),
        ("p%c", "pass wörd/@:?#12"),
    ],
)
def test_names_and_passwords_may_have_any_character(
    team: Server, user: str, password: str, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    user = f"{user}-{abs(hash(password)) % 999}"
    enter(team, ADMIN, monkeypatch)
    AuthServiceClient(team.uri).create_user(user, password)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    store = open_store()
    assert store.client.search_experiments(max_results=1) is not None
    assert login_name(store.uri) == user
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    uri = team.uri.replace("://", f"://{quote(user, safe='')}:{quote(password, safe='')}@")
    store = open_store(uri)
    assert store.client.search_experiments(max_results=1) is not None
    assert login_name(store.uri) == user
    assert open_store(store.uri).uri == store.uri
    for secret in (password, quote(password, safe="")):
        assert secret not in store.shown
        assert secret not in mechdiff("maps", "history", "none", "--tracking-uri", uri).output
