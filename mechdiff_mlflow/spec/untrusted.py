"""Untrusted files: read within bounds, parsed strictly, and paths kept where they belong.

docs/threat-model.md says which files these are and what is checked where.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from pydantic import ValidationError

from mechdiff_mlflow.errors import MechdiffError

MAX_DEPTH = 32
"""How deeply YAML may be nested; a spec needs three levels."""


def size_of(path: Path, limit: int) -> int:
    """Bytes of the regular file `path`.

    Raises:
        OSError: It cannot be reached, or is a device, a pipe or a directory, which could block or never end.
        ValueError: It has more than `limit` bytes.
    """
    try:
        status = os.stat(path)
    except ValueError:  # NUL in the name
        raise OSError(errno.EINVAL, "its name is not possible") from None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    if status.st_size > limit:
        raise ValueError(f"it has {status.st_size} bytes, over {limit}")
    return status.st_size


def read_text(path: Path, limit: int, what: str) -> str:
    """The UTF-8 text of a regular file of at most `limit` bytes, called `what` in errors.

    Raises:
        MechdiffError: It is not such a file.
    """
    try:
        size = size_of(path, limit)
        with path.open("rb") as file:
            return file.read(size).decode("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MechdiffError(f"{what} {path} cannot be read ({reason}); check the file.") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a strict JSON text: no repeated keys, NaN or Infinity.

    Raises:
        ValueError: It is not JSON, is nested too deeply or has too long a number.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text of plain data, called `source` in errors.

    Aliases make small texts expand without bound when they are printed or copied, so there are none.

    Raises:
        MechdiffError: It is not YAML, or has aliases, repeated keys or tags, or is nested too deeply.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except Exception as error:  # constructors raise many kinds: of dates, of numbers, of unhashable keys
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        hint = error if isinstance(error, _NotPlain) else "check its indentation and quotes"
        raise MechdiffError(f"{source} is not valid YAML{line}; {hint}.") from None


class _NotPlain(ValueError):
    """What is wrong and what to do."""


class _PlainLoader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _NotPlain("it uses aliases (*name), write the values out")
        if self.depth >= MAX_DEPTH:
            raise _NotPlain(f"it is nested more than {MAX_DEPTH} deep, write it flatter")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) != len(names):
            raise _NotPlain("a key stands there twice, remove one")
        return super().construct_mapping(node, deep)


def explain(error: ValidationError | TypeError) -> str:
    """Pydantic's errors on one line: where, and what is wrong."""
    if not isinstance(error, ValidationError):
        return "its keys must be plain words"
    parts = []
    for item in error.errors():
        where = ".".join(str(step)[:80] for step in item["loc"])
        is_unknown = item["type"] == "extra_forbidden"
        what = "unknown key, remove it" if is_unknown else item["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {what}" if where else what)
    more = f"; and {len(parts) - 5} more" if len(parts) > 5 else ""
    return "; ".join(parts[:5]) + more


def is_there(path: Path) -> bool:
    """Whether something is at `path`; names that no file can have name nothing."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def inside(root: Path, name: str, what: str) -> Path:
    """The path of `name`, called `what` in errors, from `root`; `..` and symbolic links are followed.

    Raises:
        MechdiffError: It lies outside of `root`.
    """
    try:
        path = (root / name).resolve()
        within = path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # loops of links, NUL
        within = False
    if not within:
        raise MechdiffError(f"{what} {name!r} lies outside of {root}; put it there.")
    return path


def safetensors_header(file: BinaryIO, size: int, limit: int) -> dict[str, Any]:
    """The header of a safetensors file of `size` bytes, read from its start; it must describe all of it.

    Raises:
        ValueError: The header is longer than `limit` bytes or than the file, is not JSON, or claims other
            shapes or sizes than the file holds.
    """
    n_header = int.from_bytes(file.read(8), "little")
    if size < 8 or n_header > min(limit, size - 8):
        raise ValueError(f"its header claims {n_header} bytes of {size}, at most {limit} are read")
    header = parse_json(file.read(n_header))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    ends = [0]
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (begin, end, *entry["shape"])):
            raise ValueError(f"{name[:80]!r} has sizes that are not whole numbers")
        ends.append(end)
    if max(ends) != size - 8 - n_header:
        raise ValueError(f"its tensors claim {max(ends)} bytes and it holds {size - 8 - n_header}")
    return header


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} stands there twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
