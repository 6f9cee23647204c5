"""A cluster of our own: on loopback, with a token that is written nowhere, gone when it is done."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mechdiff_mlflow.cli import cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]

OWN = """
import json, os, pathlib, subprocess, sys, signal
import psutil
from mechdiff_mlflow.experiments.workers.cluster import connected

signal.signal(signal.SIGTERM, lambda *_: None)
handler = signal.getsignal(signal.SIGTERM)
with connected("own", 1) as ray:
    token = os.environ["RAY_AUTH_TOKEN"]

    @ray.remote
    def answer():
        return 42

    found = {"answer": ray.get(answer.remote()), "handler": signal.getsignal(signal.SIGTERM) is handler}
    us = psutil.Process()
    family = [us, *us.children(recursive=True)]
    found["listens"] = sorted(
        {c.laddr.ip for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    )
    found["names"] = [p.name() for p in family]
    context = ray.get_runtime_context()
    strange = "import ray, sys\\nray.init(address=sys.argv[1], logging_level=40)\\nprint('in')"
    changes = {"other": {"RAY_AUTH_TOKEN": "0" * 64}, "none": {"RAY_AUTH_MODE": "disabled"}}
    for name, change in changes.items():
        env = {**os.environ, **change, "RAY_NUM_REDIS_GET_RETRIES": "1"}
        words = [sys.executable, "-c", strange, context.gcs_address]
        found[name] = subprocess.run(words, env=env, capture_output=True, text=True).stdout
    session = pathlib.Path(ray._private.worker._global_node.get_session_dir_path())
    files = [p for p in session.rglob("*") if p.is_file()]
    found["written"] = [str(p) for p in files if token.encode() in p.read_bytes()]
    found["shown"] = [p.pid for p in family if p.is_running() and token in " ".join(p.cmdline())]
found["left"] = [p.pid for p in psutil.Process().children(recursive=True) if p.status() != "zombie"]
found["environment"] = sorted(name for name in os.environ if name.startswith("RAY_AUTH"))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("psutil", reason="psutil is not installed")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", OWN],
        env={**env, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("own"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_it_works_and_leaves_nothing(own: dict[str, Any]) -> None:
    assert own["answer"] == 42
    assert own["handler"], "who handles SIGTERM is as before"
    assert own["left"] == []
    assert own["environment"] == []


def test_it_listens_on_loopback_alone(own: dict[str, Any]) -> None:
    assert own["listens"]
    assert set(own["listens"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert any("gcs_server" in name for name in own["names"])
    assert not any("dashboard" in name.lower() and "agent" not in name.lower() for name in own["names"])


def test_nobody_comes_in_without_its_token(own: dict[str, Any]) -> None:
    assert "in" not in own["other"]
    assert "in" not in own["none"]


def test_its_token_is_in_no_file_and_no_command_line(own: dict[str, Any]) -> None:
    assert own["written"] == []
    assert own["shown"] == []


def test_a_fit_of_the_command_line_has_the_numbers_of_this_process(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    words = ("fit", "--pair", str(toy), "--layer", "3", "--hook", "resid_post")
    here = CliRunner().invoke(cli, words)
    assert here.exit_code == 0, here.output
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    there = subprocess.run(
        [sys.executable, "-m", "mechdiff_mlflow", *words, "--engine", "ray", "--workers", "1"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert there.returncode == 0, there.stderr
    tables = [
        [line for line in output.splitlines() if "procrustes_scaled" in line]
        for output in (here.output, there.stdout)
    ]
    assert tables[0] == tables[1]
    assert tables[0]
    assert not list((tmp_path / "cache/mechdiff/staging").iterdir()), "it goes when the run has ended"
