"""Workers that remember on disk what is finished: a command that is killed loses the shard it was in.

An entry is a safetensors file, named by all that its numbers depend on, and a small JSON file with the digest
of the first, written last. Both are written under another name, synced and renamed, so that a file is whole
or not there; what is there and is not whole is deleted and computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.workers.tasks import Task, Tensors
from mechdiff_mlflow.experiments.workers.workers import Setting, Shape, Workers
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.digests import file_sha256
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet

MAX_BYTES = 64 << 30
"""Of an entry; one of 1,000 prompts at 320 sites of width 8192 takes 10 GiB in two bytes a number."""

_MAX_HEADER = 16 << 20
_MAX_SEAL = 4096
_FORMAT = 1


class Journal(Workers):
    """Keeps the results of other workers in a folder, and answers from there what was computed before.

    Numbers are the same to the bit with a journal and without. Two processes may share a folder: each entry
    is whoever's was renamed last, and equal.

    Args:
        inner: Who computes what is not there.
        folder: Made when first written to.
        version: Of the code, which results of other code are told apart by.
        in_memory: Keep rows in memory; otherwise they are read from the folder whenever they are asked for,
            and nothing but the folder holds them.
    """

    def __init__(self, inner: Workers, folder: Path, *, version: str, in_memory: bool = True) -> None:
        super().__init__(inner.pair)
        self.inner, self.folder = inner, folder
        self._version, self._in_memory = version, in_memory
        self.n_found = self.n_computed = 0

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Tensors]]:
        """First what is known, then the rest as it is finished, each kept before it is given."""
        keys = [self._key(task) for task in tasks]
        missing = []
        for index, (task, key) in enumerate(zip(tasks, keys, strict=True)):
            known = self._read(key, task)
            if known is None:
                missing.append(index)
            else:
                self.n_found += 1
                yield index, known
        for place, result in self.inner.run([tasks[index] for index in missing]):
            index = missing[place]
            self.n_computed += 1
            self._write(keys[index], tasks[index], result)
            yield index, result if self._in_memory else _Entry(self._tensors(keys[index]))

    def setting(self) -> Setting:
        """Of who computes."""
        return self.inner.setting()

    def shapes(self) -> tuple[Shape, Shape]:
        """From who computes."""
        return self.inner.shapes()

    def n_heads(self, layer: int) -> int:
        """From who computes."""
        return self.inner.n_heads(layer)

    def unembedding(self, role: str) -> Tensor:
        """From who computes: it is read, not computed."""
        return self.inner.unembedding(role)

    def prepare(self, prompt_sets: Sequence[PromptSet], position: Position) -> None:
        """Pass on."""
        self.inner.prepare(prompt_sets, position)

    def close(self) -> None:
        """Close who computes; what is kept stays."""
        self.inner.close()

    def discard(self) -> None:
        """Delete what is kept: all is done, and where it belongs."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _key(self, task: Task) -> str:
        """Hex SHA-256 of all that the task's numbers depend on."""
        pair, setting = self.pair, self.inner.setting()
        parts = [
            *(str(_FORMAT), self._version, pair.fingerprint, pair.spec.dtype, str(pair.options.batch_size)),
            *(setting.engine, setting.where),
            *(
                type(task).__name__,
                task.about,
                str(task.position),
                str(len(task.prompts)),
                task.prompts.digest,
            ),
            *(f"{site} {map_.digest}" for site, maps in task.maps.items() for map_ in maps.values()),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _tensors(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _seal(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _read(self, key: str, task: Task) -> Tensors | None:
        """The entry; None where there is none, or none that is whole."""
        path, seal = self._tensors(key), self._seal(key)
        if not seal.exists():  # what has no seal was being written when its process died
            return None
        try:
            _check(path, seal, key, task)
            return _loaded(path) if self._in_memory else _Entry(path)
        except Exception as error:  # damaged bytes make readers fail in every way
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            warnings.warn(f"{path} is damaged ({reason}); it is computed again.", stacklevel=2)
            for file in (seal, path):
                with suppress(OSError):
                    file.unlink()
            return None

    def _write(self, key: str, task: Task, result: Tensors) -> None:
        """Keep a result.

        Raises:
            MechdiffError: It cannot be written.
        """
        path, seal = self._tensors(key), self._seal(key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            tensors = {name: result[name].detach().cpu().contiguous().clone() for name in task.names}
            # Views of one tensor would be refused; a clone owns its elements.
            with _written(path) as part:
                safetensors.torch.save_file(tensors, part)
                sealed = {"key": key, "task": type(task).__name__, "sha256": file_sha256(part)}
            with _written(seal) as part:
                part.write_text(json.dumps(sealed), encoding="utf-8")
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise MechdiffError(
                f"Finished work cannot be kept in {self.folder} ({reason}); make room there, or set "
                "MECHDIFF_STAGING to another folder, and start again: what was kept so far is used."
            ) from error


class _Entry(Mapping[str, Tensor]):
    """Tensors of an entry that was checked, read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            self._names = tuple(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:  # maps the file, and reads what is touched
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check(path: Path, seal: Path, key: str, task: Task) -> None:
    """Raise unless an entry is whole and holds what the task gives."""
    sealed = untrusted.parse_json(untrusted.read_text(seal, _MAX_SEAL, "Seal"))
    if not isinstance(sealed, dict) or sealed.get("key") != key:
        raise ValueError("its seal is of another entry")
    size = untrusted.size_of(path, MAX_BYTES)
    with path.open("rb") as file:
        header = untrusted.safetensors_header(file, size, _MAX_HEADER)
    if file_sha256(path) != sealed.get("sha256"):
        raise ValueError("its digest is not the one it was sealed with")
    header.pop("__metadata__", None)
    if header.keys() != set(task.names):
        raise ValueError("it holds other tensors than the task gives")
    for name, entry in header.items():
        if not entry["shape"] or entry["shape"][0] != len(task.prompts):
            raise ValueError(f"{name} has the shape {entry['shape']} for {len(task.prompts)} prompts")


def _loaded(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = safetensors.torch.load_file(path)
    return found


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, which takes its name once it is on the disk.

    Raises:
        OSError: The disk is full, or refuses; nothing is left behind.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:16]}-", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        with suppress(OSError):
            part.unlink()


def _sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
