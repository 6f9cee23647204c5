"""Progress of experiments, which do not know who listens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

Advance = Callable[[int], None]
Stage = Callable[[str, int], AbstractContextManager[Advance]]
"""Opens a stretch of work by name and number of steps; the context gives what reports finished steps."""


@contextlib.contextmanager
def silent(name: str, total: int) -> Iterator[Advance]:
    """Nobody listens."""
    yield lambda steps: None
