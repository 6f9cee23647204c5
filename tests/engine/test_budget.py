"""The memory budget: what it allows, that it is kept, and that results are the same under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_elastic import assert_equal_scores
from test_safety import groups

from mechdiff_mlflow.engine import CleanRunCache, PatchEngine
from mechdiff_mlflow.engine.memory.budget import Load, ModelShape, limits_within, needed, parse_bytes, size
from mechdiff_mlflow.engine.memory.oom_retry import ChunkLimits
from mechdiff_mlflow.errors import MechdiffError

LLAMA_8B = ModelShape(
    n_layers=32,
    width=4096,
    inner=14336,
    heads_width=4096,
    kv_width=1024,
    n_heads=32,
    vocabulary=128_256,
    number=2,
    keeps_scores=False,
)
PROMPTS = tiny.prompts(9, 5, 12, 5, 7, 3, 9, 6)


def total(limits: ChunkLimits, load: Load) -> int:
    return sum(needed(limits, LLAMA_8B, load).values())


powers = st.integers(0, 14).map(lambda n: 2**n)


@given(
    budget=st.integers(2**20, 2**40),
    most=st.builds(ChunkLimits, powers, powers, powers),
    load=st.builds(Load, st.integers(1, 8192), n_columns=st.integers(0, 5000), tree=st.booleans()),
)
def test_bounds_fit_the_budget_and_none_is_larger_than_asked(
    budget: int, most: ChunkLimits, load: Load
) -> None:
    try:
        limits = limits_within(budget, most, LLAMA_8B, load)
    except MechdiffError:
        assert total(ChunkLimits(1, 1, 1), load) > budget * 3 // 4
        return
    assert total(limits, load) <= budget * 3 // 4
    assert limits == limits.within(most)
    if total(most, load) <= budget * 3 // 4:
        assert limits == most


def test_what_an_8b_model_needs() -> None:
    """128 tokens: the recorded keys and values alone are 2 · 2 · 32 · 1024 bytes a token, 16 MiB a prompt."""
    one = needed(ChunkLimits(1, 1, 1), LLAMA_8B, Load(128, n_columns=1))
    assert one["batch_size"] > 128 * 32 * 2 * 1024 * 2
    assert one["head_rows"] == 128_256 * 6 + 4096 * 2
    assert total(ChunkLimits(32, 8192, 2048), Load(128, n_columns=384)) < 8 * 2**30
    with pytest.raises(
        MechdiffError, match=r"One prompt of 128 tokens needs more than .*--memory-budget \d+"
    ):
        limits_within(2**20, ChunkLimits(), LLAMA_8B, Load(128, n_columns=384))


def test_the_least_budget_that_is_named_is_enough() -> None:
    with pytest.raises(MechdiffError) as refused:
        limits_within(1, ChunkLimits(), LLAMA_8B, Load(128))
    named = str(refused.value).split("--memory-budget ")[1].split()[0]
    assert limits_within(parse_bytes(named), ChunkLimits(), LLAMA_8B, Load(128))


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("8GiB", 2**33), ("500MB", 500_000_000), ("1.5KiB", 1536), ("64 MiB", 2**26), ("4096", 4096)],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "8gb", "8 PiB", "0GiB", "1e3MB", "nan"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(MechdiffError, match="is not a size; write"):
        parse_bytes(text)


@given(st.integers(1, 2**50))
def test_written_sizes_are_read_back_and_never_smaller(n_bytes: int) -> None:
    assert n_bytes <= parse_bytes(size(n_bytes)) <= 1.1 * n_bytes + 103


@pytest.mark.parametrize("mode", ["sweep", "masked", "naive"])
def test_results_are_the_same_under_any_budget(mode: str) -> None:
    model = tiny.llama(n_layers=2, dtype=torch.float64)
    expected = PatchEngine(model, mode=mode).score(PROMPTS, groups(5))
    for kib in (300, 1000, 10_000):
        engine = PatchEngine(model, mode=mode, cache=CleanRunCache(kib * 1024))
        assert_equal_scores(engine.score(PROMPTS, groups(5)), expected)
        assert engine.limits == ChunkLimits(), "a budget limits each call, not what memory allows"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read as Linux shows them")
def test_the_peak_stays_within_the_budget() -> None:
    budget, peaks, numbers = 32 * 2**20, {}, {}
    for words in ("none", "32MiB"):
        done = subprocess.run(
            [sys.executable, "measure_peak.py", words],
            cwd=Path(__file__).parent,
            # Otherwise the allocator keeps tens of megabytes that are free, and peaks say little.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
            capture_output=True,
            text=True,
            check=True,
        )
        for use, (peak, found) in json.loads(done.stdout).items():
            peaks[use, words], numbers[use, words] = peak, torch.tensor(found)
    for use in ("score", "keep"):
        torch.testing.assert_close(numbers[use, "32MiB"], numbers[use, "none"], rtol=1e-4, atol=1e-6)
        assert peaks[use, "32MiB"] <= budget < peaks[use, "none"], peaks
