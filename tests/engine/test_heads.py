"""Heads before the output projection, against a plain hook on the projection's input."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from mechdiff_mlflow.engine import PatchEngine, VariantGroup
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Site

LAYER = 2
SITE = Site.parse("L2/attn_out")


@pytest.fixture(scope="module")
def engine() -> PatchEngine:
    return PatchEngine(tiny.llama(), batch_size=2)


def test_projected_heads_are_attn_out(engine: PatchEngine) -> None:
    prompts = tiny.prompts(5, 9, 7)
    heads = engine.heads(LAYER)
    z = heads.capture(prompts)
    assert z.shape == (3, 4, 8), "query heads: four share two keys"
    torch.testing.assert_close(heads.project(z), engine.capture(prompts, [SITE])[SITE])


def test_a_replaced_head_is_a_hook_on_the_projections_input(engine: PatchEngine) -> None:
    prompts = tiny.prompts(5, 9)
    heads = engine.heads(LAYER)
    z = heads.capture(prompts)
    changed = z.clone()
    changed[:, 1] = 3.0
    group = VariantGroup(SITE, heads.project(changed).unsqueeze(1))
    (scored,) = engine.score(prompts, [group]).divergences

    model = engine.forward.decoder.model
    projection = model.model.layers[LAYER].self_attn.o_proj  # type: ignore[union-attr, index]

    def replace(module: object, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        hidden = args[0].clone()
        hidden[:, -1, 8:16] = 3.0
        return (hidden,)

    model.requires_grad_(False)
    for i, ids in enumerate(prompts.ids):
        tokens = torch.tensor([ids])
        clean = model(tokens).logits[0, -1].log_softmax(-1)
        handle = projection.register_forward_pre_hook(replace)  # type: ignore[union-attr]
        patched = model(tokens).logits[0, -1].log_softmax(-1)
        handle.remove()
        kl = (patched.exp() * (patched - clean)).sum()
        assert float(kl) > 1e-3
        assert float(scored.kl_patched_clean[i, 0]) == pytest.approx(float(kl), rel=1e-4)


def test_nothing_stays_on_the_model(engine: PatchEngine) -> None:
    engine.heads(LAYER).capture(tiny.prompts(4))
    model = engine.forward.decoder.model
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_heads_that_cannot_be_told_apart() -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    engine = PatchEngine(tiny.build(config, attention="eager"), mode="naive")
    with pytest.raises(MechdiffError, match="does not add its output projection to the residual stream"):
        engine.heads(1)
    with pytest.raises(MechdiffError, match="Layer 7 does not exist"):
        engine.heads(7)
