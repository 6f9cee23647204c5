"""Models whose blocks lie elsewhere: offloaded to main memory or disk, or on several GPUs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from test_safety import assert_same, groups, same_scores, state
from torch import nn

from mechdiff_mlflow.engine import PatchEngine
from mechdiff_mlflow.engine.budget import MemoryBudget
from mechdiff_mlflow.sites import Hook, Site

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
    engine = PatchEngine(offloaded, mode=mode, batch_size=4, budget=MemoryBudget(2**21))
    assert engine.mode == ("sweep" if mode == "auto" else "naive")
    found = engine.score(PROMPTS, groups())
    assert same_scores(found, plain.score(PROMPTS, groups()))
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_on_two_gpus_give_the_same(dtype: torch.dtype) -> None:
    model = tiny.llama(n_layers=4, dtype=dtype)
    plain = PatchEngine(copy.deepcopy(model).to("cuda:0"))
    where = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.rotary_emb": 0}
    where |= {"model.layers.2": 1, "model.layers.3": 1, "model.norm": 1, "lm_head": 1}
    engine = PatchEngine(dispatch_model(model, where))
    assert engine.mode == "sweep"
    a, b = (e.score(PROMPTS, groups()) for e in (engine, plain))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for x, y in zip(a.divergences, b.divergences, strict=True):
        torch.testing.assert_close(
            x.kl_patched_clean, y.kl_patched_clean, rtol=tolerance, atol=tolerance / 10
        )
    sites = [Site(layer, hook) for layer in range(4) for hook in Hook]
    expected = plain.capture(PROMPTS, sites)
    for site, captured in engine.capture(PROMPTS, sites).items():
        torch.testing.assert_close(captured, expected[site], rtol=tolerance, atol=tolerance)
    engine.score_gradients(PROMPTS, sites)
