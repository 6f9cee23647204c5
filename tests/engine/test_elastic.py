"""When memory runs out, chunks get smaller and nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_safety import assert_same, groups, state
from torch import nn

from mechdiff_mlflow.engine import PatchEngine, ScoreResult
from mechdiff_mlflow.engine.memory.oom_retry import ChunkLimits, is_out_of_memory
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.metrics import compare_rows
from mechdiff_mlflow.spec.sites import Hook, Site

PROMPTS = tiny.prompts(9, 5, 12, 5, 7, 3, 9, 6)
SITES = [Site(0, Hook.ATTN_OUT), Site(1, Hook.RESID_POST)]
MODES = ["sweep", "masked", "naive"]


def out_of_device_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8 GiB.")


def out_of_main_memory() -> Exception:
    return RuntimeError(
        "[enforce fail] err == 0. DefaultCPUAllocator: not enough memory: you tried to allocate"
    )


class SmallMemory:
    """A hook that raises when a block is given more tokens than fit."""

    def __init__(self, model: nn.Module, error: Callable[[], Exception] = out_of_device_memory) -> None:
        self.room = 10**9
        self.most_seen = 0
        self._error = error
        for layer in model.model.layers:
            layer.register_forward_pre_hook(self._check)

    def _check(self, module: nn.Module, args: Any) -> None:
        n_tokens = args[0].shape[0] * args[0].shape[1]
        if n_tokens > self.room:
            raise self._error()
        self.most_seen = max(self.most_seen, n_tokens)


def assert_equal_scores(a: ScoreResult, b: ScoreResult) -> None:
    for x, y in zip(a.divergences, b.divergences, strict=True):
        torch.testing.assert_close(x.kl_patched_clean, y.kl_patched_clean, rtol=1e-10, atol=1e-13)
    for site, x in a.clean.items():
        torch.testing.assert_close(x, b.clean[site], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("error", [out_of_device_memory, out_of_main_memory])
@pytest.mark.parametrize("mode", MODES)
def test_scores_are_those_of_a_machine_with_more_memory(mode: str, error: Callable[[], Exception]) -> None:
    model = tiny.llama(n_layers=2, dtype=torch.float64)
    memory = SmallMemory(model, error)
    engine = PatchEngine(model, mode=mode, batch_size=8)
    expected = engine.score(PROMPTS, groups(3))
    before = state(model)
    memory.room, memory.most_seen = 30, 0
    with pytest.warns(
        UserWarning, match=r"ran out with chunks of 8 prompts, 8192 .* going on with \d "
    ) as said:
        found = engine.score(PROMPTS, groups(3))
    assert_equal_scores(found, expected)
    assert_same(before, state(model))
    assert 0 < memory.most_seen <= 30
    assert engine.limits.batch_size < 8
    assert len(said) <= 3, "once for each size that it settled on, not for each attempt"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal_scores(engine.score(PROMPTS, groups(3)), expected)  # the smaller size is kept


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_runs_out_between_rows_of_logits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a path is in the midst of its work, with modules of the model replaced."""
    model = tiny.llama(n_layers=2, dtype=torch.float64)
    engine = PatchEngine(model, mode=mode, batch_size=8, head_rows=16)
    expected = engine.score(PROMPTS, groups(3))
    before, calls = state(model), [0]

    def compare(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise out_of_device_memory()
        return compare_rows(*args)

    monkeypatch.setattr("mechdiff_mlflow.engine.patch_engine.compare_rows", compare)
    with pytest.warns(UserWarning, match="Memory ran out with chunks of 8 prompts"):
        found = engine.score(PROMPTS, groups(3))
    assert_equal_scores(found, expected)
    assert_same(before, state(model))


def test_captures_gradients_and_heads_back_off_too() -> None:
    model = tiny.llama(n_layers=2, dtype=torch.float64)
    memory = SmallMemory(model)
    uses: list[Callable[[PatchEngine], torch.Tensor]] = [
        lambda engine: torch.stack(list(engine.capture(PROMPTS, SITES).values())),
        lambda engine: torch.stack(list(engine.score_gradients(PROMPTS, SITES, seed=3).values())),
        lambda engine: engine.heads(1).capture(PROMPTS),
    ]
    for use in uses:
        memory.room = 10**9
        engine = PatchEngine(model, batch_size=8)
        expected = use(engine)
        memory.room = 24
        with pytest.warns(UserWarning, match="going on with [1-3] prompts, 8192 patched tokens"):
            torch.testing.assert_close(use(engine), expected, rtol=1e-10, atol=1e-13)


def test_a_prompt_that_does_not_fit_alone_says_what_to_do() -> None:
    model = tiny.llama(n_layers=2)
    memory = SmallMemory(model)
    engine = PatchEngine(model)
    before = state(model)
    memory.room = 8
    remedy = r"One prompt of 9 tokens does not fit in memory .*out of memory.*; shorten the prompts, load"
    with pytest.raises(MechdiffError, match=remedy):
        engine.score(PROMPTS, groups())
    with pytest.raises(MechdiffError, match=remedy):
        engine.capture(PROMPTS, SITES)
    assert_same(before, state(model))


def test_running_out_at_start_up_is_no_reason_for_a_slower_way() -> None:
    model = tiny.llama(n_layers=2)
    SmallMemory(model).room = 4
    with pytest.raises(MechdiffError, match="start-up check do not fit in memory"):
        PatchEngine(model)


def test_other_errors_are_not_swallowed() -> None:
    model = tiny.llama(n_layers=2)
    memory = SmallMemory(model, lambda: RuntimeError("size mismatch"))
    engine = PatchEngine(model)
    memory.room = 3
    with pytest.raises(RuntimeError, match="size mismatch"):
        engine.capture(PROMPTS, SITES)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert is_out_of_memory(MemoryError())


def test_bounds_shrink_to_nothing_in_few_steps() -> None:
    limits, n_steps = ChunkLimits(32, 8192, 2048), 0
    while (less := limits.less(limits.batch_size, patched=True)) is not None:
        assert less != limits
        assert less == less.within(limits)
        limits, n_steps = less, n_steps + 1
    assert limits == ChunkLimits(1, 1, 1)
    assert n_steps <= 9
    assert ChunkLimits(1).less(1, patched=False) is None
    assert ChunkLimits(4).less(4, patched=False) == ChunkLimits(2)
