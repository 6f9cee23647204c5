"""Prints what a large scoring, and one whose runs are kept, hold at their peak, and numbers.

python measure_peak.py BUDGET|none; run by test_budget.py in processes of their own.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import tiny
import torch
from transformers import LlamaConfig

from mechdiff_mlflow.engine import CleanRunCache, PatchEngine, VariantGroup
from mechdiff_mlflow.engine.memory.budget import parse_bytes
from mechdiff_mlflow.spec.sites import Hook, Site

N_VARIANTS, WIDTH = 24, 64
SITES = [Site(layer, hook) for layer in range(3) for hook in Hook]


def resident_bytes(what: str) -> int:
    """VmRSS, or since the last reset VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def peak_of(work: Callable[[], torch.Tensor]) -> tuple[int, list[float]]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peaks so far
    before = resident_bytes("VmRSS")
    numbers = work()
    return resident_bytes("VmHWM") - before, numbers.tolist()


def main() -> None:
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=WIDTH,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    budget = None if sys.argv[1] == "none" else parse_bytes(sys.argv[1])
    engine = PatchEngine(tiny.build(config), batch_size=32, cache=CleanRunCache(budget))
    offsets = torch.randn(N_VARIANTS, WIDTH, generator=torch.Generator().manual_seed(0))
    groups = [VariantGroup(s, lambda i, x: x[:, None] + offsets, N_VARIANTS) for s in SITES]
    few = tiny.prompts(*range(20, 52))
    some = tiny.prompts(*[n for n in range(20, 52) for _ in range(12)])

    def score() -> torch.Tensor:
        return torch.stack([x.kl_patched_clean.mean() for x in engine.score(few, groups).divergences])

    def keep() -> torch.Tensor:
        recorded = engine.record(some, SITES)
        print(recorded.n_kept, "kept", file=sys.stderr)
        return torch.stack([x.kl_patched_clean.mean() for x in engine.score(recorded, groups).divergences])

    print(json.dumps({"score": peak_of(score), "keep": peak_of(keep)}))


main()
