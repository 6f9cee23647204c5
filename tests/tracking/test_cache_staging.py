import os
import time
from pathlib import Path

import pytest

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store.user_cache import (
    CACHE_VARIABLE,
    STAGING_VARIABLE,
    forget_old_staging,
    staging,
)


def test_staging_is_in_the_cache_or_where_it_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.delenv(STAGING_VARIABLE, raising=False)
    assert staging("a1") == tmp_path / "staging" / "a1"
    monkeypatch.setenv(STAGING_VARIABLE, str(tmp_path / "fast"))
    assert staging("a1") == tmp_path / "fast" / "a1"


@pytest.mark.parametrize("run_id", ["", "..", "a/b", "../x", "a\0", "x" * 65])
def test_a_run_id_cannot_lead_elsewhere(run_id: str) -> None:
    with pytest.raises(MechdiffError, match="is no run id"):
        staging(run_id)


def test_only_old_leftovers_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    forget_old_staging()
    old, new = (tmp_path / "staging" / name for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "x").write_text("")
    long_ago = time.time() - 15 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    forget_old_staging()
    assert [old.exists(), new.exists()] == [False, True]
