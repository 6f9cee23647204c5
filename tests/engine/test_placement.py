"""Models whose blocks lie elsewhere: offloaded to main memory or disk, or on several GPUs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from test_recorded import assert_bits
from test_safety import assert_same, groups, same_scores, state
from torch import nn

from mechdiff_mlflow.engine import CleanRunCache, PatchEngine
from mechdiff_mlflow.spec.sites import Hook, Site

PROMPTS = tiny.prompts(9, 5, 12, 5, 7, 3)
SITES = [Site(layer, hook) for layer in range(2) for hook in Hook]

Place = Callable[[nn.Module, Path], nn.Module]


def in_main_memory(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def partly_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    where |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return dispatch_model(model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("mode", ["auto", "naive"])
@pytest.mark.parametrize("place", [in_main_memory, on_disk, partly_on_disk])
def test_offloaded_models_give_the_same(place: Place, mode: str, tmp_path: Path) -> None:
    model = tiny.llama(n_layers=2)
    plain = PatchEngine(model)
    offloaded = place(copy.deepcopy(model).eval(), tmp_path)
    assert any(p.is_meta for p in offloaded.parameters())
    before = state(offloaded) | {"parameters": {}}
    engine = PatchEngine(offloaded, mode=mode, batch_size=4, cache=CleanRunCache(2**21))
    assert engine.mode == ("sweep" if mode == "auto" else "naive")
    found = engine.score(PROMPTS, groups())
    assert same_scores(found, plain.score(PROMPTS, groups()))
    before_recording = engine.n_forwards
    recorded = engine.record(PROMPTS, SITES)
    for _ in range(2):
        assert_bits(engine.score(recorded, groups()), found)
    if mode == "auto":
        assert engine.n_forwards == before_recording + len(PROMPTS)
    expected = plain.capture(PROMPTS, SITES)
    for site, x in engine.capture(PROMPTS, SITES).items():
        torch.testing.assert_close(x, expected[site], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        engine.heads(1).project(engine.heads(1).capture(PROMPTS)),
        plain.heads(1).project(plain.heads(1).capture(PROMPTS)),
        rtol=1e-5,
        atol=1e-5,
    )
    gradients = plain.score_gradients(PROMPTS, SITES)
    for site, gradient in engine.score_gradients(PROMPTS, SITES).items():
        torch.testing.assert_close(gradient, gradients[site], rtol=1e-3, atol=1e-5)
    assert_same(before, state(offloaded) | {"parameters": {}})


EVERYWHERE = [Site(layer, hook) for layer in range(4) for hook in Hook]
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""In bfloat16 other devices round otherwise, and fusing kernels leave alone what accelerate has wrapped."""

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
dtypes = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def assert_alike(engine: PatchEngine, plain: PatchEngine, dtype: torch.dtype) -> None:
    """Captures and patches at every site, and what is recorded gives the same to the bit."""
    close = CLOSE[dtype]
    expected = plain.capture(PROMPTS, EVERYWHERE)
    for site, captured in engine.capture(PROMPTS, EVERYWHERE).items():
        torch.testing.assert_close(captured, expected[site], rtol=close, atol=2 * close)
    wanted = groups(2, EVERYWHERE)
    a, b = (e.score(PROMPTS, wanted) for e in (engine, plain))
    for x, y in zip(a.divergences, b.divergences, strict=True):
        torch.testing.assert_close(x.kl_patched_clean, y.kl_patched_clean, rtol=close, atol=close / 10)
    before = engine.n_forwards
    recorded = engine.record(PROMPTS, EVERYWHERE)
    assert recorded.n_kept == len(PROMPTS)
    for _ in range(2):
        assert_bits(engine.score(recorded, wanted), a)
    assert engine.n_forwards == before + len(PROMPTS)


@two_gpus
@dtypes
def test_blocks_on_two_gpus_give_the_same(dtype: torch.dtype) -> None:
    model = tiny.llama(n_layers=4, dtype=dtype)
    plain = PatchEngine(copy.deepcopy(model).to("cuda:0"))
    where = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.rotary_emb": 0}
    where |= {"model.layers.2": 1, "model.layers.3": 1, "model.norm": 1, "lm_head": 1}
    engine = PatchEngine(dispatch_model(model, where))
    assert engine.mode == plain.mode == "sweep"
    assert {p.device.index for p in model.parameters()} == {0, 1}
    assert_alike(engine, plain, dtype)
    gradients = engine.score_gradients(PROMPTS, EVERYWHERE)
    assert all(bool(g.abs().max() > 0) for g in gradients.values())


@two_gpus
@dtypes
def test_a_model_on_the_other_gpu_gives_the_same(dtype: torch.dtype) -> None:
    """Which is not the current device, so that kernels and copies must not look at that one."""
    model = tiny.llama(n_layers=4, dtype=dtype)
    plain = PatchEngine(copy.deepcopy(model).to("cuda:0"))
    engine = PatchEngine(model.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert engine.mode == plain.mode == "sweep"
    assert_alike(engine, plain, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@dtypes
def test_a_gpu_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    model = tiny.llama(n_layers=4, dtype=dtype)
    plain = PatchEngine(copy.deepcopy(model))
    engine = PatchEngine(model.cuda(), batch_size=4)
    assert engine.mode == "sweep"
    assert_alike(engine, plain, dtype)
    on_gpu = engine.record(PROMPTS, EVERYWHERE, device="cuda")
    assert on_gpu.activations[EVERYWHERE[0]].is_cuda
    assert engine.score(on_gpu, groups()).clean[SITES[0]].is_cuda
