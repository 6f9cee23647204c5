"""Activations that were captured: in memory while they fit, otherwise in files that are read back by site."""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechdiff_mlflow.engine.memory.budget import MemoryBudget
from mechdiff_mlflow.engine.model.forward import Recording
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Site


class Activations(Mapping[Site, Tensor]):
    """Rows [N, width] of some sites, filled chunk by chunk; without a budget all are kept in memory.

    Spilled rows lie in a temporary folder that goes with this object, and at exit at the latest, also after
    errors. Only what is asked for is then in memory: keep the mapping, not its tensors.
    """

    def __init__(
        self,
        n_prompts: int,
        sites: Sequence[Site],
        device: torch.device | str = "cpu",
        budget: MemoryBudget | None = None,
    ) -> None:
        self._n_prompts, self._sites, self._device = n_prompts, list(dict.fromkeys(sites)), device
        self._budget = budget
        self._rows: Tensor | None = None  # [N, sites, width]
        self._under_way: torch.device | None = None  # the GPU from which copies go on
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._n_files = 0

    @property
    def folder(self) -> Path | None:
        """Where the rows are when they are in files."""
        return None if self._folder is None else Path(self._folder.name)

    def add(self, recording: Recording) -> None:
        """Keep a chunk's rows.

        Raises:
            MechdiffError: They cannot be written.
        """
        if not self._sites:
            return
        device = recording.clean[self._sites[0]].device
        # One copy between devices, not one a site.
        rows = torch.stack([recording.clean[site].to(device) for site in self._sites], 1)  # [n, sites, width]
        index = recording.chunk.index
        if self._rows is None and self._folder is None:
            self._make_room(rows)
        if self._rows is None:
            self._write(index, rows.cpu())
        elif self._rows.is_pinned():
            for i, row in zip(index.tolist(), rows, strict=True):
                self._rows[i].copy_(row, non_blocking=True)
            self._under_way = rows.device
        else:
            self._rows[index.to(self._rows.device)] = rows.to(self._rows.device)

    def __getitem__(self, site: Site) -> Tensor:
        """Rows [N, width] of a site, in the model's dtype, in the order of the prompts."""
        if site not in self._sites:
            raise KeyError(site)
        if self._rows is not None:
            if self._under_way is not None:
                torch.cuda.synchronize(self._under_way)
                self._under_way = None
            return self._rows[:, self._sites.index(site)]
        rows = torch.empty(self._n_prompts, self._width, dtype=self._dtype)
        for path in self._files():
            with safe_open(path, framework="pt") as file:  # maps the file, and reads what is touched
                rows[file.get_tensor("index")] = file.get_tensor(str(site))
        return rows.to(self._device)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def of(self, sites: Sequence[Site]) -> Mapping[Site, Tensor]:
        """The rows of some sites, on the CPU."""
        return _SomeSites(self, sites)

    def _make_room(self, rows: Tensor) -> None:
        shape = (self._n_prompts, *rows.shape[1:])
        n_bytes = math.prod(shape) * rows.element_size()
        if self._budget is None or self._budget.reserve(n_bytes):
            # A copy into pinned memory goes on while the GPU computes.
            pinned = rows.is_cuda and torch.device(self._device).type == "cpu"
            self._rows = torch.empty(shape, dtype=rows.dtype, device=self._device, pin_memory=pinned)
            if self._budget is not None:
                weakref.finalize(self, self._budget.release, n_bytes)
            return
        self._width, self._dtype = rows.shape[-1], rows.dtype
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="mechdiff-activations-")
        except OSError as error:
            raise _unwritable(error) from error

    def _files(self) -> list[Path]:
        assert self.folder is not None
        return [self.folder / f"{i}.safetensors" for i in range(self._n_files)]

    def _write(self, index: Tensor, rows: Tensor) -> None:
        assert self.folder is not None
        tensors = {str(site): x.clone() for site, x in zip(self._sites, rows.unbind(1), strict=True)}
        try:
            save_file({"index": index, **tensors}, self.folder / f"{self._n_files}.safetensors")
        except (OSError, SafetensorError) as error:
            raise _unwritable(error) from error
        self._n_files += 1


class _SomeSites(Mapping[Site, Tensor]):
    def __init__(self, rows: Activations, sites: Sequence[Site]) -> None:
        self._all, self._sites = rows, sites

    def __getitem__(self, site: Site) -> Tensor:
        if site not in self._sites:
            raise KeyError(site)
        return self._all[site].cpu()

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def _unwritable(error: Exception) -> MechdiffError:
    return MechdiffError(
        f"Activations over the memory budget cannot be written to {tempfile.gettempdir()} ({error}); set "
        "TMPDIR to a folder with room, or raise --memory-budget."
    )
