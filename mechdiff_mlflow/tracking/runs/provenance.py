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

PROCESS_TAG = "mechdiff.process"
"""Tag of a run: the machine, the process and the state of the code that wrote it, for people."""
_GIT_WAIT_S = 10


def provenance_tags() -> dict[str, str]:
    """Tags for every run of this process: user, command, version, commit of the package, and process."""
    changed = {None: "", True: ", code with changes", False: ", code as committed"}[_code()[2]]
    process = f"{platform.node() or 'unknown'}, process {os.getpid()}{changed}"
    return {**_process_tags(), PROCESS_TAG: process}


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
    }
    commit, branch, _ = _code()
    return tags | ({"mlflow.source.git.commit": commit, "mlflow.source.git.branch": branch} if commit else {})


@lru_cache(maxsize=1)
def _code() -> tuple[str, str, bool | None]:
    """Commit and branch of the package, and whether it differs from that; empty and None if nobody knows."""
    # Tracked: an installed copy may lie inside somebody else's repository.
    if _git("ls-files", "--error-unmatch", "__init__.py") is not None:
        commit, branch = _git("rev-parse", "HEAD"), _git("rev-parse", "--abbrev-ref", "HEAD")
        if commit and branch:
            return commit, branch, bool(_git("status", "--porcelain", "--", "."))
    return "", "", None


def code_version() -> str:
    """Package version, then commit and `dirty` where known: `0.1.0+g1a2b3c4d5e.dirty`."""
    commit, _, is_dirty = _code()
    local = f"+g{commit[:10]}" if commit else ""
    return __version__ + local + (".dirty" if is_dirty else "")


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
