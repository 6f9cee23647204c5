"""Choices from a fixed set of words, as users type them."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.text import cut

Self = TypeVar("Self", bound="Choice")


class Choice(str, Enum):
    """A word of a fixed set, which is its own text: `parse(str(choice))` is the choice."""

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def title(cls) -> str:
        """Name of the choice in errors."""
        return cls.__name__

    @classmethod
    def parse(cls: type[Self], text: str) -> Self:
        """The choice called `text`.

        Raises:
            MechdiffError: There is none of that name; lists those there are.
        """
        try:
            return cls(text)
        except ValueError:
            names = ", ".join(map(str, cls))
            raise MechdiffError(f"{cls.title()} {cut(text)!r} is unknown; use one of {names}.") from None
