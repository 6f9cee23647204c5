"""Ends its own process with SIGKILL at a chosen request, file or byte.

`arm` runs inside the process that is to die, before the command line is called. What is counted are calls of
MLflow, from outside our code: the methods of SQLAlchemy's stores where a database is used directly, HTTP
requests where a server is, and files written into the artifacts.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """Where a process dies.

    Args:
        kind: `before` or `after` a call of the store, `file`: when a file of the artifacts is about to be
            made, `half`: when half of a file has been copied or sent there.
        index: Of the call or file, from 0.
    """

    kind: str
    index: int

    def __str__(self) -> str:
        return f"{self.kind} {self.index}"


@dataclass
class Steps:
    """Counts what a process does, and kills it at `point`.

    Args:
        point: Where; None only counts.
        seen: Name of each call, file and copy so far, by kind.
        log: File that gets one line a step, as the process cannot tell afterwards.
    """

    point: Point | None = None
    log: Path | None = None
    seen: dict[str, int] = field(default_factory=lambda: {"call": 0, "file": 0, "half": 0})
    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: threading.local = field(default_factory=threading.local)

    def next(self, kind: str, name: str) -> int:
        """The index of this step."""
        with self.lock:
            index = self.seen[kind]
            self.seen[kind] += 1
            if self.log is not None:
                with self.log.open("a") as out:
                    out.write(f"{kind} {index} {name}\n")
        return index

    def is_at(self, kind: str, index: int) -> bool:
        """Whether the process is to die there."""
        return self.point == Point(kind, index)

    def die_at(self, kind: str, index: int) -> None:
        """End the process if it is to die there."""
        if self.is_at(kind, index):
            die()


def die(pid: int | None = None) -> None:
    """End a process, by default this one, without a chance to do anything more."""
    os.kill(pid or os.getpid(), signal.SIGKILL)


def arm(steps: Steps, artifacts: Path | None) -> None:
    """Count the steps of this process from now on.

    Args:
        steps: Which also say where it dies.
        artifacts: Folder of a store that is used directly; None behind a server.
    """
    if artifacts is None:
        _wrap_requests(steps)
        return
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as Tracking

    for store in (Tracking, Registry, LocalArtifactRepository):
        for name, method in inspect.getmembers(store, inspect.isfunction):
            if not name.startswith("_"):
                setattr(store, name, _counted(steps, name, method))
    _watch_files(steps, artifacts)


def _counted(steps: Steps, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        if getattr(steps.inside, "call", False):  # a method of the store that calls another
            return method(*arguments, **options)
        index = steps.next("call", name)
        steps.die_at("before", index)
        steps.inside.call = True
        try:
            return method(*arguments, **options)
        finally:
            steps.inside.call = False
            steps.die_at("after", index)  # also when the answer was a refusal

    return call


def _watch_files(steps: Steps, root: Path) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = set("wax+") & set(mode or "") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if not writes:
                return
        elif event in ("os.rename", "os.link", "os.mkdir"):
            path = arguments[0] if event == "os.mkdir" else arguments[1]
        else:
            return
        if isinstance(path, str | os.PathLike) and str(path).startswith(str(root)):
            steps.die_at("file", steps.next("file", Path(path).name))

    sys.addaudithook(hook)
    copyfile = shutil.copyfile

    def half(source: Any, target: Any, **options: Any) -> Any:
        if str(target).startswith(str(root)) and steps.is_at("half", steps.next("half", Path(target).name)):
            content = Path(source).read_bytes()
            Path(target).write_bytes(content[: len(content) // 2])
            die()
        return copyfile(source, target, **options)

    shutil.copyfile = half  # type: ignore[assignment]


class _HalfSent:
    """A request's body that ends the process when half of it has been read."""

    def __init__(self, content: bytes) -> None:
        self._content, self._sent = content, False

    def __len__(self) -> int:
        return len(self._content)

    def read(self, size: int = -1) -> bytes:
        if self._sent:
            die()
        self._sent = True
        return self._content[: len(self._content) // 2]


def _wrap_requests(steps: Steps) -> None:
    import requests

    send = requests.Session.request

    @functools.wraps(send)
    def request(self: Any, method: str, url: str, *arguments: Any, **options: Any) -> Any:
        index = steps.next("call", f"{method} {url.partition('/api/')[2][:60]}")
        steps.die_at("before", index)
        body = options.get("data")
        if hasattr(body, "read") and steps.is_at("half", steps.next("half", url.rpartition("/")[2])):
            options["data"] = _HalfSent(body.read())
        try:
            return send(self, method, url, *arguments, **options)
        finally:
            steps.die_at("after", index)

    requests.Session.request = request  # type: ignore[method-assign]
