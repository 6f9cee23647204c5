"""docs/team-server.md describes the server that the tests start, and its snippets work."""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path

import pytest
from mlflow.server.auth.client import AuthServiceClient
from mlflow.tracking import MlflowClient
from team.server import ADMIN, Server

from mechdiff_mlflow.tracking.store.server_check import check_store

PAGE = (Path(__file__).parents[2] / "docs" / "team-server.md").read_text(encoding="utf-8")
ADDRESS = "https://mlflow.example.org"


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def options(words: list[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def test_the_page_starts_the_server_that_is_tested(team: Server) -> None:
    documented = next(block for block in blocks("bash") if block.startswith("mlflow server --host"))
    assert options(shlex.split(documented)) == options(team.command)
    ini = configparser.ConfigParser()
    ini.read_string(blocks("ini")[0])
    used = configparser.ConfigParser()
    used.read(team.folder / "basic_auth.ini")
    hidden = {"database_uri": None}
    assert {**ini["mlflow"], **hidden} == {**used["mlflow"], **hidden}
    variables = set(re.findall(r"^(\w+)=", "".join(blocks("bash")), re.MULTILINE))
    assert variables == team.variables


def test_the_snippets_change_the_password_and_make_users(
    team: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in team.login(ADMIN).items():
        monkeypatch.setenv(name, value)
    MlflowClient(team.uri).create_registered_model("cultural-demo-L26-attn_out")
    change, people = (block.replace(ADDRESS, team.uri) for block in blocks("python"))
    old, new = team.passwords[ADMIN], "pw-a-new-one-of-the-page"

    exec(change.replace("THE-NEW-ONE", new).replace("THE-FIRST-ONE", old), {})
    assert {f.check: f.level.value for f in check_store(team.uri)}["login"] == "FAIL"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", new)
    exec(people.replace('"experiment", "1"', '"experiment", "0"'), {})
    auth = AuthServiceClient(team.uri)
    auth.update_user_password(ADMIN, old, current_password=new)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", old)

    carol, password = capsys.readouterr().out.splitlines()[0].split()
    assert MlflowClient(team.uri.replace("://", f"://{carol}:{password}@")).search_experiments()
    granted = auth.get_user_permission("carol", "registered_model", "cultural-demo-L26-attn_out")
    assert "EDIT" in str(granted.__dict__)
