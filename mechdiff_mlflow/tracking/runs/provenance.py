"""Which code, on which machine, a run came from."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from mechdiff_mlflow.spec.version import PACKAGE, __version__

_GIT_WAIT_S = 10


def provenance_tags() -> dict[str, str]:
    """Tags for every run of this process: user, host, command, version and git state of the package."""
    return {**_process_tags(), "mechdiff.pid": str(os.getpid())}


@lru_cache(maxsize=1)
def _process_tags() -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    tags = {
        "mlflow.user": user,
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python",
        "mechdiff.version": __version__,
        "mechdiff.host": platform.node() or "unknown",
    }
    # Tracked: an installed copy may lie inside somebody else's repository.
    if _git("ls-files", "--error-unmatch", "__init__.py") is not None:
        commit, branch = _git("rev-parse", "HEAD"), _git("rev-parse", "--abbrev-ref", "HEAD")
        if commit and branch:
            is_dirty = bool(_git("status", "--porcelain", "--", "."))
            tags |= {"mlflow.source.git.commit": commit, "mlflow.source.git.branch": branch}
            tags["mechdiff.git.dirty"] = str(is_dirty).lower()
    return tags


def code_version() -> str:
    """Package version, then commit and `dirty` where known: `0.1.0+g1a2b3c4d5e.dirty`."""
    tags = provenance_tags()
    commit = tags.get("mlflow.source.git.commit")
    local = "" if commit is None else f"+g{commit[:10]}"
    return tags["mechdiff.version"] + local + (".dirty" if tags.get("mechdiff.git.dirty") == "true" else "")


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_WAIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
