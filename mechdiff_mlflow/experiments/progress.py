"""How experiments say how far they are, without knowing who listens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

Advance = Callable[[int], None]


class Stage(Protocol):
    """Opens a stretch of work of known length; the context gives a function to report finished steps."""

    def __call__(self, name: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """Start the stretch called `name` of `total` steps."""


@contextlib.contextmanager
def silent(name: str, total: int) -> Iterator[Advance]:
    """Nobody listens."""
    yield lambda steps: None
