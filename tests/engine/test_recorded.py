"""Patching what was recorded: bit for bit what patching the prompts gives, without another clean run."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import test_spans
import tiny
import torch
from families import FAMILIES
from test_elastic import assert_equal_scores, out_of_device_memory
from test_safety import Bomb, assert_same, groups, state

from mechdiff_mlflow.engine import (
    CleanRunCache,
    CleanRuns,
    PatchEngine,
    ScoreResult,
    VariantGroup,
)
from mechdiff_mlflow.engine.memory import clean_runs as free
from mechdiff_mlflow.engine.memory.oom_retry import ChunkLimits
from mechdiff_mlflow.engine.model.forward import Recording
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.metrics import Divergences, compare_rows
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

SITES = [Site(layer, hook) for layer in range(2) for hook in Hook]
PROMPTS = tiny.prompts(9, 5, 12, 5, 7, 3, 9)
N = len(PROMPTS)
MODES = ["sweep", "masked", "naive"]


def assert_bits(a: ScoreResult, b: ScoreResult) -> None:
    for x, y in zip(a.divergences, b.divergences, strict=True):
        for field in fields(Divergences):
            assert torch.equal(getattr(x, field.name), getattr(y, field.name)), field.name
    assert list(a.clean) == list(b.clean)
    assert all(torch.equal(x, b.clean[site]) for site, x in a.clean.items())


def assert_kept_and_the_same(engine: PatchEngine, prompts: TokenizedPrompts, sites: list[Site]) -> CleanRuns:
    """Several scores of what is recorded once."""
    few = [VariantGroup.identity(sites[-1]), *groups(3)[1:2]]
    expected = [engine.score(prompts, wanted) for wanted in (groups(2), few)]
    captured = engine.capture(prompts, sites)
    before = engine.n_forwards
    recorded = engine.record(prompts, sites)
    assert engine.n_forwards == before + len(prompts)
    assert recorded.n_kept == len(recorded) == len(prompts)
    for site in sites:
        assert torch.equal(recorded.activations[site], captured[site]), site
    before = engine.n_forwards
    for _ in range(2):
        for wanted, result in zip((groups(2), few), expected, strict=True):
            assert_bits(engine.score(recorded, wanted), result)
    if engine.mode != "naive":
        assert engine.n_forwards == before
    return recorded


CHOSEN = (
    "Llama",
    "Mistral",
    "Gemma 2",
    "GPT-2",
    "OPT",
    "Granite",
    "GPT-OSS",
    "DeepSeek-V3",
    "Falcon",
    "Bloom",
)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in CHOSEN], ids=lambda f: f.name)
def test_families(family: Any) -> None:
    model = family.build(family.attentions[0])
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PatchEngine(model, batch_size=3)
    assert engine.mode == family.mode
    assert_kept_and_the_same(engine, PROMPTS, SITES)
    assert_same(before, state(model))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("from_end", [1, 3])
def test_ways_and_positions(mode: str, from_end: int) -> None:
    engine = PatchEngine(tiny.llama(n_layers=2), mode=mode, batch_size=3, max_rows=20, head_rows=7)
    recorded = assert_kept_and_the_same(engine, tiny.prompts(9, 5, 12, 5, 7, 3, 9, from_end=from_end), SITES)
    before = engine.n_forwards
    engine.score(recorded, groups(2))
    n_naive = 2 * len(SITES) * N
    assert engine.n_forwards == before + (n_naive if mode == "naive" else 0), (
        "patched runs, and no clean ones"
    )


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in ("Llama", "Mistral")], ids=lambda f: f.name
)
def test_spans_of_unequal_places(family: Any) -> None:
    """Of several tokens, which other ways compute than of one; by whole forwards where there is a window."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PatchEngine(family.build("sdpa"), batch_size=2)
        expected = engine.score(test_spans.prompts(), groups())
    recorded = engine.record(test_spans.prompts(), SITES)
    assert recorded.n_kept == len(recorded)
    assert_bits(engine.score(recorded, groups()), expected)


