"""The team's server of docs/team-server.md, real: `mlflow server` with auth and an artifact proxy."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import requests
from mlflow.server.auth.client import AuthServiceClient
from team.postgres import Postgres, die_with_us, free_port

ADMIN = "admin"
NAME = "tracking.example"
"""What the reverse proxy calls the server."""
_QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
_START_S = 90


@dataclass(frozen=True)
class Server:
    """A running `mlflow server`.

    Args:
        uri: Its address, without credentials.
        folder: What it alone may read: artifacts, log, settings.
        passwords: Of its users by name.
        command: What started it.
        variables: Names of the environment variables that it got.
    """

    uri: str
    folder: Path
    passwords: dict[str, str] = field(repr=False)
    command: list[str]
    variables: set[str]

    def login(self, user: str) -> dict[str, str]:
        """The environment in which a user's programs reach the server."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": self.passwords[user],
        }

    def uri_of(self, user: str) -> str:
        """The address with a user's credentials in it, as some people write it."""
        return self.uri.replace("://", f"://{user}:{self.passwords[user]}@")

    def add_user(self, name: str) -> None:
        """Make a user with a password of their own; the admin's credentials must be in the environment."""
        self.passwords[name] = f"pw-{secrets.token_urlsafe(12)}"
        AuthServiceClient(self.uri).create_user(name, self.passwords[name])


@contextmanager
def team_server(folder: Path, database: Postgres, *, auth_cache_ttl_seconds: int = 60) -> Iterator[Server]:
    """PostgreSQL for the runs, another of its databases for the users, artifacts by way of the server."""
    settings = folder / "basic_auth.ini"
    settings.touch(mode=0o600)
    settings.write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"auth_cache_ttl_seconds = {auth_cache_ttl_seconds}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        f"database_uri = {database.create('mlflow_auth')}\n"
    )
    password = f"pw-{secrets.token_urlsafe(12)}"
    environment = {
        "MLFLOW_BACKEND_STORE_URI": database.create("mlflow"),
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
    }
    words = ["--app-name", "basic-auth", "--allowed-hosts", f"{NAME}:*,127.0.0.1:*"]
    words += ["--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")]
    with serve(folder, words, environment) as uri:
        command = [*_command(0), *words]
        yield Server(uri, folder, {ADMIN: password}, command, environment.keys() | _QUIET.keys())


@contextmanager
def serve(folder: Path, words: list[str], environment: Mapping[str, str]) -> Iterator[str]:
    """`mlflow server` with more words on a free port of loopback; its address, once it answers."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*_command(port), *words],
            cwd=folder,
            env={**own, **_QUIET, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_us(signal.SIGTERM),
        )
    try:
        _wait_until_it_answers(uri, process, folder / "server.log")
        yield uri
    finally:
        _stop(process)


def _command(port: int) -> list[str]:
    host = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *host]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and the workers that it started, which are in its process group."""
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, wanted)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
            return


def _wait_until_it_answers(uri: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if requests.get(f"{uri}/health", timeout=5).status_code == 200:
                return
        except requests.RequestException:
            time.sleep(0.1)
    raise RuntimeError(f"mlflow server did not start: {log.read_text()[-3000:]}")
