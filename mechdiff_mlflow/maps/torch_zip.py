"""The one reader of `.pt` files, of ours and of strangers: a dictionary of tensors and plain values.

`torch.load(weights_only=True)` runs nothing that the file names, but may call `bytearray`, which allocates
whatever it is told (1.5 GB from a file of 3 KB, torch 2.13). So members are read here, of the pickle the few
instructions are followed that such a dictionary has, and each storage must claim what its record has.
"""

from __future__ import annotations

import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
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
_REBUILD, _ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_PLAIN = {"BINUNICODE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "NEWFALSE", "NEWTRUE", "NONE"}
_VALUES = {"NEWFALSE": False, "NEWTRUE": True, "NONE": None}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}
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
    with path.open("rb") as file, zipfile.ZipFile(_InSmallReads(file)) as archive:
        members = archive.infolist()
        # Inflated entries could be of any size; torch stores its own plainly.
        if sum(member.file_size for member in members) > size:
            raise ValueError("it unpacks to more than its own size")
        names = _names(members)
        if names["data.pkl"].file_size > _MAX_PICKLE:
            raise ValueError(f"its pickle has over {_MAX_PICKLE} bytes")
        content = {name: _read(archive, member) for name, member in names.items()}
    if content.get("byteorder", sys.byteorder.encode()) != sys.byteorder.encode():
        raise ValueError("it is of a machine with the other byte order")
    unclaimed = {name for name in names if name.startswith("data/")}

    def storage(key: str, dtype: torch.dtype, n_items: int) -> Tensor:
        held = content.get(f"data/{key}")
        if held is None or len(held) != n_items * dtype.itemsize:
            raise ValueError("its storages claim other sizes than they have")
        unclaimed.discard(f"data/{key}")
        return torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)

    loaded = value_of(bytes(content["data.pkl"]), storage, dtypes)
    if unclaimed:
        raise ValueError("its storages claim other sizes than they have")
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ValueError("it holds no dictionary")
    for name, t in loaded.items():
        # A stride of 0 lets a few bytes claim any shape.
        if isinstance(t, Tensor) and t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise ValueError(f"{name} claims the shape {list(t.shape)}, more than the file holds")
    return loaded


def value_of(
    pickle: bytes,
    storage: Callable[[str, torch.dtype, int], Tensor],
    dtypes: Sequence[torch.dtype] = BOTH_FLOATS,
) -> Any:
    """What the pickle of a dictionary says; `storage` gives a record's numbers, by name, dtype and count.

    Raises ValueError at an instruction or global other than `torch.save` writes for that.
    """
    storages = {name: dtype for name, dtype in _STORAGES.items() if dtype in dtypes}
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        name = opcode.name
        if count == _MAX_INSTRUCTIONS:
            raise ValueError(f"its pickle has over {_MAX_INSTRUCTIONS} instructions")
        if name in ("PROTO", "STOP"):
            continue
        if name in _PLAIN:
            stack.append(_VALUES.get(name, argument))
        elif name == "GLOBAL":
            if argument not in (*storages, _REBUILD, _ORDERED):
                raise ValueError(f"it names {str(argument)[:80].replace(' ', '.')}; nothing was run")
            stack.append(_Global(argument))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append({} if name == "EMPTY_DICT" else [])
        elif name in ("BINPUT", "LONG_BINPUT"):
            [memo[argument]] = stack[-1:]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _TUPLES:
            stack.append(tuple(_pop(stack, _TUPLES[name])))
        elif name in _FILLS:
            values, [target] = _pop(stack, _FILLS[name]), stack[-1:]
            if isinstance(target, dict):
                target.update(zip(values[::2], values[1::2], strict=True))
            else:
                target.extend(values)
        elif name == "REDUCE":
            stack.append(_reduced(*_pop(stack, 2)))
        elif name == "BINPERSID":
            match _pop(stack, 1):
                case [("storage", _Global() as kind, str(key), "cpu", int(n_items))] if kind in storages:
                    stack.append(storage(key, storages[kind], n_items))
                case _:
                    raise ValueError("it names a storage that is not of numbers on the CPU")
        else:
            raise ValueError(f"its pickle has the instruction {name}; nothing was run")
    [value] = stack
    return value


class _Global(str):
    """The name of a global, which no text in the pickle can pass for."""

    __slots__ = ()


_MARK = object()


def _reduced(function: object, arguments: Any) -> Any:
    """The empty dictionary or the tensor that a call gives."""
    match function, arguments:
        case _Global(), () if function == _ORDERED:
            return {}
        # A seventh argument would say that the numbers are to be negated or conjugated.
        case _Global(), (Tensor() as numbers, offset, size, stride, _, _) if function == _REBUILD:
            return numbers.as_strided(size, stride, offset)
    raise ValueError("it calls what is no tensor; nothing was run")


def _pop(stack: list[Any], n: int | None) -> list[Any]:
    """The last n values, or all down to a mark, which goes too."""
    if n is None:
        start = next((i for i in reversed(range(len(stack))) if stack[i] is _MARK), -1)
    else:
        start = len(stack) - n
    if start < 0:
        raise ValueError("its pickle takes what is not there")
    taken = stack[start:]
    del stack[start:]
    return taken if n is not None else taken[1:]


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


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytearray:
    """The content of a member, whose checksum is checked on the way."""
    content = bytearray()
    with archive.open(member) as source:
        while block := source.read(_MAX_READ):
            content += block
    return content


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
