"""Clean runs that are kept: what was captured of a model need not run again to be patched."""

from __future__ import annotations

import os
import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechdiff_mlflow.engine.memory.activations import Activations
from mechdiff_mlflow.engine.memory.budget import MemoryBudget
from mechdiff_mlflow.engine.model.chunks import Chunk, ChunkPlan
from mechdiff_mlflow.engine.model.forward import Recording
from mechdiff_mlflow.spec.prompts import TokenizedPrompts
from mechdiff_mlflow.spec.sites import Site

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 4
"""Without a budget all recordings may take one part in so many of the memory that is free but for them."""


class CleanRunCache:
    """The clean runs that engines keep, within a budget or else a share of what is free.

    Engines that share one give up everything when memory runs out. It holds nothing alive: clean runs go with
    their last user.
    """

    def __init__(self, budget: MemoryBudget | None = None) -> None:
        self._budget = budget
        self._held: Counter[torch.device] = Counter()
        self._recorded: weakref.WeakSet[CleanRuns] = weakref.WeakSet()

    def reserve(self, n_bytes: Mapping[torch.device, int]) -> bool:
        """Whether what takes so many bytes, and exists already, may be kept; it counts until released."""
        if self._budget is not None:
            # Activations that do not fit are read from files; recordings are run again, which is no loss.
            return self._budget.reserve(sum(n_bytes.values()), sparing=True)
        held = self._held + Counter(n_bytes)
        if any(held[device] > (free_bytes(device) + held[device]) // _SHARE for device in n_bytes):
            return False
        self._held = held
        return True

    def release(self, n_bytes: Mapping[torch.device, int]) -> None:
        """Give back what was reserved."""
        if self._budget is not None:
            self._budget.release(sum(n_bytes.values()))
        else:
            self._held = self._held - Counter(n_bytes)

    def add(self, recorded: CleanRuns) -> None:
        """Take in clean runs that may be given up."""
        self._recorded.add(recorded)

    def give_up(self) -> int:
        """Free everything that is kept, of so many prompts."""
        return sum(recorded.give_up() for recorded in list(self._recorded))


class CleanRuns:
    """Clean runs of N prompts: activations at some sites, and of what fits in memory all that patches need.

    Made by `PatchEngine.record`. The prompts that do not fit are run again whenever they are patched. Sites
    and prompts never change; what is kept is given up when memory runs out, and freed with this object.
    `rows`, of these prompts and sites, are filled as chunks come in; without a cache nothing else is kept.
    """

    def __init__(
        self, prompts: TokenizedPrompts, rows: Activations, device: torch.device, cache: CleanRunCache | None
    ) -> None:
        self.prompts, self.sites = prompts, tuple(rows)
        self.activations, self._cache = rows, cache  # [N, width] of each site, once every prompt was run
        self._plan = ChunkPlan(prompts, device)
        self._kept: dict[int, Recording] = {}  # by the place in the order at which each begins
        self._begins: list[int | None] = [None] * len(prompts)  # for each place, where its recording begins
        self._done = torch.zeros(len(prompts), dtype=torch.bool)
        self._reserved: list[weakref.finalize[Any, Any]] = []
        self.is_full = cache is None  # so that no more is kept
        if cache is not None:
            cache.add(self)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def is_complete(self) -> bool:
        """Whether every prompt was run."""
        return bool(self._done.all())

    @property
    def n_kept(self) -> int:
        """Prompts that can be patched without another clean run."""
        return sum(map(len, self._kept.values()))

    def clean(self, sites: Sequence[Site]) -> Mapping[Site, Tensor]:
        """The activations at some sites, on the CPU."""
        return self.activations.of(sites)

    def has(self, sites: Iterable[Site]) -> bool:
        """Whether all of these were asked for."""
        return set(sites) <= set(self.sites)

    def n_tokens(self, start: int) -> int:
        """Length of the prompt at a place in the order."""
        return self._plan.n_tokens(start)

    def take(self, start: int, size: int) -> Chunk | Recording:
        """At most `size` prompts from a place in the order on: as they are kept, or to be run."""
        begins = self._begins[start]
        if begins is None:
            ahead = self._begins[start : start + size]
            return self._plan.take(start, next((i for i, b in enumerate(ahead) if b is not None), size))
        kept, first = self._kept[begins], start - begins
        return kept if first == 0 and len(kept) <= size else kept.part(slice(first, first + size))

    def to_record(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Where a chunk must be recorded of which some sites are to be patched."""
        return sites if self.is_complete and self.is_full else self.sites

    def add(self, recording: Recording) -> None:
        """Take over the activations of a chunk that was run."""
        if not self._done[recording.chunk.index].all():
            self.activations.add(recording)
            self._done[recording.chunk.index] = True

    def keep(self, recording: Recording) -> None:
        """Keep a chunk that was run, if it fits; after the first that does not, none is."""
        if self.is_full:
            return
        assert self._cache is not None
        if _storage(recording.logits).nbytes() > recording.logits.nbytes:  # a view of those of all tokens
            recording = replace(recording, logits=recording.logits.clone())
        n_bytes = _bytes_on(recording)
        if not self._cache.reserve(n_bytes):
            self.is_full = True
            return
        self._reserved.append(weakref.finalize(self, self._cache.release, n_bytes))
        begins = self._plan.order.index(int(recording.chunk.index[0]))
        self._kept[begins] = recording
        self._begins[begins : begins + len(recording)] = [begins] * len(recording)

    def give_up(self) -> int:
        """Keep nothing any more; says of how many prompts something was kept."""
        n_kept = self.n_kept
        self._kept.clear()
        self._begins = [None] * len(self.prompts)
        self.is_full = True
        for release in self._reserved:
            release()
        self._reserved.clear()
        return n_kept


def _bytes_on(recording: Recording) -> dict[torch.device, int]:
    """What a recording holds, by device; what is shared counts once."""
    storages = {(x.device, _storage(x).data_ptr()): _storage(x).nbytes() for x in _tensors(recording)}
    sizes: Counter[torch.device] = Counter()
    for (device, _), n_bytes in storages.items():
        sizes[device] += n_bytes
    return sizes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    parts: Iterable[Any] = value if isinstance(value, (tuple, list)) else ()
    if is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, dict):
        parts = value.values()
    for part in parts:
        yield from _tensors(part)


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


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
