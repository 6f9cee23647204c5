"""What a user can set of a fit: the name, default, help and range of a setting, and how its text is read."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.options import Kind, Option
from mechdiff_mlflow.text import cut, number_in, text_of


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: a number in [low, high], a whole number where the default is one, or one of `choices`.

    Args:
        name: Of the param of a run, of a map's meta and of the argument in Python.
        default: In the type that the setting has in Python.
        help: One line.
        low: The least number allowed.
        high: The largest.
        choices: The words allowed, where it is no number.
        none: The word that a user types for None; empty where None is not allowed.
    """

    name: str
    default: Any
    help: str
    low: float = 0.0
    high: float = math.inf
    choices: tuple[Any, ...] = ()
    none: str = ""

    @property
    def field(self) -> Any:
        """The field of a dataclass that has the setting; requests make an option of it."""
        option = Option(Kind(self.metavar, self.parse, self.none), self.help, self.default)
        return dataclasses.field(default=self.default, metadata={"option": option})

    @property
    def option(self) -> str:
        """Its option on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def whole(self) -> bool:
        """Whether it takes whole numbers only."""
        return isinstance(self.default, int)

    @property
    def words(self) -> tuple[str, ...]:
        """What a user may type, where it is no number."""
        return tuple(word for word in (self.none, *map(str, self.choices)) if word)

    @property
    def metavar(self) -> str:
        """The kind of value, for `--help`."""
        return "|".join(self.words) or ("whole number" if self.whole else "number")

    def text(self, value: object) -> str:
        """What to type for a value: `parse` of it is that value again."""
        return self.none if value is None else text_of(value) if isinstance(value, float) else str(value)

    def parse(self, text: str) -> Any:
        """The value that a user typed.

        Raises:
            MechdiffError: It is none, or not allowed.
        """
        if self.choices:
            if text not in self.words:
                raise MechdiffError(
                    f"{self.option} {cut(text)!r} is unknown; use one of {', '.join(self.words)}."
                )
            return self.checked(None if text == self.none else text)
        try:
            value = number_in(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise MechdiffError(
                f"{self.option} {cut(text)!r} is not a number; pass e.g. {self.text(self.default)}."
            )
        return self.checked(int(value) if self.whole and value % 1 == 0 else value)

    def checked(self, value: object) -> Any:
        """`value`, in the type that the setting has, once it is sure that it is allowed.

        Raises:
            MechdiffError: It is not.
        """
        if value is None and self.none:
            return None
        if self.choices:
            if value not in self.choices:
                raise MechdiffError(f"{self.name} is {value!r}; use one of {', '.join(self.words)}.")
            return self.choices[self.choices.index(value)]
        kind, title = (int, "a whole number") if self.whole else ((int, float), "a number")
        if not isinstance(value, kind) or not self.low <= value <= self.high or value == math.inf:
            high = f"to {self.high:.12g}" if self.high < math.inf else "up"
            raise MechdiffError(f"{self.name} is {value!r}; give {title} from {self.low:.12g} {high}.")
        return value if self.whole else float(value)
