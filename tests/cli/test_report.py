"""The report that writes itself: its numbers are those of the runs, and nothing depends on it."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
import pytest
from cli.conftest import Invoke
from cli.test_run import SITE, runs_of
from mlflow.entities import Run


@pytest.fixture
def measured(toy: Path, mechdiff: Invoke) -> None:
    sites = "L2/attn_out:0.7,L3/resid_post:1"
    mechdiff("sweep", "--pair", str(toy), "--sites", sites, "--ranks", "1,4,full", "--targets", "10")
    mechdiff("run", "--pair", str(toy), *SITE)


def tables(markdown: str) -> list[list[dict[str, str]]]:
    """Every table of a Markdown text, as rows by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        head, _, *rows = [
            [cell.strip() for cell in line.strip("| \n").split(" | ")] for line in block.splitlines()
        ]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def agrees(printed: str, exact: float) -> bool:
    """Whether `printed` is `exact` rounded to the digits that it shows."""
    mantissa, _, exponent = printed.partition("e")
    digits = len(mantissa.partition(".")[2])
    return abs(float(printed) - exact) <= 0.5000001 * 10 ** (int(exponent or 0) - digits)


def test_tables_equal_the_metrics_to_the_printed_digit(
    measured: None, toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("report", "--pair", str(toy))
    runs: dict[str, Run] = {run.info.run_id: run for found in runs_of(client).values() for run in found}
    checked = 0
    for table in tables((here / "mechdiff-report.md").read_text()):
        for row in table:
            if "KL_mapped" not in row:
                continue
            data = runs[row["run"].strip("`")].data
            assert row["k"] == data.params["k"]
            assert float(row["α"]) == float(data.params["alpha"])
            for column, key in {
                "KL_raw": "KL_raw",
                "KL_mapped": "KL_mapped",
                "floor": "noise_floor",
                "ρ": "rho",
            }.items():
                assert agrees(row[column], data.metrics[key]), (column, row)
            for name in ("drop", "skill"):
                numbers = re.findall(r"-?[\d.]+", row[f"{name} %"])
                keys = [f"{name}_pct", f"ci/{name}_pct_low", f"ci/{name}_pct_high"]
                assert all(agrees(n, data.metrics[k]) for n, k in zip(numbers, keys, strict=True)), row
            checked += 1
    assert checked == 2 + 7, "one row a site, and one for every cell"


def test_the_html_needs_nothing_from_the_network(
    measured: None, toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("report", "--pair", str(toy), "--out", "sub/mine.html")
    page = (here / "sub/mine.html").read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=", page)
    assert page.count("* plotly.js v") == 1
    assert page.count("Plotly.newPlot(") >= 3
    for picture in re.findall(r"!\[.*\]\((.*)\)", (here / "sub/mine.md").read_text()):
        assert (here / "sub" / picture).read_bytes().startswith(b"\x89PNG")
    (run,) = runs_of(client)["report"]
    logged = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"mine.md", "mine.html", "mine-figures"} <= logged


def test_deleting_the_reports_run_loses_nothing(
    measured: None, toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("report", "--pair", str(toy))
    first = (here / "mechdiff-report.md").read_text()
    (run,) = runs_of(client)["report"]
    client.delete_run(run.info.run_id)
    mechdiff("report", "--pair", str(toy))
    assert (here / "mechdiff-report.md").read_text() == first


def test_what_is_said_is_what_was_run(
    measured: None, toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("report", "--pair", str(toy))
    text = (here / "mechdiff-report.md").read_text()
    assert "only n=40 prompts" in text
    # L2/attn_out is known from a sweep only; the run has measured L3/resid_post by itself.
    assert "- `L2/attn_out` quotes the best of 3 cells, picked on the reported prompts. " in text
    assert "`L3/resid_post` quotes" not in text
    assert "10 % target" in text
    commands = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert commands is not None
    assert (
        f"mechdiff sweep --pair {toy} --sites L2/attn_out:0.7,L3/resid_post:1 --ranks 1,4,full" in commands[1]
    )
    assert re.search(
        rf"^mechdiff run --pair {toy} .*--layer 3 --hook resid_post", commands[1], re.MULTILINE
    ), commands[1]
    assert "Atlas" not in text, "no atlas was run"
    (sweep,) = runs_of(client)["sweep"]
    paths = {item.path for item in client.list_artifacts(sweep.info.run_id)}
    assert {"figures.html", "figures", "least_ranks.json", "summary.json"} <= paths


def test_nothing_to_report(toy: Path, mechdiff: Invoke) -> None:
    assert "There is no experiment 'toy'" in mechdiff("report", "--pair", str(toy), code=1).output
    mechdiff("fit", "--pair", str(toy), *SITE, "--alpha", "1")
    assert "No finished patch run of pair 'toy'" in mechdiff("report", "--pair", str(toy), code=1).output
    mechdiff("run", "--pair", str(toy), *SITE, "--alpha", "1")
    assert "unknown suffix" in mechdiff("report", "--pair", str(toy), "--out", "x.pdf", code=1).output
