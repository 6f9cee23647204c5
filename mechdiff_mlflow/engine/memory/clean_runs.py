"""Clean runs that are kept: what was captured of a model need not run again to be patched."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mechdiff_mlflow.engine.memory.activations import Activations
from mechdiff_mlflow.engine.memory.budget import MemoryBudget
from mechdiff_mlflow.engine.memory.free_memory import free_bytes
from mechdiff_mlflow.engine.model.chunks import Chunk, Cuts
from mechdiff_mlflow.engine.model.forward import Recording
from mechdiff_mlflow.spec.prompts import TokenizedPrompts
from mechdiff_mlflow.spec.sites import Site

_SHARE = 4
"""Without a budget all recordings may take one part in so many of the memory that is free but for them."""


class Shelf:
    """The recordings that engines keep; those that share one give up everything when memory runs out.

    It holds nothing alive: a recording goes with its last user.

    Args:
        budget: Bounds what is kept; None has a share of what is free do so.
    """

    def __init__(self, budget: MemoryBudget | None = None) -> None:
        self._budget = budget
        self._held: Counter[torch.device] = Counter()
        self._recorded: weakref.WeakSet[Recorded] = weakref.WeakSet()

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

    def add(self, recorded: Recorded) -> None:
        """One more that may be given up."""
        self._recorded.add(recorded)

    def give_up(self) -> int:
        """Keep nothing any more; says of how many prompts something was kept."""
        return sum(recorded.give_up() for recorded in list(self._recorded))


class Recorded:
    """Clean runs of N prompts: activations at some sites, and of what fits in memory all that patches need.

    Made by `PatchEngine.record`. The prompts that do not fit are run again whenever they are patched. Sites
    and prompts never change; what is kept is given up when memory runs out, and freed with this object.

    Args:
        prompts: N prompts.
        sites: Where activations are read and may be patched.
        rows: Of these prompts and sites, to be filled.
        device: Where chunks are put.
        shelf: Says what may be kept, and when no more; None keeps nothing.
    """

    def __init__(
        self,
        prompts: TokenizedPrompts,
        sites: Sequence[Site],
        rows: Activations,
        device: torch.device,
        shelf: Shelf | None,
    ) -> None:
        self.prompts, self.sites = prompts, tuple(sites)
        self._rows, self._shelf = rows, shelf
        self._cuts = Cuts(prompts, device)
        self._kept: dict[int, Recording] = {}  # by the place in the order at which each begins
        self._begins: list[int | None] = [None] * len(prompts)  # for each place, where its recording begins
        self._done = torch.zeros(len(prompts), dtype=torch.bool)
        self._reserved: list[weakref.finalize[Any, Any]] = []
        self._is_full = shelf is None
        if shelf is not None:
            shelf.add(self)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def is_complete(self) -> bool:
        """Whether every prompt was run."""
        return bool(self._done.all())

    @property
    def is_full(self) -> bool:
        """Whether no more is kept."""
        return self._is_full

    @property
    def n_kept(self) -> int:
        """Prompts that can be patched without another clean run."""
        return sum(map(len, self._kept.values()))

    @property
    def activations(self) -> Activations:
        """For each site the rows [N, width], once every prompt was run."""
        return self._rows

    def clean(self, sites: Sequence[Site]) -> Mapping[Site, Tensor]:
        """The same for some sites, on the CPU."""
        return self._rows.of(sites)

    def has(self, sites: Iterable[Site]) -> bool:
        """Whether all of these were asked for."""
        return set(sites) <= set(self.sites)

    def n_tokens(self, start: int) -> int:
        """Of the prompt at a place in the order."""
        return self._cuts.n_tokens(start)

    def take(self, start: int, size: int) -> Chunk | Recording:
        """At most `size` prompts from a place in the order on: as they are kept, or to be run."""
        begins = self._begins[start]
        if begins is None:
            end = next((i for i in range(start, start + size) if self._is_kept(i)), start + size)
            return self._cuts.take(start, end - start)
        kept, first = self._kept[begins], start - begins
        return kept if first == 0 and len(kept) <= size else kept.part(slice(first, first + size))

    def to_record(self, sites: Sequence[Site]) -> Sequence[Site]:
        """Where a chunk must be recorded of which some sites are to be patched."""
        return sites if self.is_complete and self._is_full else self.sites

    def add(self, recording: Recording) -> None:
        """Take over the activations of a chunk that was run."""
        if not self._done[recording.chunk.index].all():
            self._rows.add(recording)
            self._done[recording.chunk.index] = True

    def keep(self, recording: Recording) -> None:
        """Keep a chunk that was run, if it fits; after the first that does not, no more are kept."""
        if self._is_full:
            return
        assert self._shelf is not None
        if _storage(recording.logits).nbytes() > recording.logits.nbytes:  # a view of those of all tokens
            recording = replace(recording, logits=recording.logits.clone())
        n_bytes = _bytes_on(recording)
        if not self._shelf.reserve(n_bytes):
            self._is_full = True
            return
        self._reserved.append(weakref.finalize(self, self._shelf.release, n_bytes))
        begins = self._cuts.order.index(int(recording.chunk.index[0]))
        self._kept[begins] = recording
        self._begins[begins : begins + len(recording)] = [begins] * len(recording)

    def give_up(self) -> int:
        """Keep nothing any more; says of how many prompts something was kept."""
        n_kept = self.n_kept
        self._kept.clear()
        self._begins = [None] * len(self.prompts)
        self._is_full = True
        for release in self._reserved:
            release()
        self._reserved.clear()
        return n_kept

    def _is_kept(self, place: int) -> bool:
        return place < len(self._begins) and self._begins[place] is not None


def _bytes_on(recording: Recording) -> dict[torch.device, int]:
    """What a recording holds, by device; what is shared counts once."""
    seen: dict[tuple[torch.device, int], int] = {}
    for x in _tensors(recording):
        seen[x.device, _storage(x).data_ptr()] = _storage(x).nbytes()
    sizes: dict[torch.device, int] = {}
    for (device, _), n_bytes in seen.items():
        sizes[device] = sizes.get(device, 0) + n_bytes
    return sizes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()
