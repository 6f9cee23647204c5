"""`mlflow models serve` answers to a plain HTTP client, as the model card says."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from mechdiff_mlflow.tracking.content.card import PORT
from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.registry.promotion import promote
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import Store

from .conftest import D, make_map

START_S = 120
ALPHA = 0.3


@pytest.fixture
def card(store: Store, tracker: Tracker) -> str:
    """What the page of the champion says."""
    params = {"pair": "demo", "layer": 3, "hook": "attn_out"}
    record = RunRecord(kind="fit", name="fit", params=params, map=make_map(alpha=ALPHA))
    with tracker.run("run", "run") as run:
        fit = run.log(record)
    version = promote(store, fit, policy=PromotionPolicy(force=True))
    description: str = store.client.get_model_version(version.name, "1").description
    return description


@pytest.fixture
def served(store: Store, card: str, tmp_path: Path) -> Iterator[str]:
    """The address of a server that the card's own command started."""
    (line,) = re.findall(r"^mlflow models serve (?:.*\\\n)*.*$", card, re.MULTILINE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = shlex.split(line.replace("\\\n", "").replace(f"-p {PORT}", f"-p {port} -h 127.0.0.1"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it looks for uvicorn there
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": store.uri}
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/ping", process, tmp_path / "serve.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5)
        except OSError:
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"The server did not start: {log.read_text()}")


def post(url: str, body: bytes) -> bytes:
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        content: bytes = answer.read()
    return content


@pytest.mark.slow
def test_a_served_champion_answers_bit_for_bit(served: str, store: Store, card: str) -> None:
    the_map = make_map(alpha=ALPHA)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    mlflow.set_tracking_uri(store.uri)
    loaded = mlflow.pyfunc.load_model("models:/demo-L3-attn_out@champion")
    for params in ({}, {"alpha": 0.75}):
        body = json.dumps({"inputs": x.tolist(), "params": params}).encode()
        answer = np.array(json.loads(post(served, body))["predictions"], dtype=np.float32)
        native = the_map.with_alpha(params.get("alpha", ALPHA))(x).numpy()
        assert np.array_equal(answer, native)
        assert np.array_equal(loaded.predict(x.numpy(), params=params), native)
    # What the card pipes into curl is a question that is answered.
    (program,) = re.findall(r"^python -c '(.*)' \|$", card, re.MULTILINE)
    asked = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    answer = np.array(json.loads(post(served, asked))["predictions"], dtype=np.float32)
    assert np.array_equal(answer, the_map(torch.zeros(1, D)).numpy())
    with pytest.raises(urllib.error.HTTPError, match="400"):
        post(served, json.dumps({"inputs": [[0.0] * (D + 1)]}).encode())
