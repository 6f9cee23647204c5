"""What the checks of a tracking server or store report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(str, Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"
    SKIP = "skip"
    """Cannot be seen from here, or another check failed first."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the check.

    Args:
        check: What was looked at.
        level: How it is.
        seen: What was seen, with values and without secrets.
        remedy: What to do, empty when all is well.
    """

    check: str
    level: Level
    seen: str
    remedy: str = ""
