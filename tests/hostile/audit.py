"""Reads the whole corpus under an audit hook, and counts what happened.

python -m hostile.audit FOLDER     (with the repository and tests/ on PYTHONPATH)
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from hostile.corpus import CASES, MARKER, READERS

from mechdiff_mlflow.errors import MechdiffError

EXECUTES = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.fork", "pty.spawn"}
CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"), (0,)),
    **dict.fromkeys(("os.rename", "os.link", "shutil.move"), (0, 1)),
    "os.symlink": (1,),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Audit:
    """What the interpreter reports while `on`."""

    def __init__(self, root: Path) -> None:
        self.root, self.on = root.resolve(), False
        self.executed: list[str] = []
        self.outside: list[str] = []
        self.connections: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The hook."""
        if not self.on:
            return
        if event in EXECUTES or event == "pickle.find_class":
            self.executed.append(f"{event} {arguments}")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            self.connections.append(str(arguments))
        elif event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & WRITING:
            self._changed(arguments[0])
        elif event in CHANGES:
            for position in CHANGES[event]:
                self._changed(arguments[position])

    def _changed(self, name: Any) -> None:
        path = Path(os.fsdecode(name)).resolve()
        if not path.is_relative_to(self.root):
            self.outside.append(str(path))


def main(root: Path) -> None:
    """Write all inputs, then read them all."""
    os.chdir(root)
    tempfile.tempdir = str(root)
    folders = [root / str(number) for number in range(len(CASES))]
    for folder in folders:
        folder.mkdir()
    given = [case.write(folder) for case, folder in zip(CASES, folders, strict=True)]
    there = {path for path in root.rglob("*") if not path.is_dir()}
    before = _peak_mib()
    audit = Audit(root)
    sys.addaudithook(audit)
    n_refused, accepted = 0, []
    for case, what in zip(CASES, given, strict=True):
        audit.on = True
        try:
            READERS[case.reader](what)
            accepted.append(str(case))
        except MechdiffError:
            n_refused += 1
        finally:
            audit.on = False
    new = {path for path in root.rglob("*") if not path.is_dir()} - there
    print(*accepted, *audit.executed, *audit.outside, *audit.connections, *new, sep="\n")
    print(f"refused: {n_refused}")
    print(f"accepted: {len(accepted)}")
    print(f"executed: {len(audit.executed) + (root / MARKER).exists()}")
    print(f"writes outside: {len(audit.outside) + len(new)}")
    print(f"connections: {len(audit.connections)}")
    print(f"MiB before: {before}")
    print(f"peak MiB: {_peak_mib()}")


def _peak_mib() -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        # A child's ru_maxrss begins with what its parent had when it forked.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


if __name__ == "__main__":
    main(Path(sys.argv[1]))
