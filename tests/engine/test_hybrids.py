"""Models whose blocks are more than attention and MLP: sites equal plain hooks, or are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch.nn.functional import log_softmax

from mechdiff_mlflow.engine import ModuleNames, PatchEngine, VariantGroup, check_plumbing
from mechdiff_mlflow.engine.model.sums import sites_of
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Hook, Site

COMMON: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SSM = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GRANITE = {**SSM, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 24}
ALL = frozenset(Hook)
STREAM = frozenset({Hook.RESID_PRE, Hook.RESID_POST})

SOUND: dict[str, tuple[str, dict[str, Any], frozenset[Hook]]] = {
    "Granite 4, shared experts": ("GraniteMoeHybridConfig", {**GRANITE, **EXPERTS}, STREAM),
    "Granite 4, dense": (
        "GraniteMoeHybridConfig",
        {**GRANITE, "num_local_experts": 0, "num_experts_per_tok": 0, "residual_multiplier": 0.5},
        ALL,
    ),
    "Granite, shared experts": (
        "GraniteMoeSharedConfig",
        {**EXPERTS, "shared_intermediate_size": 24},
        STREAM,
    ),
    "Falcon-H1": ("FalconH1Config", {**SSM, "mamba_d_ssm": 64}, STREAM),
    "MiniMax": (
        "MiniMaxConfig",
        {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
        STREAM,
    ),
    "Nemotron-H": (
        "NemotronHConfig",
        {
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 16,
        },
        STREAM,
    ),
    "Zamba 2": (
        "Zamba2Config",
        {
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "num_mem_blocks": 1,
            "attention_head_dim": 16,
            "chunk_size": 16,
            "adapter_rank": 4,
        },
        STREAM,
    ),
    "Mamba": ("MambaConfig", {"state_size": 4, "time_step_rank": 4}, STREAM),
    "Mamba 2": (
        "Mamba2Config",
        {"num_heads": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
        STREAM,
    ),
    "Falcon Mamba": ("FalconMambaConfig", {"state_size": 4, "time_step_rank": 4}, STREAM),
    "MPT": ("MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, ALL),
    "BERT": ("BertConfig", {"is_decoder": True}, STREAM),
}


def build(name: str, config: str, arguments: dict[str, Any]) -> Any:
    if not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {name}")
    return tiny.build(getattr(transformers, config)(**{**COMMON, **arguments}), attention="eager")


def engine_of(model: Any, **options: Any) -> PatchEngine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PatchEngine(model, **options)


@pytest.mark.parametrize("name", SOUND)
def test_sites_are_sound_and_equal_plain_hooks(name: str) -> None:
    config, arguments, hooks = SOUND[name]
    model = build(name, config, arguments)
    engine, prompts = engine_of(model), tiny.prompts(5, 9)
    decoder, sites = engine.forward.decoder, sites_of(engine.forward.decoder)
    assert {site.hook for site in sites} == hooks
    assert [check for check in check_plumbing(engine, prompts) if not check.passed] == []
    with torch.no_grad():
        clean = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts.ids])
    clean = log_softmax(clean.double(), -1)
    for site in sites:
        group = VariantGroup(site, torch.randn(len(prompts), 1, engine.width))
        plain = tiny.patched_by_definition(model, prompts, decoder.module(site), group)[:, 0]
        patched = log_softmax(plain.double(), -1)
        kl = (patched.exp() * (patched - clean)).sum(-1)
        found = engine.score(prompts, [group]).divergences[0].kl_patched_clean[:, 0]
        torch.testing.assert_close(found.double(), kl, atol=1e-5, rtol=1e-4)
    if hooks == STREAM:  # the remedy works, and says what the sublayer is for which there is none
        with pytest.raises(MechdiffError, match=r"L1/attn_out .*; take hook resid_pre or resid_post, or"):
            engine.capture(prompts, [Site(1, Hook.ATTN_OUT)])
        site = Site(1, Hook.RESID_POST)
        assert engine.capture(prompts, [site])[site].isfinite().all()


def test_blocks_with_one_sublayer_add_it_where_it_is_named() -> None:
    config, arguments, _ = SOUND["Nemotron-H"]
    engine = engine_of(build("Nemotron-H", config, arguments), overrides=ModuleNames(attention="mixer"))
    assert {site.hook for site in sites_of(engine.forward.decoder)} == ALL - {Hook.MLP_OUT}
    assert all(check.passed for check in check_plumbing(engine, tiny.prompts(5, 9)))


PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "RWKV": ("RwkvConfig", {"attention_hidden_size": 32, "context_length": 128}),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        {"lru_width": 32, "block_types": ("recurrent", "attention"), "num_key_value_heads": 1},
    ),
}


@pytest.mark.parametrize("name", PADDED)
def test_models_without_a_mask_are_read_prompt_by_prompt(name: str) -> None:
    model, prompts = build(name, *PADDED[name]), tiny.prompts(5, 9)
    failed = [check.name for check in check_plumbing(engine_of(model), prompts) if not check.passed]
    assert failed == ["capture depends on neither padding nor batch size"]
    assert all(check.passed for check in check_plumbing(engine_of(model, batch_size=1), prompts))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPT": (
        "OpenAIGPTConfig",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        r"OpenAIGPTLMHeadModel cannot be run on short prompts with hooks on its blocks \(AttributeError",
    ),
    "Gemma 3n": (
        "Gemma3nTextConfig",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": tiny.VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
        r"L0/resid_pre has the shape \[2, 1, 7, 32\], .* take a model of another family",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_patched_is_refused_in_a_sentence(name: str) -> None:
    config, arguments, message = REFUSED[name]
    model = build(name, config, arguments)
    with pytest.raises(MechdiffError, match=message):
        engine_of(model)


def test_positions_that_the_model_counts_otherwise_are_told() -> None:
    engine = engine_of(build("RoBERTa", "RobertaConfig", {"is_decoder": True}))
    failed = [check.name for check in check_plumbing(engine, tiny.prompts(5, 9)) if not check.passed]
    assert failed == ["prompts are read as the model reads them"]
