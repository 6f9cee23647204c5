from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.locks import lock_file


def test_locks_of_servers_lie_in_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, other = (lock_file(f"http://{host}:5000", "promotion") for host in ("a", "b"))
    assert first != other
    assert first.parent == other.parent
    assert first.parent.stat().st_mode & 0o077 == 0
    assert lock_file("sqlite:////x/mlflow.db", "open") == Path("/x/mlflow.db.open.lock")


def test_a_folder_that_somebody_planted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = lock_file("http://a:5000", "promotion").parent
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MechdiffError, match="belongs to somebody else"):
        lock_file("http://a:5000", "promotion")
