"""Which processes share a lock, and which process an id means."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mechdiff_mlflow.tracking.store import file_locks as locks
from mechdiff_mlflow.tracking.store.file_locks import lock_file, machine_id, process_start

URI = "http://127.0.0.1:5000"


def test_a_copied_folder_is_another_machine_and_keeps_nothing_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path / "a"))
    first = machine_id(lock_file(URI, "run"))
    assert first == machine_id(lock_file(URI, "run"))
    assert list((tmp_path / "a").iterdir()) == []
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(locks.tempfile, "gettempdir", lambda: str(tmp_path / "b"))
    assert machine_id(lock_file(URI, "run")) != first


@pytest.mark.parametrize("what", ["boot", "host id", "host name", "container", "store"])
def test_the_same_folder_seen_from_elsewhere_is_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As a network disk, a disk image or a volume of two containers may be."""
    lock = tmp_path / "a.lock"
    here = machine_id(lock)
    read, link = locks._first_line, locks._link
    paths = {"boot": "/proc/sys/kernel/random/boot_id", "host id": "/etc/machine-id"}
    if what in paths:
        monkeypatch.setattr(locks, "_first_line", lambda p: "other" if p == paths[what] else read(p))
    if what == "host name":
        monkeypatch.setattr(locks.platform, "node", lambda: "other")
    if what == "container":
        monkeypatch.setattr(locks, "_link", lambda p: "pid:[1]" if p == "/proc/self/ns/pid" else link(p))
    assert machine_id(lock.with_name("b.lock") if what == "store" else lock) != here


def test_a_system_that_has_no_proc_has_an_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_first_line", lambda path: "")
    monkeypatch.setattr(locks, "_link", lambda path: "")
    monkeypatch.setattr(locks.uuid, "getnode", lambda: 1)
    first = machine_id(tmp_path / "a.lock")
    monkeypatch.setattr(locks.uuid, "getnode", lambda: 2)
    assert machine_id(tmp_path / "a.lock") != first
    assert process_start(os.getpid()) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_is_told_by_its_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = process_start(child.pid)
    assert began.isdigit()
    assert began == process_start(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not taken off the list yet
    assert process_start(child.pid) == ""
    child.communicate()
    assert process_start(child.pid) == ""
