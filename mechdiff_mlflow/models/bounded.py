"""Work on strangers' data in a child process that may take only so much time and memory."""

from __future__ import annotations

import faulthandler
import gc
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from mechdiff_mlflow.errors import MechdiffError

SECONDS = 20
"""Processor time that any work may take."""

BYTES = 2 << 30
"""Memory that it may take beyond what this process has."""

_CLOCK = 15
"""Times its processor time that it may take by the clock, as on a busy machine."""

_TOO_MUCH_MEMORY = {"ended": f"took over {BYTES >> 20} MiB of memory, more than is allowed"}


def run_bounded(
    what: str,
    work: Callable[[], Any],
    *,
    seconds: int = 0,
    remedy: str = "do not use this tokenizer or chat template, or set template: base, tuned or none to go "
    "without it",
) -> Any:
    """What `work` gives, from a copy of this process that ends with it; only where there is fork, on Linux.

    Args:
        what: What is worked on, at the start of errors.
        work: Gives something that JSON can hold; what it changes is lost.
        seconds: Processor time beside `SECONDS`.
        remedy: What to do, at the end of errors.

    Raises:
        MechdiffError: `work` raised one, or took more time or memory.
    """
    if not sys.platform.startswith("linux"):
        return work()
    seconds += SECONDS
    answer, its_end = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_answer, args=(work, its_end, seconds))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child needs none of their locks
        child.start()
    its_end.close()
    found: dict[str, Any] = {"ended": f"took over {seconds} s of processor time, more than is allowed"}
    try:
        if answer.poll(_CLOCK * seconds):
            found = json.loads(answer.recv_bytes())
    except (EOFError, ValueError, RecursionError):  # killed, or aborted as its libraries do without memory
        child.join()
        found = found if child.exitcode == -signal.SIGXCPU else _TOO_MUCH_MEMORY
    finally:
        answer.close()
        child.kill()
        child.join()
    if "result" in found:
        return found["result"]
    raise MechdiffError(found.get("refused") or f"{what} {found['ended']}; {remedy}.")


def _answer(work: Callable[[], Any], pipe: Connection, seconds: int) -> None:
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
        found = _TOO_MUCH_MEMORY
    except BaseException as error:
        found = {"ended": f"failed ({type(error).__name__}: {str(error)[:200]})"}
    pipe.send_bytes(json.dumps(found).encode())
    os._exit(0)  # nothing of the parent's is to be run at exit here
