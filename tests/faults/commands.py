"""The command line in processes of its own, quickly: forked from an interpreter that has imported everything.

A process is started by a fork server (one thread, no store or model open), calls the console script's entry
point with its own arguments, directory and environment, and can be killed from outside or at a point inside.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.deadly import Point, Steps, arm

TIMEOUT_S = 300
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["faults.warm"])
_PATHS = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]


@dataclass(frozen=True)
class Place:
    """A directory that commands run in, with a store.

    Args:
        folder: Working directory; outputs of commands go to `<folder>/output-…`.
        uri: Of the store; a SQLite file in `folder` or a server.
        environment: Beside what the harness has.
    """

    folder: Path
    uri: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def artifacts(self) -> Path | None:
        """Where a store that is used directly keeps artifacts."""
        return self.folder / "mlartifacts" if self.uri.startswith("sqlite") else None


class Command:
    """A command that was started.

    Args:
        place: Where.
        words: Its arguments, without `mechdiff`.
        point: Where it kills itself; None nowhere.
        before: Called in the new process first, e.g. to limit it; must be importable.
        steps: File that gets a line for every step.
    """

    def __init__(
        self,
        place: Place,
        *words: str,
        point: Point | None = None,
        before: Callable[[], None] | None = None,
        steps: Path | None = None,
    ) -> None:
        self.words = words
        handle, name = tempfile.mkstemp(dir=place.folder, prefix="output-", suffix=".txt")
        os.close(handle)
        self._output = Path(name)
        environment = {**os.environ, **place.environment, "MLFLOW_TRACKING_URI": place.uri}
        _with_paths()
        arguments = (place, words, environment, self._output, point, before, steps)
        self._process = _FORKS.Process(target=_run, args=arguments)
        self._process.start()
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process.is_alive()

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send it a signal, unless it has ended."""
        if self.is_alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Its exit code, negative for a signal.

        Raises:
            TimeoutError: It did not end; it is killed then.
        """
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise TimeoutError(f"{' '.join(self.words)} ran over {timeout_s:g} s:\n{self.output[-3000:]}")
        return self._process.exitcode

    def leave(self, seconds: float) -> None:
        """Let it run for some seconds, or to its end."""
        self._process.join(seconds)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        """Return as soon as `condition` holds, or the command has ended.

        Raises:
            TimeoutError: Neither happened.
        """
        until = time.monotonic() + timeout_s
        while self.is_alive and not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"{' '.join(self.words)}:\n{self.output[-3000:]}")
            time.sleep(0.02)


def mechdiff(place: Place, *words: str, code: int | None = 0) -> str:
    """Run a command to its end; its output.

    Raises:
        AssertionError: It ended with another code than `code`, or showed a traceback.
    """
    command = Command(place, *words)
    found = command.wait()
    assert code is None or found == code, f"{' '.join(words)} ended with {found}:\n{command.output[-5000:]}"
    assert "Traceback" not in command.output, command.output
    return command.output


def error_of(output: str) -> str:
    """The one sentence that a command failed with; empty when it printed none."""
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    return lines[-1].removeprefix("Error: ") if lines else ""


def _with_paths() -> None:
    """Let the fork server find this package: it starts as a bare Python."""
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*_PATHS, *filter(None, known)]))


def _run(
    place: Place,
    words: Sequence[str],
    environment: Mapping[str, str],
    output: Path,
    point: Point | None,
    before: Callable[[], None] | None,
    steps: Path | None,
) -> None:
    os.setsid()  # a Ctrl-C of the harness is not one of the command
    out = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, encoding="utf-8")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place.folder)
    sys.argv = ["mechdiff", *words]
    if before is not None:
        before()
    if point is not None or steps is not None:
        arm(Steps(point, steps), place.artifacts)
    from mechdiff_mlflow.cli import main

    main()
