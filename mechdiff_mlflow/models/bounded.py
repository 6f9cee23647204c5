"""Work on strangers' data in a child process that may take only so much time and memory."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from mechdiff_mlflow.errors import MechdiffError

SECONDS = 20
"""Processor time that any work may take."""

BYTES = 2 << 30
"""Memory that it may take beyond what this process has."""

_PATIENCE = 15
"""Times its processor time that it may take by the clock, as on a busy machine."""


def bounded(what: str, work: Callable[[], Any], *, seconds: int = 0) -> Any:
    """What `work` gives, from a copy of this process that ends with it; only where there is fork, on Linux.

    Args:
        what: What is worked on, at the start of errors.
        work: Gives something that JSON can hold; what it changes is lost.
        seconds: Processor time beside `SECONDS`.

    Raises:
        MechdiffError: `work` raised one, or took more time or memory.
    """
    if not sys.platform.startswith("linux"):
        return work()
    seconds += SECONDS
    mine, its = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child needs none of their locks
        child = os.fork()
    if child == 0:
        try:
            os.close(mine)
            _answer(work, its, seconds)
        finally:
            os._exit(0)
    os.close(its)
    try:
        answer = _read(mine, time.monotonic() + _PATIENCE * seconds)
    finally:
        os.close(mine)
        ended = 0
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # where children are not kept
            os.kill(child, signal.SIGKILL)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer is None or -ended == signal.SIGXCPU:
        raise MechdiffError(
            f"{what} took over {seconds} s of processor time, more than is allowed; {_REMEDY}."
        )
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):  # killed, or aborted as its libraries do without memory
        found = {"ended": f"took over {BYTES >> 20} MiB of memory, more than is allowed"}
    if "result" in found:
        return found["result"]
    raise MechdiffError(found.get("refused") or f"{what} {found['ended']}; {_REMEDY}.")


_REMEDY = "do not use this tokenizer or chat template, or set template: base, tuned or none to go without it"


def _read(file: int, until: float) -> bytes | None:
    """All that is written to a pipe; None when that takes too long."""
    parts: list[bytes] = []
    while select.select([file], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(file, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None


def _answer(work: Callable[[], Any], file: int, seconds: int) -> None:
    """In the child: do the work within bounds, and write what came of it."""
    import resource  # there is none on Windows

    faulthandler.disable()
    gc.freeze()  # nothing of the parent's is to be finalised here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too, and ends this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not here
    with open("/proc/self/statm") as statm:
        has = int(statm.read().split()[0]) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, has + BYTES),
        (resource.RLIMIT_CPU, seconds),
    ):
        hard = resource.getrlimit(limit)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (least, hard))
    try:
        found = {"result": work()}
    except MechdiffError as error:
        found = {"refused": str(error)}
    except MemoryError:
        found = {"ended": f"took over {BYTES >> 20} MiB of memory, more than is allowed"}
    except BaseException as error:
        found = {"ended": f"failed ({type(error).__name__}: {str(error)[:200]})"}
    with open(file, "wb") as pipe:
        pipe.write(json.dumps(found).encode())
