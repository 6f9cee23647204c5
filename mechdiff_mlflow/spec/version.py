"""The version of this package: its number, and a digest of its source."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from mechdiff_mlflow.spec.digests import file_sha256

__version__ = "0.1.0"
PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of the package."""


@lru_cache(maxsize=1)
def source_sha256() -> str:
    """Hex SHA-256 of this package's own source: tells two versions apart where no commit does."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(f"{path.relative_to(PACKAGE).as_posix()} {file_sha256(path)}\n".encode())
    return found.hexdigest()
