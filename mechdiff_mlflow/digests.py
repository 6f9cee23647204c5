"""What identifies a file by its bytes."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read a megabyte at a time.

    Raises:
        OSError: It cannot be read.
    """
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


@lru_cache(maxsize=1)
def source_sha256() -> str:
    """Hex SHA-256 of this package's own source: tells two versions apart where no commit does."""
    root = Path(__file__).resolve().parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root).as_posix()} {file_sha256(path)}\n".encode())
    return found.hexdigest()