def test_the_first_score_records() -> None:
    engine = PatchEngine(tiny.llama(n_layers=2), batch_size=3)
    expected = engine.score(PROMPTS, groups())
    before = engine.n_forwards
    recorded = engine.record(PROMPTS, [*SITES, SITES[0]], now=False)
    assert recorded.sites == tuple(SITES)
    assert not recorded.is_complete
    assert engine.n_forwards == before
    for _ in range(2):
        assert_bits(engine.score(recorded, groups()), expected)
    engine.complete(recorded)
    assert engine.n_forwards == before + N
    other = [VariantGroup.identity(SITES[-2])]
    assert_bits(engine.score(recorded, other), engine.score(PROMPTS, other))


def test_what_a_score_began_is_completed() -> None:
    engine = PatchEngine(tiny.llama(n_layers=2), batch_size=3)
    captured, before = engine.capture(PROMPTS, SITES), engine.n_forwards
    recorded = engine.record(PROMPTS, SITES, now=False)

    keep = recorded.keep

    def stop(recording: Recording) -> None:
        keep(recording)
        raise KeyboardInterrupt

    recorded.keep = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.score(recorded, groups())
    recorded.keep = keep  # type: ignore[method-assign]
    assert 0 < recorded.n_kept < N
    engine.complete(recorded)
    assert engine.n_forwards == before + N
    assert all(torch.equal(recorded.activations[site], captured[site]) for site in SITES)


def kept_bytes(mode: str) -> int:
    """Of all prompts."""
    cache = CleanRunCache(2**30)
    recorded = PatchEngine(tiny.llama(n_layers=2), mode=mode, cache=cache, batch_size=2).record(
        PROMPTS, SITES
    )
    assert recorded.n_kept == N
    return held(cache)


def held(cache: CleanRunCache) -> int:
    return sum(cache._held.values())


def test_what_is_kept_of_a_prompt_is_what_the_docs_say() -> None:
    cache, n_tokens, n = CleanRunCache(2**30), 60, 3
    engine = PatchEngine(tiny.llama(n_layers=2), cache=cache)
    recorded = engine.record(tiny.prompts(*[n_tokens] * n), SITES)
    assert recorded.n_kept == n
    found = held(cache) / n
    keys, width, layers = 2 * 8, 32, 2
    said = 4 * (2 * n_tokens * keys * layers + 2 * width * layers + len(SITES) * width + tiny.VOCABULARY)
    assert found == pytest.approx(said, rel=0.1)


@pytest.mark.parametrize("mode", MODES)
def test_of_what_does_not_fit_a_part_is_kept(mode: str) -> None:
    model = tiny.llama(n_layers=2)
    expected = PatchEngine(model, mode=mode, batch_size=2).score(PROMPTS, groups())
    wanted = kept_bytes(mode)
    for share, least, most in ((0.0, 0, 0), (0.6, 1, N - 1), (1.1, N, N)):
        cache = CleanRunCache(2**24)  # of which 2 MiB may be kept by recordings
        others = Counter({torch.device("cpu"): 2**21 - int(share * wanted)})
        cache.reserve(others)
        engine = PatchEngine(model, mode=mode, batch_size=2, cache=cache)
        recorded = engine.record(PROMPTS, SITES)
        assert least <= recorded.n_kept <= most, (share, recorded.n_kept)
        before = engine.n_forwards
        for _ in range(2):
            assert_bits(engine.score(recorded, groups()), expected)
        if mode != "naive":
            assert engine.n_forwards == before + 2 * (N - recorded.n_kept)
        del recorded
        assert held(cache) == others.total(), "all is given back with the recording"


