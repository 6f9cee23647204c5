"""The one reader of `.pt` files, of ours and of strangers: a dictionary of tensors and plain values.

`torch.load(weights_only=True)` runs nothing that the file names, but may call `bytearray`, which allocates
whatever it is told (1.5 GB from a file of 3 KB, torch 2.13), and its zip reader may see other members than
ours. So the members are read here, the pickle is walked without doing what it says, each storage must claim
what its record has, and torch gets a new zip of what was checked.
"""

from __future__ import annotations

import io
import pickletools
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mechdiff_mlflow.spec import untrusted

_MAX_READ = 1 << 20
_MAX_PICKLE = 4 << 20
_MAX_INSTRUCTIONS = 10_000
_MEMBER = re.compile(
    r"([\w.-]+)/(data\.pkl|data/\d{1,4}|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id)"
)
_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
}
_REBUILD = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}
_PLAIN = {"BINUNICODE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "NEWFALSE", "NEWTRUE", "NONE"}
_FIXED_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = {"NEWFALSE": False, "NEWTRUE": True, "NONE": None}
# Into a dictionary or list that is below on the stack: how many values, None for all down to a mark.
_FILLS = {"SETITEM": 2, "APPEND": 1, "SETITEMS": None, "APPENDS": None}
BOTH_FLOATS = (torch.float64, torch.float32)


def load(path: Path, limit: int, dtypes: Sequence[torch.dtype] = BOTH_FLOATS) -> dict[str, Any]:
    """The dictionary in a `.pt` file of at most `limit` bytes, with tensors of `dtypes` on the CPU.

    Raises:
        OSError: It cannot be read.
        ValueError, zipfile.BadZipFile: It is not what `torch.save` writes of such a dictionary, has members
            that inflate, or tensors that claim more than the file holds.
    """
    size = untrusted.size_of(path, limit)
    with path.open("rb") as file:
        zipped = _checked(file, size, dtypes)
    loaded = torch.load(zipped, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ValueError("it holds no dictionary")
    for name, t in loaded.items():
        # A stride of 0 lets a few bytes claim any shape.
        if isinstance(t, Tensor) and t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise ValueError(f"{name} claims the shape {list(t.shape)}, more than the file holds")
    return loaded


def _checked(file: BinaryIO, size: int, dtypes: Sequence[torch.dtype]) -> io.BytesIO:
    """A zip of what `torch.load` needs of the zip in `file`, and no more than that."""
    with zipfile.ZipFile(_InSmallReads(file)) as archive:
        members = archive.infolist()
        # Inflated entries could be of any size; torch stores its own plainly.
        if sum(member.file_size for member in members) > size:
            raise ValueError("it unpacks to more than its own size")
        names = _names(members)
        if names["data.pkl"].file_size > _MAX_PICKLE:
            raise ValueError(f"its pickle has over {_MAX_PICKLE} bytes")
        claimed = storages(archive.read(names["data.pkl"]), dtypes)
        held = {name: m.file_size for name, m in names.items() if name.startswith("data/")}
        if claimed != held:
            raise ValueError("its storages claim other sizes than they have")
        if "byteorder" in names and archive.read(names["byteorder"]) != sys.byteorder.encode():
            raise ValueError("it is of a machine with the other byte order")
        for member in members:  # reading checks the checksums
            for _ in _blocks(archive, member):
                pass
        return _again(archive, {n: m for n, m in names.items() if n in ("data.pkl", "version", *held)})


def storages(pickle: bytes, dtypes: Sequence[torch.dtype] = BOTH_FLOATS) -> dict[str, int]:
    """Bytes of each storage that the pickle of a dictionary claims, by the name of its record.

    Raises:
        ValueError: It has another instruction or names another global than `torch.save` writes for that.
    """
    item_bytes = {name: dtype.itemsize for name, dtype in _STORAGES.items() if dtype in dtypes}
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    found: dict[str, int] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        name = opcode.name
        if count == _MAX_INSTRUCTIONS:
            raise ValueError(f"its pickle has over {_MAX_INSTRUCTIONS} instructions")
        if name in ("PROTO", "STOP"):
            continue
        if name in _PLAIN:
            stack.append(_VALUES.get(name, argument))
        elif name == "GLOBAL":
            if argument not in item_bytes and argument not in _REBUILD:
                raise ValueError(f"it names {str(argument)[:80].replace(' ', '.')}; nothing was run")
            stack.append(_Global(argument))
        elif name in ("MARK", "EMPTY_DICT", "EMPTY_LIST"):
            stack.append(_MARK if name == "MARK" else _OTHER)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _FIXED_TUPLES:
            stack.append(tuple(_pop(stack, _FIXED_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        elif name in _FILLS:
            n = _FILLS[name]
            _pop_to_mark(stack) if n is None else _pop(stack, n)
        elif name == "REDUCE":
            function, _ = _pop(stack, 2)
            if not isinstance(function, _Global) or function not in _REBUILD:
                raise ValueError("it calls what is no tensor; nothing was run")
            stack.append(_OTHER)
        elif name == "BINPERSID":
            [identifier] = _pop(stack, 1)
            key, n_bytes = _storage(identifier, item_bytes)
            if found.setdefault(key, n_bytes) != n_bytes:
                raise ValueError(f"storage {key} claims two sizes")
            stack.append(_OTHER)
        else:
            raise ValueError(f"its pickle has the instruction {name}; nothing was run")
    return found


class _Global(str):
    """The name of a global, which no text in the pickle can pass for."""

    __slots__ = ()


_MARK, _OTHER = object(), object()


def _storage(identifier: object, item_bytes: Mapping[str, int]) -> tuple[str, int]:
    match identifier:
        case ("storage", _Global() as kind, str(key), "cpu", int(n_items)) if kind in item_bytes:
            return f"data/{key}", n_items * item_bytes[kind]
    raise ValueError("it names a storage that is not of numbers on the CPU")


def _pop(stack: list[Any], n: int) -> list[Any]:
    if n > len(stack):
        raise ValueError("its pickle takes what is not there")
    taken = stack[len(stack) - n :]
    del stack[len(stack) - n :]
    return taken


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    start = next((i for i in reversed(range(len(stack))) if stack[i] is _MARK), None)
    if start is None:
        raise ValueError("its pickle takes what is not there")
    return _pop(stack, len(stack) - start)[1:]


def _names(members: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Members by their names below the one folder that there is."""
    matches = [(_MEMBER.fullmatch(member.filename), member) for member in members]
    for match, member in matches:
        if match is None:
            raise ValueError(f"it has a member {member.filename[:80]!r}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise ValueError(f"its member {member.filename[:80]!r} is compressed")
    found = {match[2]: member for match, member in matches if match}
    if len(found) != len(members) or len({match[1] for match, _ in matches if match}) != 1:
        raise ValueError("its members are not those of one folder, each once")
    if not {"data.pkl", "version"} <= found.keys():
        raise ValueError("it has no data.pkl or no version")
    return found


def _again(archive: zipfile.ZipFile, names: dict[str, zipfile.ZipInfo]) -> io.BytesIO:
    """A new zip of these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as copy:
        for name, member in names.items():
            with (
                archive.open(member) as source,
                copy.open(f"archive/{name}", "w", force_zip64=True) as target,
            ):
                while block := source.read(_MAX_READ):
                    target.write(block)
    buffer.seek(0)
    return buffer


def _blocks(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(member) as source:
        while block := source.read(_MAX_READ):
            yield block


class _InSmallReads:
    """A file for zipfile, which would read a directory of members of any claimed size at once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, lambda: None

    def read(self, n: int = -1) -> bytes:
        content = self._file.read(n if 0 <= n <= _MAX_READ else _MAX_READ + 1)
        if len(content) > _MAX_READ:
            raise ValueError(f"its list of members has over {_MAX_READ} bytes")
        return content
