"""Tiny random models of every family the engine promises to know, the modules of their sites spelt out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tiny
import torch
import transformers
from torch import nn

from mechdiff_mlflow.spec.sites import Hook, Site

N_LAYERS = 4
_HALF = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        name: As its authors write it.
        config: Class name of the configuration in transformers.
        arguments: What the tiny configuration is built with.
        attn_out: Path in a block of the module that gives what attention adds to the residual stream.
        mlp_out: The same for the MLP.
        layers: Path of the blocks in the model.
        mode: How the engine is expected to compute patched runs.
        layer_norm: Whether it is exact in float64 (RMS norms are computed in float32).
        attentions: Implementations that it has.
        scaled: Whether a sublayer's output is scaled before it is added.
        note: For the table in the docs.
    """

    name: str
    config: str
    arguments: dict[str, Any]
    attn_out: str = "self_attn"
    mlp_out: str = "mlp"
    layers: str = "model.layers"
    mode: str = "sweep"
    layer_norm: bool = False
    attentions: tuple[str, ...] = ("sdpa", "eager")
    scaled: bool = False
    note: str = ""

    def build(self, attention: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        config = getattr(transformers, self.config)(**{**_COMMON, **self.arguments})
        return tiny.build(config, attention=attention, dtype=dtype)

    def module(self, model: nn.Module, site: Site) -> nn.Module:
        block = model.get_submodule(f"{self.layers}.{site.layer}")
        name = {Hook.ATTN_OUT: self.attn_out, Hook.MLP_OUT: self.mlp_out}.get(site.hook)
        return block if name is None else block.get_submodule(name)


_COMMON: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES = (
    Family("Llama", "LlamaConfig", {}),
    Family("Mistral", "MistralConfig", {"sliding_window": 4}, note="sliding window"),
    Family(
        "Mixtral",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        mlp_out="mlp" if int(transformers.__version__.split(".")[0]) >= 5 else "block_sparse_moe",
        note="mixture of experts",
    ),
    Family(
        "Qwen2",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": _HALF},
        note="window on some layers",
    ),
    Family("Qwen3", "Qwen3Config", {"head_dim": 16}, note="norms on queries and keys"),
    Family("Qwen3-MoE", "Qwen3MoeConfig", {**_MOE, "head_dim": 16}, note="mixture of experts"),
    Family(
        "Gemma 2",
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": _HALF,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 16,
        },
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        attentions=("eager",),
        note="window, norms after sublayers, capped scores and logits",
    ),
    Family(
        "Gemma 3",
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 4, "layer_types": _HALF, "query_pre_attn_scalar": 16},
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        note="window, norms after sublayers, two rotations",
    ),
    Family(
        "GPT-2",
        "GPT2Config",
        {"n_embd": 32, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128},
        attn_out="attn",
        layers="transformer.h",
        layer_norm=True,
        note="learned positions",
    ),
    Family(
        "GPT-NeoX",
        "GPTNeoXConfig",
        {"rotary_pct": 0.5},
        attn_out="attention",
        layers="gpt_neox.layers",
        layer_norm=True,
        note="parallel sublayers",
    ),
    Family(
        "OLMo 2",
        "Olmo2Config",
        {},
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        note="norms after sublayers",
    ),
    Family("Phi", "PhiConfig", {"partial_rotary_factor": 0.5}, layer_norm=True, note="parallel sublayers"),
    Family("Phi-3", "Phi3Config", {"sliding_window": 4}, note="sliding window, fused projections"),
    Family(
        "Granite",
        "GraniteConfig",
        {
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
        },
        scaled=True,
        note="sublayer outputs are scaled when added",
    ),
    Family(
        "Cohere 2",
        "Cohere2Config",
        {"sliding_window": 4, "layer_types": _HALF, "logit_scale": 0.5},
        note="window, parallel sublayers, scaled logits",
    ),
    Family(
        "OPT",
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        mlp_out="fc2",
        layers="model.decoder.layers",
        layer_norm=True,
        note="learned positions, no MLP module",
    ),
    Family(
        "GPT-OSS",
        "GptOssConfig",
        {
            "head_dim": 16,
            "sliding_window": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": _HALF,
        },
        attentions=("eager",),
        note="window, attention sinks, mixture of experts",
    ),
    Family(
        "DeepSeek-V3",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
        note="latent attention, mixture of experts",
    ),
    Family(
        "Falcon",
        "FalconConfig",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
        attn_out="self_attention",
        layers="transformer.h",
        mode="masked",
        layer_norm=True,
        note="parallel sublayers",
    ),
    Family(
        "Bloom",
        "BloomConfig",
        {"n_layer": N_LAYERS, "n_head": 4},
        attn_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        layers="transformer.h",
        mode="naive",
        layer_norm=True,
        attentions=("eager",),
        note="positions as a bias on scores",
    ),
)

CASES: list[tuple[Family, str]] = [(family, kind) for family in FAMILIES for kind in family.attentions]
