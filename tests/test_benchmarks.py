import re
import sys
from pathlib import Path

import pytest

from benchmarks import fits
from mechdiff_mlflow.solvers import SOLVERS


def test_fits_compares_every_ranked_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "report.md"
    monkeypatch.setattr(sys, "argv", ["fits", "--d=96", "--n=40", "--device=cpu", f"--out={out}"])
    fits.main()
    report = out.read_text(encoding="utf-8")
    rows = re.findall(r"\| (\w+) \| (\w+) \| [\d.]+ \| (\S+) \|", report)
    assert {name for name, _, _ in rows} == {row.name for row in SOLVERS.values() if row.ranked}
    assert all(float(difference) < 1e-8 for _, _, difference in rows)
    assert "Nothing is extrapolated" in report


def test_fits_refuses_unknown_solvers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fits", "--dense=svd"])
    with pytest.raises(SystemExit):
        fits.main()
    assert "unknown solvers svd; use procrustes_scaled" in capsys.readouterr().err
