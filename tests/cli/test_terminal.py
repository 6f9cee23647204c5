"""What a terminal of some width shows: nothing is cut, and progress is said where there is no terminal."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cli.conftest import Invoke
from cli.test_run import SITE
from rich.console import Console

import mechdiff_mlflow as md
from mechdiff_mlflow.cli import show
from mechdiff_mlflow.tracking.commands.session import Result

WIDTHS = (60, 80, 120)


@pytest.fixture
def done(toy: Path, mechdiff: Invoke) -> Result:
    """A run of the toy pair in the store of `here`."""
    settings = {"layer": 3, "hook": "resid_post", "alpha": "1", "promote": "champion", "force": True}
    return md.run(md.RunRequest(pair=str(toy), **settings))


def at_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(
        show,
        "_console",
        lambda: Console(width=width, highlight=False, force_terminal=True, color_system=None),
    )


def test_nothing_is_cut(
    done: Result, mechdiff: Invoke, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (patch,) = done.patches
    (version,) = done.versions
    assert patch.kl_raw is not None
    assert patch.drop_pct is not None
    wanted = ["L3/resid_post", "full", "KL_mapped", "skill %"]
    numbers = [f"{patch.kl_raw:.4g}", f"{patch.kl_mapped:.4g}", f"{patch.drop_pct.estimate:.1f}"]
    wanted += numbers
    for width in WIDTHS:
        at_width(monkeypatch, width)
        show.patches(done.patches, done.pair)
        table = capsys.readouterr().out.partition("Controls")[0]
        assert all(text in table for text in ("L3/resid_post", "full", "KL_mapped", "skill %", *numbers)), (
            table
        )
        runs = mechdiff("runs", "--pair", "toy").output
        assert all(text in runs for text in ("L3/resid_post", numbers[2])), runs
        assert max(map(len, runs.split())) >= 32, "the id of the run is whole"
        maps = mechdiff("maps").output
        assert version.name in maps
        for text in (table, runs, maps):
            assert "…" not in text
            rows = [line for line in text.splitlines() if not line.startswith("No room for")]
            assert max(map(len, rows)) <= width
    assert "No room for" not in table, "120 columns have room for everything"


def test_a_comparison_is_a_table(
    toy: Path, mechdiff: Invoke, monkeypatch: pytest.MonkeyPatch, done: Result
) -> None:
    twin = toy.with_name("twin.yaml")
    twin.write_text(toy.read_text().replace("name: toy", "name: twin"))
    mechdiff("run", "--pair", str(twin), *SITE, "--alpha", "1")
    for width in WIDTHS:
        at_width(monkeypatch, width)
        shown = mechdiff("compare", str(toy), str(twin)).output
        assert "| --- |" not in shown
        assert "**" not in shown
        assert "difference" in shown
        assert "L3/resid_post" in shown


def test_without_a_terminal_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "LINE_S", 0.01)
    with show.bars() as stage, stage("patching tuned on test", 150) as advance:
        advance(30)
        time.sleep(0.2)
    assert "patching tuned on test: 30 of 150, " in capsys.readouterr().err
    with show.bars() as stage:
        for _ in range(2):
            with stage("patching tuned on test", 3):
                pass
