"""Options: how a field of a request is typed, read, checked and written down, declared once on the field."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.text import number_in, text_of

LARGEST = 2**63 - 1
"""The largest whole number that a database keeps and a generator takes as a seed."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value with its text form: `parse(text(value)) == value`."""

    name: str  # shown in help texts
    parse: Callable[[str], Any]  # raises `MechdiffError`
    none: str = ""  # the word that stands for None

    def read(self, text: str) -> Any:
        """The value that a text stands for."""
        return None if self.none and text == self.none else self.parse(text)

    def text(self, value: object) -> str:
        """What to type for a value."""
        if value is None:
            return self.none
        if isinstance(value, tuple):
            return ",".join(map(self.text, value))
        return text_of(value) if isinstance(value, float) else str(value)


TEXT = Kind("text", str)
PATH = Kind("path", Path)
FLAG = Kind("flag", lambda text: text == "True")


def whole(option: str, example: int, *, least: int = 0, most: int = LARGEST, none: str = "") -> Kind:
    """A whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,40}", text) is None or not least <= int(text) <= most:
            bounds = f"at least {least}"
            bounds += f" and at most {most}" if most < LARGEST or len(text) > 18 else ""
            raise MechdiffError(
                f"{option} {text[:80]!r} is not a whole number of {bounds}; pass e.g. {example}."
            )
        return int(text)

    return Kind("whole number", parse, none)


def number(option: str, example: float, *, least: float = -math.inf) -> Kind:
    """A finite number of at least `least`."""

    def parse(text: str) -> float:
        try:
            value = number_in(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= least):
            bound = "" if least == -math.inf else f" of at least {text_of(least)}"
            raise MechdiffError(
                f"{option} {text[:80]!r} is not a number{bound}; pass e.g. {text_of(example)}."
            )
        return value

    return Kind("number", parse)


def one_of(option: str, *names: str) -> Kind:
    """One of some words."""

    def parse(text: str) -> str:
        if text not in names:
            raise MechdiffError(f"{option} {text[:80]!r} is unknown; use one of {', '.join(names)}.")
        return text

    return Kind("|".join(names), parse)


def listed(name: str, parse: Callable[[str], Any]) -> Kind:
    """Comma-separated values, each once."""

    def parse_all(text: str) -> tuple[Any, ...]:
        values = tuple(parse(part.strip()) for part in text.split(","))
        if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise MechdiffError(f"The list {text[:80]!r} has {twice[0]} more than once; name each once.")
        return values

    return Kind(name, parse_all)


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of a field beside its name and type."""

    kind: Kind  # of its value, or of each of several
    help: str
    default: Any  # `...` where a value must be given
    flag: str = ""  # how the command line spells it; empty for `--` and the field's name
    short: str = ""  # a second spelling
    bare: str = ""  # what it means when it is typed without a value; empty where it needs one
    metavar: str = ""  # stands for the value in help texts; empty for the kind's name
    is_argument: bool = False  # positional
    is_repeated: bool = False  # may be given several times, as a tuple
    is_technical: bool = False  # says where results go or how they are computed, and not what they are
    is_resumed: bool = True  # `mechdiff resume` takes it over from the run

    def checked(self, name: str, value: Any) -> Any:
        """The value of the field called `name`, in its type; it may be given as text.

        Raises:
            MechdiffError: It is not allowed.
        """
        if value is None and self.default is None:
            return None
        if self.is_repeated:
            return tuple(self.kind.read(self.kind.text(item)) for item in value)
        if (value is None and not self.kind.none) or (self.kind is FLAG and not isinstance(value, bool)):
            wanted = "True or False" if self.kind is FLAG else f"a {self.kind.name}"
            raise MechdiffError(f"{name} is {value!r}; give {wanted}.")
        return value if self.kind is FLAG else self.kind.read(self.kind.text(value))


def option(default: Any, kind: Kind, help: str, **more: Any) -> Any:
    """A field of a request; the default as it is typed, or `...` where a value must be given."""
    value = kind.read(default) if isinstance(default, str) else default
    about = {"option": Option(kind, help, value, **more)}
    return field(metadata=about) if default is ... else field(default=value, metadata=about)


def technical(default: Any, kind: Kind, help: str, **more: Any) -> Any:
    """An option that says where results go or how they are computed, and not what they are."""
    return option(default, kind, help, is_technical=True, **more)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks of a command, checked when it is built; the docstring of each is its help text.

    Fields take their values, or the texts that the command line takes for them.

    Raises:
        MechdiffError: A value is not allowed.
    """

    command: ClassVar[str]
    """What the command line calls it: `report-pass` of a `ReportPassRequest`."""

    def __init_subclass__(cls) -> None:
        words = re.findall("[A-Z][a-z]*", cls.__name__.removesuffix("Request"))
        cls.command = "-".join(words).lower()

    def __post_init__(self) -> None:
        for name, option in self.options().items():
            object.__setattr__(self, name, option.checked(name, getattr(self, name)))

    @classmethod
    def options(cls) -> dict[str, Option]:
        """By field: the pair, what the request itself adds, then each group that it inherits from."""
        known = {one.name: one.metadata["option"] for one in fields(cls)}
        names = [name for owner in cls.__mro__ for name in inspect.get_annotations(owner)]
        ordered = sorted(dict.fromkeys(names), key=lambda name: name != "pair")
        return {name: known[name] for name in ordered if name in known}

    def words(self, leave_out: Callable[[str, Option], bool] = lambda name, option: False) -> list[str]:
        """The command as it is typed, with its defaults written out."""
        words = [self.command]
        for name, option in self.options().items():
            value = getattr(self, name)
            if leave_out(name, option):
                continue
            for one in value if option.is_repeated else (value,):
                text = option.kind.text(one)
                if option.is_argument:
                    words.append(text)
                elif option.kind is FLAG:
                    words += [flag_of(name, option)] if value else []
                else:
                    words += [flag_of(name, option), text] if text else []
        return words

    def params(self) -> dict[str, str | bool]:
        """What defines the results, as a run's params have it."""
        found = {}
        for name, option in self.options().items():
            value = getattr(self, name)
            if not option.is_technical:
                found[name] = value if isinstance(value, bool) else option.kind.text(value)
        return found

    @classmethod
    def as_typed(cls, name: str, text: str) -> str:
        """A param as `mlflow run` logged it, in the words in which `params` has that value."""
        option = cls.options().get(name)
        if option is None:
            return text
        if option.kind is FLAG:
            return {"yes": "true", "no": "false"}.get(text, text)
        try:
            return option.kind.text(option.kind.read(text))
        except MechdiffError:  # the command itself was given another value
            return text


def flag_of(name: str, option: Option) -> str:
    """How the command line spells an option."""
    return (option.flag or f"--{name.replace('_', '-')}").partition("/")[0]
