"""Offline, the main job opens no connection at all with SQLite, and with a server none but to that server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from team.server import serve

ROOT = Path(__file__).parents[1]
GUARD = """
import os, sys

def note(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[:2]
        if not isinstance(address, (str, bytes)):  # those are sockets of this machine's files
            with open(os.environ["GUARD_LOG"], "a") as log:
                print(event, *address[:2], file=log)

sys.addaudithook(note)
"""
"""Python imports sitecustomize first of all, in every process that it starts."""


def connections(folder: Path, words: list[str], settings: Mapping[str, str]) -> list[str]:
    """What a command asks of the network: one line for each connection and each name that is looked up."""
    (folder / "guard").mkdir()
    (folder / "guard/sitecustomize.py").write_text(GUARD)
    log = folder / "log.txt"
    log.touch()
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HF_"))}
    path = os.pathsep.join([str(folder / "guard"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**own, "PYTHONPATH": path, "GUARD_LOG": str(log), "HF_HUB_OFFLINE": "1", **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return log.read_text().splitlines()


def main_job(toy: Path) -> list[str]:
    site = ["--layer", "3", "--hook", "resid_post", "--k", "4", "--alpha", "1", "--promote", "--force"]
    return ["-m", "mechdiff_mlflow", "run", "--pair", str(toy), *site]


def test_the_guard_notices(tmp_path: Path) -> None:
    code = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))"
    assert connections(tmp_path, ["-c", code], {}) == ["socket.connect 127.0.0.1 9"]


def test_none_with_sqlite(toy: Path, tmp_path: Path) -> None:
    assert connections(tmp_path, main_job(toy), {}) == []
    assert (tmp_path / "mlflow.db").is_file()


@pytest.mark.slow
def test_only_to_the_server(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    words = ["--backend-store-uri", f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}", "--serve-artifacts"]
    words += ["--artifacts-destination", str(tmp_path / "server" / "artifacts")]
    with serve(tmp_path / "server", words, {}) as uri:
        (tmp_path / "client").mkdir()
        found = connections(tmp_path / "client", main_job(toy), {"MLFLOW_TRACKING_URI": uri})
    port = uri.rpartition(":")[2]
    assert len(found) > 0
    assert {tuple(line.split()[1:]) for line in found} == {("127.0.0.1", port)}
