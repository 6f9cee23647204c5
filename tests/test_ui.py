"""End to end: what a person sees in MLflow's own UI, in a real browser, on a real server."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.tracking.content.view import view_url
from mechdiff_mlflow.tracking.store.store import open_store

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=2200,1200"),
)
START_S, SHOW_S, LOOKS = 120, 180, 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed to look at the UI with"),
]


@pytest.fixture(scope="module")
def server(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server on a store that a sweep of the toy pair has filled."""
    folder = tmp_path_factory.mktemp("ui")
    store = f"sqlite:///{folder / 'mlflow.db'}"
    words = ["sweep", "--pair", str(toy), "--sites", "L2/attn_out,L3/resid_post", "--alphas", "0.5,1"]
    result = CliRunner().invoke(
        cli, [*words, "--ranks", "1,4,full", "--targets", "10", "--tracking-uri", store]
    )
    assert result.exit_code == 0, result.output
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env={**os.environ, **quiet},
            stdout=log,
            stderr=log,
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}", process, folder / "server.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"The server did not start: {log.read_text()}")


def page(url: str, tmp_path: Path, *, once: str) -> str:
    """What the browser shows at `url` once it has the text `once`; a busy machine takes several looks."""
    assert BROWSER is not None
    dom = ""
    for look in range(1, LOOKS + 1):
        profile = f"--user-data-dir={tmp_path / f'browser{look}'}"
        budget = f"--virtual-time-budget={30_000 * look}"
        done = subprocess.run(
            [BROWSER, *FLAGS, profile, budget, "--dump-dom", url],
            capture_output=True,
            text=True,
            timeout=SHOW_S,
            check=True,
        )
        dom = done.stdout
        if once in dom:
            break
    return dom


def test_the_view_opens_with_runs_filter_and_columns(server: str, tmp_path: Path) -> None:
    store = open_store(server)
    dom = page(view_url(store, store.experiment_id("toy")), tmp_path, once="drop_pct")
    assert "tags.`mechdiff.kind` = 'patch'" in dom
    assert "L3/resid_post k=full α=0.5 procrustes_scaled" in dom
    for column in ("layer", "hook", "family", "alpha", "drop_pct", "skill_pct", "KL_raw", "KL_mapped"):
        assert (
            re.search(rf'col-id="(?:params|metrics)\.`{column}`"|\$\$\${column}', dom) or f">{column}<" in dom
        )
    assert "12 matching runs" in re.sub(r"<[^>]+>", "", dom)


def test_the_view_opens_with_its_charts(server: str, tmp_path: Path) -> None:
    store = open_store(server)
    dom = page(
        view_url(store, store.experiment_id("toy")) + "&compareRunsMode=CHART",
        tmp_path,
        once="js-plotly-plot",
    )
    text = re.sub(r"<[^>]+>", " ", dom)
    assert "Maps (5)" in re.sub(r"\s+", " ", text)
    for title in ("Parallel Coordinates", "rank vs. drop_pct", "rank vs. alpha vs. drop_pct"):
        assert title in text
    assert dom.count("js-plotly-plot") >= 2, "charts are drawn, not empty"
