"""How much memory is free, as far as the system says."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on a device now; 0 where nobody says."""
    if device.type == "cuda":
        # What the allocator holds back for reuse is free to us.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return max(0, min(_of_machine(), _of_container())) if device.type == "cpu" else 0


def _of_machine() -> int:
    if _MEMINFO.exists():
        found = re.search(r"^MemAvailable: +(\d+) kB", _MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # not on every system
        return 0


def _of_container() -> int:
    """What is left of this process's limit; the cache of files gives way and does not count."""
    try:
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii")
    except (ValueError, OSError):  # "max", or there is none
        return sys.maxsize
    cached = sum(int(n) for n in re.findall(r"^(?:in)?active_file (\d+)$", stat, re.MULTILINE))
    return limit - used + cached
