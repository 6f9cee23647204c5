"""SIGTERM, SIGHUP and Ctrl-C as exceptions that wait until a run is written whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mechdiff_mlflow.errors import MechdiffError

# SIGHUP, the closing of a terminal, does not exist on Windows.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Killed(SystemExit):
    """The process was told to end by a signal; exits with 128 + its number, as a shell would report."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signal_name = signal.Signals(signum).name


def ending(error: BaseException | None) -> tuple[str, str]:
    """The status and reason that an exception ends a run with."""
    if error is None:
        return "FINISHED", ""
    if isinstance(error, Killed):
        return "KILLED", f"Ended by {error.signal_name}."
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "Ended by Ctrl-C."
    if isinstance(error, GeneratorExit):
        return "KILLED", "The program stopped before the run was over."
    if isinstance(error, SystemExit):
        return ("FAILED", f"Exit code {error.code}.") if error.code else ("FINISHED", "")
    return "FAILED", str(error) if isinstance(error, MechdiffError) else f"{type(error).__name__}: {error}"


class Interrupts:
    """Turns signals into exceptions while active, and holds them back inside `deferred()`.

    By default Python dies of SIGTERM without running any `finally`, which leaves runs RUNNING for ever. Only
    the main thread can handle signals; elsewhere this does nothing.

    Args:
        hurry: Set when a signal comes, so that what is deferred does not wait for anything.
    """

    def __init__(self, hurry: threading.Event) -> None:
        self._depth = 0
        self._pending: int | None = None
        self._hurry = hurry

    @contextmanager
    def active(self) -> Iterator[None]:
        """Handle the signals in here; put the former handlers back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former: dict[int, Any] = {}
        self._hurry.clear()
        try:
            for signum in _SIGNALS:
                # A signal that someone ignores on purpose, as nohup does with SIGHUP, stays ignored.
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    former[signum] = signal.signal(signum, self._handle)
            yield
        finally:
            for signum, handler in former.items():
                signal.signal(signum, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let what runs in here finish first; a second Ctrl-C interrupts it all the same."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0 and self._pending is not None:
            signum, self._pending = self._pending, None
            self._raise(signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again = self._pending == signum
        self._hurry.set()
        if self._depth and not (again and signum == signal.SIGINT):
            self._pending = signum
        else:
            self._raise(signum)

    @staticmethod
    def _raise(signum: int) -> None:
        raise KeyboardInterrupt if signum == signal.SIGINT else Killed(signum)
