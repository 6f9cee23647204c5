"""A real `mlflow server` with proxied artifacts, on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 120
_QUIET = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


@dataclass
class Server:
    """A server that was started; `stop` may be called twice, and it may be started again at the same port.

    Args:
        url: Where it answers.
        folder: Of its database and artifacts.
        process: Its main process.
    """

    url: str
    folder: Path
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self.process.terminate()
        self.process.wait(30)

    def kill(self) -> None:
        """End it and its workers with SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def start(self) -> None:
        """Start it again, on the port and database it had, and wait until it answers."""
        self.process = _started(self.folder, int(self.url.rpartition(":")[2]))
        self.wait()

    def wait(self) -> None:
        """Return when it answers."""
        log = self.folder / "server.log"
        until = time.monotonic() + START_S
        while not _answers(self.url):
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server whose database and artifacts are in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}", folder, _started(folder, port))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def _started(folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "server.log").open("ab") as out:
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, **_QUIET}, stdout=out, stderr=out, start_new_session=True
        )


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health", timeout=5)
    except OSError:
        return False
    return True
