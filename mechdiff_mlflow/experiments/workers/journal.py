"""Workers that remember on disk what is finished: a command that is killed loses the shard it was in.

An entry is a safetensors file whose name has a digest of all that its numbers depend on, and the digest of
the file itself. It is written under another name and renamed; one that is damaged is deleted and computed
again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.workers.tasks import LazyTensors, Task, Tensors
from mechdiff_mlflow.experiments.workers.workers import Answer, Workers
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.digests import file_sha256

MAX_BYTES = 64 << 30
"""Size limit of an entry; 1,000 prompts at 320 sites of width 8192 take 10 GiB in two bytes a number."""

_FORMAT = "2"


class Journal(Workers):
    """Keeps the results of other workers in a folder, and answers from there what was computed before.

    Numbers are the same to the bit with a journal and without. Two processes may share a folder: their
    entries are equal. Results of another `version` of the code are not used. Unless they are kept in memory,
    rows are read from the folder whenever they are asked for, and nothing else holds them.
    """

    def __init__(self, inner: Workers, folder: Path, *, version: str, in_memory: bool = True) -> None:
        super().__init__(inner.pair)
        self.inner, self.folder = inner, folder
        self._version, self._in_memory = version, in_memory
        self.n_found = self.n_computed = 0

    def run(self, task: Task, shards: Sequence[Sequence[int]]) -> Iterator[tuple[int, Tensors]]:
        """First what is known, then the rest as it is finished, each kept before it is given."""
        keys = [self._key(task.part(rows)) for rows in shards]
        missing = []
        for index, key in enumerate(keys):
            known = self._read(key)
            if known is None:
                missing.append(index)
            else:
                self.n_found += 1
                yield index, known
        for place, result in self.inner.run(task, [shards[index] for index in missing]):
            index = missing[place]
            self.n_computed += 1
            path = self._write(keys[index], result)
            yield index, result if self._in_memory else _on_disk(path)

    def ask(self, question: Callable[..., Answer], *arguments: object) -> Answer:
        """Ask who computes."""
        return self.inner.ask(question, *arguments)

    def discard(self) -> None:
        """Delete what is kept: all is done, and where it belongs."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _key(self, task: Task) -> str:
        """Hex SHA-256 of all that the task's numbers depend on."""
        pair, where = self.pair, self.environment
        parts = [_FORMAT, self._version, pair.fingerprint, pair.spec.dtype, str(pair.options.batch_size)]
        parts += [where.engine_mode, where.hardware, str(len(task.prompts)), task.about]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _read(self, key: str) -> Tensors | None:
        """The entry; None where there is none, or none that is whole."""
        for path in sorted(self.folder.glob(f"{key}-*.safetensors")):
            try:
                untrusted.size_of(path, MAX_BYTES)
                if file_sha256(path) != path.stem.removeprefix(f"{key}-"):
                    raise ValueError("its digest is not the one in its name")
                return safetensors.torch.load_file(path) if self._in_memory else _on_disk(path)
            except Exception as error:  # damaged bytes make readers fail in every way
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                warnings.warn(f"{path} is damaged ({reason}); it is computed again.", stacklevel=2)
                with suppress(OSError):
                    path.unlink()
        return None

    def _write(self, key: str, result: Tensors) -> Path:
        """Keep a result under its name; a MechdiffError where the disk is full or refuses."""
        part = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Views of one tensor would be refused; a clone owns its elements.
            tensors = {name: one.detach().cpu().contiguous().clone() for name, one in result.items()}
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=f".{key[:16]}-", suffix=".part")
            os.close(handle)
            part = Path(name)
            safetensors.torch.save_file(tensors, part)
            path = self.folder / f"{key}-{file_sha256(part)}.safetensors"
            os.replace(part, path)
            return path
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise MechdiffError(
                f"Finished work cannot be kept in {self.folder} ({reason}); make room there, or set "
                "MECHDIFF_STAGING to another folder, and start again: what was kept so far is used."
            ) from error
        finally:
            if part is not None:
                part.unlink(missing_ok=True)


def _on_disk(path: Path) -> Tensors:
    """Tensors of an entry that was checked."""
    with safe_open(path, framework="pt") as file:
        return LazyTensors({name: partial(_tensor, path, name) for name in file.keys()})  # noqa: SIM118


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:  # maps the file, and reads what is touched
        tensor: Tensor = file.get_tensor(name)
    return tensor
