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

from mechdiff_mlflow.engine.model.chunks import Chunk, ChunkPlan
from mechdiff_mlflow.engine.model.forward import Recording
from mechdiff_mlflow.measures.metrics import top_tokens
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 4
"""Without a budget all recordings may take one part in so many of the memory that is free but for them."""
_BUDGET_SHARE = 8
"""With a budget they may take one part in so many of it."""


class CleanRunCache:
    """The clean runs that engines keep, within a budget in bytes or else a share of what is free.

    Engines that share one give up everything when memory runs out. It holds nothing alive: clean runs go with
    their last user.
    """

    def __init__(self, budget: int | None = None) -> None:
        self.budget = budget
        self._held: Counter[torch.device] = Counter()
        self._recorded: weakref.WeakSet[CleanRuns] = weakref.WeakSet()

    def reserve(self, n_bytes: Counter[torch.device]) -> bool:
        """Whether what takes so many bytes, and exists already, may be kept; it counts until released."""
        held = self._held + n_bytes
        if self.budget is not None:
            fits = held.total() <= self.budget // _BUDGET_SHARE
        else:
            fits = all(held[device] <= (free_bytes(device) + held[device]) // _SHARE for device in n_bytes)
        if fits:
            self._held = held
        return fits

    def release(self, n_bytes: Counter[torch.device]) -> None:
        """Give back what was reserved."""
        self._held = self._held - n_bytes

    def add(self, recorded: CleanRuns) -> None:
        """Take in clean runs that may be given up."""
        self._recorded.add(recorded)

    def give_up(self) -> int:
        """Free everything that is kept, of so many prompts."""
        return sum(recorded.give_up() for recorded in list(self._recorded))


class CleanRuns(ChunkPlan):
    """Clean runs of N prompts: activations at some sites, and of what fits in memory all that patches need.

    Made by `PatchEngine.record`. The prompts that do not fit are run again whenever they are patched. Sites
    and prompts never change; what is kept is given up when memory runs out, and freed with this object.
    Activations are filled in as chunks are run, on `rows_on`; without a cache nothing else is kept.
    """

    def __init__(
        self,
        prompts: TokenizedPrompts,
        sites: Sequence[Site],
        device: torch.device,
        cache: CleanRunCache | None = None,
        rows_on: torch.device | str = "cpu",
    ) -> None:
        super().__init__(prompts, device)
        self.sites = tuple(dict.fromkeys(sites))
        self.is_full = cache is None  # so that no more is kept
        self._rows_on, self._cache = torch.device(rows_on), cache
        self._rows: Tensor | None = None  # [N, sites, width]
        self._copied_from: torch.device | None = None  # the GPU from which copies may be under way
        self._done = torch.zeros(len(prompts), dtype=torch.bool)
        self.top = torch.zeros(len(prompts), 2, dtype=torch.float64)  # as by `top_tokens`, once run
        self._kept: dict[int, Recording] = {}  # by the first prompt of each
        self._reserved: Counter[torch.device] = Counter()
        if cache is not None:
            cache.add(self)
            weakref.finalize(self, cache.release, self._reserved)

    @property
    def is_complete(self) -> bool:
        """Whether every prompt was run."""
        return bool(self._done.all())

    @property
    def n_kept(self) -> int:
        """Prompts that can be patched without another clean run."""
        return sum(map(len, self._kept.values()))

    @property
    def activations(self) -> dict[Site, Tensor]:
        """Rows [N, width] by site, in the model's dtype, once every prompt was run; shorter ones end in 0."""
        if self._rows is None:
            return {}
        if self._copied_from is not None:
            torch.cuda.synchronize(self._copied_from)
        return dict(zip(self.sites, self._rows.unbind(1), strict=True))

    def has(self, sites: Iterable[Site]) -> bool:
        """Whether all of these were asked for."""
        return set(sites) <= set(self.sites)

    def take(self, start: int, size: int) -> Chunk:
        """A chunk as it is kept, whatever its size, or else as `ChunkPlan.take`."""
        kept = self._kept.get(self.order[start])
        return super().take(start, size) if kept is None else kept.chunk

    def kept(self, chunk: Chunk) -> Recording | None:
        """The clean run of a chunk that `take` gave, if it is kept."""
        return self._kept.get(int(chunk.index[0]))

    def to_record(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Where a chunk must be recorded of which some sites are to be patched."""
        return sites if self.is_complete and self.is_full else self.sites

    def add(self, recording: Recording) -> None:
        """Take over the activations of a chunk that was run."""
        index = recording.chunk.index
        if self._done[index].all():
            return
        if self.sites:
            self._store(recording.chunk, [recording.clean[site] for site in self.sites])
        self.top[index] = top_tokens(recording.logits[:: recording.chunk.steps])
        self._done[index] = True

    def _store(self, chunk: Chunk, clean: Sequence[Tensor]) -> None:
        # One copy between devices, not one a site.
        rows = torch.stack([x.to(clean[0].device) for x in clean], 1)  # [n, sites, width]
        width = rows.shape[-1]
        if self._rows is None:
            # A copy into pinned memory goes on while the GPU computes.
            pinned = rows.is_cuda and self._rows_on.type == "cpu"
            longest = width // chunk.span * self.prompts.most_replaced if chunk.each else width
            shape = (len(self), len(clean), longest)
            self._rows = torch.zeros(shape, dtype=rows.dtype, device=self._rows_on, pin_memory=pinned)
        if self._rows.is_pinned():
            for i, row in zip(chunk.index.tolist(), rows, strict=True):
                self._rows[i, :, :width].copy_(row, non_blocking=True)
            self._copied_from = rows.device
        else:
            self._rows[chunk.index.to(self._rows.device), :, :width] = rows.to(self._rows.device)

    def keep(self, recording: Recording) -> None:
        """Keep a chunk that was run, if it fits; after the first that does not, none is."""
        first = int(recording.chunk.index[0])
        if self._cache is None or self.is_full or first in self._kept:
            return
        if recording.logits.untyped_storage().nbytes() > recording.logits.nbytes:  # those of all tokens
            recording = replace(recording, logits=recording.logits.clone())
        n_bytes = _bytes_on(recording)
        if self._cache.reserve(n_bytes):
            self._reserved.update(n_bytes)
            self._kept[first] = recording
        else:
            self.is_full = True

    def give_up(self) -> int:
        """Keep nothing any more; says of how many prompts something was kept."""
        n_kept = self.n_kept
        self._kept.clear()
        self.is_full = True
        if self._cache is not None:
            self._cache.release(self._reserved)
            self._reserved.clear()
        return n_kept


def _bytes_on(recording: Recording) -> Counter[torch.device]:
    """What a recording holds, by device; what is shared counts once."""
    storages = {(x.device, x.untyped_storage().data_ptr()): x.untyped_storage() for x in _tensors(recording)}
    sizes: Counter[torch.device] = Counter()
    for (device, _), storage in storages.items():
        sizes[device] += storage.nbytes()
    return sizes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    parts: Iterable[Any] = value if isinstance(value, (tuple, list)) else ()
    if is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, Mapping):
        parts = value.values()
    for part in parts:
        yield from _tensors(part)


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