def test_many_recordings_share_what_one_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is given shard after shard does not fill its memory."""
    wanted = kept_bytes("sweep")
    monkeypatch.setattr("mechdiff_mlflow.engine.memory.clean_runs.free_bytes", lambda device: 3 * wanted)
    engine = PatchEngine(tiny.llama(n_layers=2), batch_size=2)
    shards = [engine.record(PROMPTS[i : i + 3], SITES) for i in (0, 3)]
    shards += [engine.record(PROMPTS, SITES) for _ in range(3)]
    assert [shard.n_kept for shard in shards[:2]] == [3, 3]
    assert sum(shard.n_kept for shard in shards) <= N
    del shards
    assert engine.record(PROMPTS, SITES).n_kept == N, "what one gave back another may take"


def test_without_a_budget_a_share_of_what_is_free_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PatchEngine(tiny.llama(n_layers=2), batch_size=2)
    expected = engine.score(PROMPTS, groups())
    for n_bytes, kept in ((0, 0), (4 * kept_bytes("sweep") * 2 // 3, None), (2**30, N)):
        monkeypatch.setattr(
            "mechdiff_mlflow.engine.memory.clean_runs.free_bytes", lambda device, n=n_bytes: n
        )
        recorded = engine.record(PROMPTS, SITES)
        assert recorded.n_kept == kept if kept is not None else 0 < recorded.n_kept < N
        assert_bits(engine.score(recorded, groups()), expected)


@pytest.mark.parametrize("mode", MODES)
def test_when_memory_runs_out_the_kept_goes_first(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama(n_layers=2)
    cache = CleanRunCache()
    engine = PatchEngine(model, mode=mode, batch_size=3, cache=cache)
    others = PatchEngine(tiny.llama(n_layers=2), batch_size=3, cache=cache).record(PROMPTS, SITES)
    expected, limits = engine.score(PROMPTS, groups()), engine.limits
    recorded, calls = engine.record(PROMPTS, SITES), [0]
    before = state(model)

    def compare(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise out_of_device_memory()
        return compare_rows(*args)

    monkeypatch.setattr("mechdiff_mlflow.engine.patch_engine.compare_rows", compare)
    with pytest.warns(UserWarning, match=f"ran out; what was kept of {2 * N} recorded prompts is given up"):
        found = engine.score(recorded, groups())
    assert_bits(found, expected)
    assert_same(before, state(model))
    assert engine.limits == limits, "chunks stay as they are"
    assert recorded.n_kept == others.n_kept == 0
    n_forwards = engine.n_forwards
    assert_bits(engine.score(recorded, groups()), expected)
    assert recorded.n_kept == 0, "what once was too much is not kept again"
    assert engine.n_forwards >= n_forwards + N


@pytest.mark.parametrize("from_end", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_kept_chunks_stay_whole_once_chunks_are_smaller(mode: str, from_end: int) -> None:
    engine = PatchEngine(tiny.llama(n_layers=2, dtype=torch.float64), mode=mode, batch_size=7)
    prompts = tiny.prompts(9, 5, 12, 5, 7, 3, 9, from_end=from_end)
    expected, recorded = engine.score(prompts, groups(3)), engine.record(prompts, SITES)
    engine._runner.limits = ChunkLimits(2, 100, 100)
    before = engine.n_forwards
    assert_equal_scores(engine.score(recorded, groups(3)), expected)
    if mode != "naive":
        assert engine.n_forwards == before


@pytest.mark.parametrize("mode", MODES)
def test_a_failure_leaves_the_model_and_what_is_kept_as_they_were(mode: str) -> None:
    model, bomb = tiny.llama(n_layers=2), Bomb()
    model.model.layers[1].self_attn.register_forward_hook(bomb)
    engine = PatchEngine(model, mode=mode, batch_size=3, max_rows=16, head_rows=8)
    expected = engine.score(PROMPTS, groups())
    recorded = engine.record(PROMPTS, SITES)
    before = state(model)
    for n in (1, 2, 5):
        bomb.left = n
        with pytest.raises(KeyboardInterrupt):
            engine.score(recorded, groups())
        assert_same(before, state(model))
    bomb.left = -1
    assert recorded.n_kept == N
    assert_bits(engine.score(recorded, groups()), expected)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_goes_with_its_user_before_the_garbage_is_collected(mode: str) -> None:
    model = tiny.llama(n_layers=2)
    engine = PatchEngine(model, mode=mode, batch_size=3)
    gc.collect()
    gc.disable()
    before = tiny.alive(Recording)
    try:
        recorded = engine.record(PROMPTS, SITES)
        engine.score(recorded, groups())
        rows = recorded.activations
        assert len(tiny.alive(Recording) - before) == 3
        del recorded
        assert tiny.alive(Recording) <= before
        assert rows[SITES[0]].shape == (N, 32), "activations outlive it"
        recorded, alive = engine.record(PROMPTS, SITES), weakref.ref(engine)
        assert engine.owns(recorded)
        del engine
        assert alive() is None, "a recording holds neither its engine nor the model"
        assert recorded.n_kept == N
    finally:
        gc.enable()


def test_no_chunk_is_kept_whose_logits_drag_those_of_all_tokens_along() -> None:
    """Bloom's are a view of [n, tokens, vocabulary] where the model cannot give the last alone."""
    engine = PatchEngine(tiny.llama(n_layers=2), batch_size=3)
    accepts = engine.forward._accepts
    engine.forward._accepts = accepts - {"logits_to_keep"}
    recorded = engine.record(PROMPTS, SITES)
    for kept in recorded._kept.values():
        assert kept.logits.untyped_storage().nbytes() == kept.logits.nbytes


