"""Fields of a store, which everybody with an account may write: each is parsed here, within bounds.

Each parser raises `Malformed`, which costs the row and a warning (`left_out`), never a command.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.pair_spec import Alpha
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.text import cut, plain

_log = logging.getLogger("mechdiff_mlflow")
_LARGEST = 1e300
_WORD = re.compile(r"[\w.+-]{1,100}")
_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}
T = TypeVar("T")


class Malformed(MechdiffError):
    """A field holds something that none of our programs wrote."""

    def __init__(self, field: str, value: object, wanted: str) -> None:
        shown = "not there" if value is None else cut(ascii(value))
        super().__init__(f"{cut(field)} is {shown}, not {wanted}; correct or delete that field of the store.")


def left_out(what: str, error: Malformed) -> None:
    """Warn that a row is not shown."""
    _log.warning("%s", plain(f"Left out {cut(what, 120)}: {error}"))


def is_missing(value: object) -> bool:
    """Whether there is no value: None, or NaN of a table's empty cell."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def number(fields: Mapping[Any, Any], key: str) -> float:
    """A finite number."""
    value = fields.get(key)
    try:
        found = math.nan if isinstance(value, bool) else float(str(value)[:400])
    except ValueError:
        found = math.nan
    if not abs(found) <= _LARGEST:
        raise Malformed(key, value, "a finite number")
    return found


def whole(fields: Mapping[Any, Any], key: str, *, least: int = 0, most: int = 1 << 53) -> int:
    """A whole number from `least` to `most`."""
    value = fields.get(key)
    found = number(fields, key)
    if not least <= found <= most or found != int(found) or "_" in str(value):
        raise Malformed(key, value, f"a whole number from {least} to {most}")
    return int(found)


def word(fields: Mapping[Any, Any], key: str) -> str:
    """A name of letters, digits and `_ . + -`."""
    value = fields.get(key)
    if is_missing(value) or not _WORD.fullmatch(str(value)):
        raise Malformed(key, None if is_missing(value) else value, "a plain name")
    return str(value)


def rank(fields: Mapping[Any, Any], key: str) -> int | None:
    """A rank; None is full."""
    return None if fields.get(key) == "full" else whole(fields, key, least=1, most=1 << 30)


def scales(fields: Mapping[Any, Any], key: str) -> Alpha:
    """α: a number, a grid or `auto`."""
    try:
        return Alpha.parse(str(fields.get(key))[:2000])
    except MechdiffError:
        raise Malformed(key, fields.get(key), "a scale") from None


def site(fields: Mapping[Any, Any]) -> Site:
    """The site of `layer` and `hook`."""
    layer = whole(fields, "layer", most=999_999)
    try:
        return Site(layer, Hook.parse(word(fields, "hook")))
    except MechdiffError:
        raise Malformed("hook", fields["hook"], "a hook") from None


def record(form: type[T], field: str, text: str) -> T:
    """A dataclass that was written as JSON, its types as declared."""
    try:
        adapter = _ADAPTERS.get(form) or _ADAPTERS.setdefault(form, TypeAdapter(form))
        found: T = adapter.validate_json(text[:20_000], strict=True)
        return found
    except ValidationError:
        raise Malformed(field, text, f"the JSON of a {getattr(form, '__name__', form)}") from None
