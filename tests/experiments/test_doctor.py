from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import toy as toys
from transformers import AutoModelForCausalLM, Lfm2Config

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.fitting import wrong_layer_site
from mechdiff_mlflow.experiments.preflight import Check, check_cells, examine
from mechdiff_mlflow.models.pairs import Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Position, Rank
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts


def load(spec: Path) -> Pair:
    return load_pair(PairSpec.load(str(spec)))


def failed(pair: Pair) -> dict[str, str]:
    checks: list[Check] = list(examine(pair))
    assert len(checks) == 7, "a failing check does not end the others"
    return {check.name: check.seen for check in checks if not check.passed}


def test_a_sound_pair_passes_every_check(toy: Path) -> None:
    seen = {check.name: check for check in examine(load(toy))}
    assert all(check.passed for check in seen.values()), seen
    assert seen["untouched layers agree"].seen == "first changed layer 2; all 8 sites below are bit-identical"


def test_a_hybrid_is_sound_and_says_where_it_has_attention(tmp_path: Path) -> None:
    """Half of its blocks are convolutions, which are no site; the remedy is a layer that has attention."""
    config = Lfm2Config(
        vocab_size=len(toys.tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"] * 2,
    )
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config).eval()
    toys.write_model(tmp_path / "base", net)
    with torch.no_grad():
        for block in net.model.layers[2:]:
            block.feed_forward.w2.weight.add_(0.3 * torch.randn_like(block.feed_forward.w2.weight))
    toys.write_model(tmp_path / "tuned", net)
    toys.write_prompts(tmp_path)
    (tmp_path / "toy.yaml").write_text(toys.SPEC)
    pair = load(tmp_path / "toy.yaml")
    assert not failed(pair)
    with pair.tuned.engine() as engine:
        with pytest.raises(MechdiffError, match="take one of layers 1, 3, or hook resid_pre or resid_post"):
            engine.forward.decoder.check(Site(2, Hook.ATTN_OUT))
        engine.forward.decoder.check(Site(1, Hook.ATTN_OUT))
    # The wrong-layer control is where there is such a site too.
    asked = [Site(1, Hook.ATTN_OUT), Site(3, Hook.ATTN_OUT)]
    assert [wrong_layer_site(site, pair).layer for site in asked] == [3, 1]
    cells = [Cell(site, "ridge", "update", Rank(None), Alpha((1.0,))) for site in asked]
    check_cells(cells, Protocol(), pair)
    study = Study(pair, Protocol(n_resamples=20))
    records = study.patch([(fit.cell, fit.map) for fit in study.fit(cells)])
    assert all("wrong_layer" in record.controls for record in records)


def test_two_copies_of_one_model_are_noticed(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy.parent, tmp_path / "pair")
    shutil.copy(tmp_path / "pair/base/model.safetensors", tmp_path / "pair/tuned/model.safetensors")
    assert "are they two models" in failed(load(tmp_path / "pair/toy.yaml"))["oracle map"]


def test_a_model_that_ignores_its_mask_is_noticed(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load(toy)
    forward = pair.tuned.model.forward
    with pair.tuned.engine():
        pass  # the engine's own start-up check comes first, and would notice already
    monkeypatch.setattr(
        pair.tuned.model,
        "forward",
        lambda *args, **kwargs: forward(
            *args, **{**kwargs, "attention_mask": torch.ones_like(kwargs["input_ids"])}
        ),
    )
    assert "--batch-size 1" in failed(pair)["plumbing"]


def test_layers_that_should_agree_and_do_not_are_noticed(toy: Path) -> None:
    pair = load(toy)
    weight = pair.tuned.model.model.layers[1].mlp.down_proj

    def noisy(module: torch.nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        return out + 1e-3

    handle = weight.register_forward_hook(noisy)
    try:
        seen = failed(pair)
    finally:
        handle.remove()
    assert (
        "Weights agree below layer 2 and activations at L1/mlp_out do not" in seen["untouched layers agree"]
    )


def test_different_token_ids_are_noticed_where_tokenizers_agree(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = load(toy)
    tokens = pair.tokens

    def one_off(self: Pair, role: str, prompts: PromptSet, position: Position) -> TokenizedPrompts:
        found = tokens(role, prompts, position)
        ids = ((*found.ids[0][:-1], 2), *found.ids[1:]) if role == "tuned" else found.ids
        return TokenizedPrompts(ids, found.positions)

    monkeypatch.setattr(Pair, "tokens", one_off)
    assert "same token ids" in failed(pair)


def test_widths_that_differ_are_said_and_not_failed(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy.parent, tmp_path / "pair")
    shutil.rmtree(tmp_path / "pair/tuned")
    toys.write_model(tmp_path / "pair/tuned", toys.model(1, width=24))
    assert failed(load(tmp_path / "pair/toy.yaml")) == {}


def test_a_module_that_is_called_twice_is_noticed(toy: Path) -> None:
    pair = load(toy)
    with pair.base.engine():
        pass
    pair.base.model.model.layers[1].register_forward_hook(lambda m, args, out: (m.mlp(out), out)[1])  # type: ignore[union-attr]
    assert "hooks fire once fails in base" in failed(pair)["plumbing"]