def test_an_adapter_is_switched_under_what_is_kept() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny.llama(n_layers=2), config).eval()
    tuned = PatchEngine(model, batch_size=3)
    with model.disable_adapter():
        base = PatchEngine(model, batch_size=3)
        of_base = base.record(PROMPTS, SITES)
    of_tuned = tuned.record(PROMPTS, SITES)
    for _ in range(2):
        with model.disable_adapter():
            assert_bits(base.score(of_base, groups()), base.score(PROMPTS, groups()))
        assert_bits(tuned.score(of_tuned, groups()), tuned.score(PROMPTS, groups()))
    assert not torch.equal(of_base.activations[SITES[-1]], of_tuned.activations[SITES[-1]])
    with pytest.raises(MechdiffError, match="recorded by another engine; record them with this one"):
        tuned.score(of_base, groups())


def test_bad_requests_are_refused() -> None:
    engine = PatchEngine(tiny.llama(n_layers=2))
    recorded = engine.record(PROMPTS, SITES[:2])
    with pytest.raises(MechdiffError, match="L1/resid_post was not recorded; name it among the sites"):
        engine.score(recorded, [VariantGroup.identity(SITES[-1])])
    with pytest.raises(MechdiffError, match="Layer 9 does not exist"):
        engine.score(recorded, [VariantGroup.identity(Site(9, Hook.MLP_OUT))])
    with pytest.raises(MechdiffError, match="There are no prompts"):
        engine.record(TokenizedPrompts((), ()), SITES)


def test_what_is_not_finite_is_not_taken_over() -> None:
    model = tiny.llama(n_layers=2)
    engine = PatchEngine(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[PROMPTS.ids[1][-1], 3] = torch.inf
    recorded = engine.record(PROMPTS, SITES, now=False)
    for use in (lambda: engine.complete(recorded), lambda: engine.score(recorded, groups())):
        with pytest.raises(MechdiffError, match="is NaN or infinite"):
            use()
        assert not recorded.is_complete
        assert recorded.n_kept == 0


def test_free_memory_is_the_machine_s_or_the_container_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert 0 < free.free_bytes(cpu) < 2**50
    assert free.free_bytes(torch.device("meta")) == 0
    monkeypatch.setattr(free, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemAvailable:    1000 kB\n")
    assert free.free_bytes(cpu) == 1_024_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\nactive_file 50\nactive_anon 7\n")
    assert free.free_bytes(cpu) == 1_024_000
    (tmp_path / "memory.max").write_text("1000\n")
    assert free.free_bytes(cpu) == 1000 - 900 + 350
