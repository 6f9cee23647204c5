"""One model held at a time: the same numbers, and never two models in memory."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import toy as toys
from cli.conftest import Invoke, client, empty_store, here, mechdiff  # noqa: F401
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.atlas import atlas
from mechdiff_mlflow.experiments.preflight import examine, require_sound
from mechdiff_mlflow.experiments.profiles import heads_of, layer_profile
from mechdiff_mlflow.experiments.workers import LocalWorkers
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Position, Rank
from mechdiff_mlflow.spec.sites import Hook, Site

CELL = Cell(Site(3, Hook.RESID_POST), "procrustes_scaled", "update", Rank(None), Alpha.parse("auto"))


def load(spec: Path, sequential: str, **options: Any) -> Pair:
    return load_pair(PairSpec.load(str(spec)), options=EngineOptions(sequential=sequential, **options))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The checkpoints that are loaded, each only when no model that was loaded before is alive."""
    own, alive, names = AutoModelForCausalLM.from_pretrained, list[weakref.ref[Any]](), list[str]()

    def from_pretrained(place: str, **options: Any) -> Any:
        assert all(ref() is None for ref in alive), "two models in memory"
        model, report = own(place, **options)
        # The weights too: somebody could keep a matrix.
        alive.extend([weakref.ref(model), *map(weakref.ref, model.parameters())])
        names.append(Path(place).name)
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    yield names
    gc.collect()


def test_a_run_gives_the_same_numbers_with_one_model_in_memory(toy: Path, loads: list[str]) -> None:
    pair = load(toy, "yes")
    assert loads == []
    require_sound(pair)
    study = Study(pair, Protocol(permutations=2))
    (record,) = study.patch([fit.to_patch for fit in study.fit([CELL])])
    assert loads == ["tuned", "base", "tuned", "base", "tuned"]
    loads.clear()
    del study, pair
    gc.collect()
    with pytest.raises(MechdiffError, match="two models in memory"):
        load(toy, "no")  # so the fixture would notice
    assert record.drop_pct is not None


def test_clean_runs_go_with_their_model(toy: Path, loads: list[str]) -> None:
    pair, site = load(toy, "yes"), CELL.site
    prompts = pair.prompts_of("test")
    for _ in range(2):
        LocalWorkers(pair).score(prompts, Position.DECISION, {site: {}})
    with pair.tuned.engine() as engine:
        recorded = pair.recordings.recorded(
            *(engine, ("tuned", prompts.digest, Position.DECISION)),
            *(pair.tokens("tuned", prompts, Position.DECISION), [site]),
        )
        assert engine.owns(recorded)
        assert engine.n_forwards == recorded.n_kept == len(prompts)
        del engine
    before = pair.recordings.captured(("tuned", prompts.digest, Position.DECISION), [site])
    assert before is not None
    with pair.base.engine():
        assert recorded.n_kept == 0
    found = LocalWorkers(pair).score(prompts, Position.DECISION, {site: {}})
    assert torch.equal(found[site].tuned_rows[site], before[site])
    assert loads == ["base", "tuned", "base", "tuned"]


def test_numbers_are_those_of_both_models_in_memory(toy: Path) -> None:
    for protocol in (Protocol(), Protocol(split="val", n=9)):
        records = []
        for sequential in ("no", "yes"):
            pair = load(toy, sequential)
            study = Study(pair, protocol)
            records += study.patch([fit.to_patch for fit in study.fit([CELL])])
            assert pair.one_at_a_time == (sequential == "yes")
        for column in ("KL_raw", "KL_mapped", "KL_identity", "cos"):
            np.testing.assert_array_equal(*(record.per_prompt[column] for record in records))
        assert records[0].drop_pct == records[1].drop_pct
        assert records[0].map.meta == records[1].map.meta, "the fingerprint among them"


def everything_else(pair: Pair) -> list[pd.DataFrame]:
    study = Study(pair, Protocol())
    joint = Study(pair, Protocol(unembedding="joint", directions=4))
    joint.fit([Cell(CELL.site, "logit_subspace", "update", Rank(2), Alpha((1.0,)))])
    return [
        layer_profile(study),
        heads_of(study, 3, n_random=2),
        atlas(study, hooks=[Hook.ATTN_OUT], solver="ridge", family="update", alpha=1.0, best=1).table,
    ]


def test_nothing_needs_both_models(toy: Path, loads: list[str]) -> None:
    pair = load(toy, "yes", memory_budget=2**21)
    seen = {check.name: check for check in examine(pair)}
    assert all(check.passed for check in seen.values()), seen
    assert seen["untouched layers agree"].seen.startswith("first changed layer 2; all 8 sites")
    everything_else(pair)
    assert set(loads) == {"base", "tuned"}


def test_everything_else_gives_the_same_tables(toy: Path) -> None:
    for a, b in zip(everything_else(load(toy, "no")), everything_else(load(toy, "yes")), strict=True):
        pd.testing.assert_frame_equal(a, b)


def test_what_is_planted_is_planted_in_a_base_of_its_own(loads: list[str]) -> None:
    """And base is not changed by it."""
    spec = PairSpec.load("planted:attn_out:L14:r2:alpha0.7")
    pair, weights = load_pair(spec, options=EngineOptions(sequential="yes")), {}
    for side in (pair.tuned, pair.base):
        block = side.model.model.layers[14].self_attn.o_proj  # type: ignore[union-attr]
        weights[side.role] = block.weight.double().norm().item()
        del block
    assert weights["tuned"] != pytest.approx(weights["base"])
    assert len(loads) == 2


def test_an_adapter_shares_its_base_and_is_never_loaded_alone(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy.parent, tmp_path / "pair")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "pair/base"),
        LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "pair/lora")
    spec = tmp_path / "pair/toy.yaml"
    spec.write_text(toys.SPEC.replace("tuned: {model: tuned}", "tuned: {adapter: lora}"))
    pair = load(spec, "yes")
    assert not pair.one_at_a_time
    assert pair.base.model is pair.tuned.model


def test_auto_holds_one_where_two_do_not_fit(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(p.numel() * 4 for p in toys.model(0).parameters())
    assert not load(toy, "auto").one_at_a_time
    for free, budget, one in (
        (3 * weights, None, False),
        (2 * weights, None, True),
        (3 * weights, weights, True),
    ):
        monkeypatch.setattr("mechdiff_mlflow.models.pairs._memory_of", lambda device, free=free: free)
        assert load(toy, "auto", memory_budget=budget).one_at_a_time == one
    assert not load(toy, "no").one_at_a_time


def test_on_the_command_line(toy: Path, mechdiff: Invoke) -> None:  # noqa: F811
    words = ("run", "--pair", str(toy), "--layer", "3", "--hook", "resid_post")
    at_once = mechdiff(*words).output
    in_turn = mechdiff(*words, "--sequential", "--memory-budget", "4MiB").output
    row = next(line for line in at_once.splitlines() if "L3/resid_post" in line)
    assert row in in_turn
