"""What a worker does with what it is handed, without a cluster around it."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from asking import replacements

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.workers.cluster import connected
from mechdiff_mlflow.experiments.workers.ray_workers import PairWorker, _gpus_of_each
from mechdiff_mlflow.experiments.workers.tasks import Capture, Score
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.version import source_sha256


@pytest.fixture
def lazy(toy: Path) -> Pair:
    return load_pair(PairSpec.load(str(toy)), options=EngineOptions(batch_size=4), lazily=True)


@pytest.fixture
def worker(lazy: Pair, monkeypatch: pytest.MonkeyPatch) -> PairWorker:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    return PairWorker(lazy.spec, "cpu", lazy.options, lazy.fingerprint, source_sha256(), needs_token=True)


def test_a_worker_gives_what_the_task_gives(worker: PairWorker, lazy: Pair, small_batches: Pair) -> None:
    loaded = worker.call("load").loaded
    assert loaded is not None
    assert loaded.device == "cpu"
    assert loaded.environment.engine_mode == "sweep"
    task = Score(lazy.prompts_of("val"), Position.DECISION, replacements())
    found = worker.call("run", task, range(len(task.prompts)))
    expected = task.run(small_batches)
    assert found.error is None
    assert found.value.keys() == set(expected)
    assert all(torch.equal(found.value[name], expected[name]) for name in expected)
    some = worker.run(task, [3, 5])
    # Logits are rounded otherwise in another batch.
    rows = [name for name in expected if name.startswith(("base/", "tuned/"))]
    assert all(torch.equal(some[name], expected[name][[3, 5]]) for name in rows)
    assert worker.ask(Pair.prompts_of, "val") == lazy.prompts_of("val")
    assert not lazy.base.model_cache._models, "asking for prompts and digests loads no model"


def test_a_worker_says_what_is_wrong_instead_of_dying(worker: PairWorker, lazy: Pair) -> None:
    task = Capture(lazy.prompts_of("val"), Position.DECISION, "base", (Site(99, Hook.ATTN_OUT),))
    found = worker.call("run", task, range(len(task.prompts)))
    assert found.value is None
    assert found.error is not None
    assert "99" in found.error


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"fingerprint": "0" * 16}, "is [0-9a-f]{16} and the driver's is 0{16}; give all nodes the same"),
        ({"source": "0"}, "has other code of mechdiff than the driver began with; install one version"),
        ({"device": "cuda:99"}, "Device 'cuda:99' cannot be used here"),
    ],
)
def test_a_worker_that_is_not_like_the_driver_is_not_let_in(
    worker: PairWorker, change: dict[str, Any], error: str
) -> None:
    with pytest.raises(MechdiffError, match=error):
        replace(worker, **change).load()


def test_a_cluster_that_everybody_can_use_is_refused(
    worker: PairWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in (None, "disabled"):
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        if mode:
            monkeypatch.setenv("RAY_AUTH_MODE", mode)
        found = replace(worker).call("load")
        assert found.error is not None
        assert "asks for no token" in found.error
        assert replace(worker, needs_token=False).call("load").error is None


@pytest.mark.parametrize("address", ["a b:1", "ray://x:1", "10.0.0.1", "x:123456", "x:1\n", "$(id):1", ""])
def test_what_is_no_address_is_said(address: str) -> None:
    with (
        pytest.raises(MechdiffError, match="is none of a Ray cluster; pass own, auto"),
        connected(address, 1),
    ):
        pass


def test_ray_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MechdiffError, match=r"pip install 'mechdiff-mlflow\[ray\]'"), connected("own", 1):
        pass


def test_an_address_where_nobody_listens_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(MechdiffError, match=f"Nobody listens at {address}"), connected(address, 1):
            pass


@pytest.mark.parametrize(
    ("device", "asked", "device_map", "gpus"),
    [
        ("auto", None, None, 1),
        ("cuda", None, None, 1),
        ("auto", 2, "auto", 2),
        ("cpu", None, None, 0),
        ("auto", None, "auto", "say over how many of a node with --gpus-per-worker"),
        ("cuda", 5, None, "needs 5 GPUs and no node of the cluster has more than 4"),
    ],
)
def test_a_worker_takes_the_gpus_it_needs(
    lazy: Pair, device: str, asked: int | None, device_map: str | None, gpus: int | str
) -> None:
    nodes = [
        {"Alive": True, "Resources": {"GPU": 4.0}},
        {"Alive": False, "Resources": {"GPU": 8.0}},
        {"Alive": True, "Resources": {}},
    ]
    ray = SimpleNamespace(nodes=lambda: nodes)
    pair = replace(lazy, spec=lazy.spec.model_copy(update={"device_map": device_map}))
    if isinstance(gpus, str):
        with pytest.raises(MechdiffError, match=gpus):
            _gpus_of_each(ray, pair, device, asked)
    else:
        assert _gpus_of_each(ray, pair, device, asked) == gpus
        assert _gpus_of_each(SimpleNamespace(nodes=lambda: nodes[2:]), pair, "auto", None) == 0


def test_a_worker_needs_no_mlflow() -> None:
    code = (
        "import sys, mechdiff_mlflow.experiments.workers.ray_workers\n"
        "print(*sorted({'mlflow', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == ""
