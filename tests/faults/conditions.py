"""What a process meets from its start: little disk, no rights, little memory, odd clocks, little patience.

Each is called in the new process before the command line, by its name.
"""

from __future__ import annotations

import ctypes
import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

_LARGEST_FILE = 2 << 20
_CAPABILITY_VERSION = 0x20080522
_DAY_S = 86_400.0


def small_files() -> None:
    """No file may grow beyond 2 MiB, as under a quota; Python then raises OSError (EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))


def no_override() -> None:
    """Obey file modes even as root: give the capabilities up that ignore them."""
    if os.geteuid() != 0:
        return

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Data(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]

    libc = ctypes.CDLL(None, use_errno=True)
    # Two zeroed words: nothing is permitted any more.
    if libc.capset(ctypes.byref(Header(_CAPABILITY_VERSION, 0)), ctypes.byref((Data * 2)())) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def little_memory() -> None:
    """A block of a model that is given more than 100 tokens finds no memory for them."""
    _memory(100)


def no_memory() -> None:
    """No block of a model finds memory for as much as one prompt, once the checks before a run are over."""
    _memory(1, after=80)


def clock_behind() -> None:
    """The clock is a day behind."""
    _clock(lambda real: real - _DAY_S)


def clock_jumps() -> None:
    """The clock jumps an hour ahead and back again, at every call."""
    calls = 0

    def shifted(real: float) -> float:
        nonlocal calls
        calls += 1
        return real + (3600.0 if calls % 2 else 0.0)

    _clock(shifted)


def own_machine() -> None:
    """Files of the machine go to TMPDIR, and so its lock files are its own."""
    tempfile.tempdir = None  # the process that this was forked from knew another


def short_timeout() -> None:
    """The same, and an owner on another machine counts as dead after four seconds."""
    from mechdiff_mlflow.tracking.runs import run_lock

    own_machine()
    run_lock.OWNER_TIMEOUT_S = 4.0


def slow_start() -> None:
    """The same, and loading a model takes five seconds more."""
    from transformers import PreTrainedModel

    short_timeout()
    load = PreTrainedModel.from_pretrained.__func__

    def slowly(cls: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(5)
        return load(cls, *arguments, **options)

    PreTrainedModel.from_pretrained = classmethod(slowly)


def _memory(most: int, after: int = 0) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward: Callable[..., Any] = LlamaDecoderLayer.forward
    calls = 0

    def small(self: Any, hidden_states: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after and hidden_states.shape[0] * hidden_states.shape[1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8 GiB.")
        return forward(self, hidden_states, *arguments, **options)

    LlamaDecoderLayer.forward = small


def _clock(shifted: Callable[[float], float]) -> None:
    now, now_ns = time.time, time.time_ns
    time.time = partial(_shifted_s, now, shifted)  # type: ignore[assignment]
    time.time_ns = partial(_shifted_ns, now_ns, shifted)  # type: ignore[assignment]


def _shifted_s(now: Callable[[], float], shifted: Callable[[float], float]) -> float:
    return shifted(now())


def _shifted_ns(now_ns: Callable[[], int], shifted: Callable[[float], float]) -> int:
    return int(shifted(now_ns() / 1e9) * 1e9)
