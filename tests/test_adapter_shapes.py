"""Shapes of PEFT adapters: plain peft's numbers beside the base's own, or a refusal by kind."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import toy as toys
from safetensors.torch import load_file, save_file
from test_checkpoint_shapes import Weights, check_side, load, prefixed, without
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position
from mechdiff_mlflow.spec.sites import Hook, Site

TEXT = toys.SPEC.replace("{model: tuned}", "{adapter: lora}")
LINEAR: dict[str, Any] = {"target_modules": ["q_proj", "o_proj"]}
LORA: dict[str, Any] = {**LINEAR, "r": 2, "init_lora_weights": False}


@pytest.fixture(scope="module")
def base_folder(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy pair, with a base whose linear layers have biases."""
    folder = tmp_path_factory.mktemp("biased") / "pair"
    shutil.copytree(toy.parent, folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(folder / "base", attention_bias=True, num_hidden_layers=2)
    toys.write_model(folder / "base", LlamaForCausalLM(config).eval())
    (folder / "toy.yaml").write_text(TEXT)
    return folder


@pytest.fixture
def spec(base_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(base_folder, tmp_path / "pair")
    return tmp_path / "pair" / "toy.yaml"


def base_of(spec: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(spec.parent / "base")


def write(spec: Path, config: Any, **options: Any) -> Path:
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base_of(spec), config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data.add_(0.3 * torch.randn_like(weight))
    adapted.save_pretrained(spec.parent / "lora", **options)
    return spec.parent / "lora"


FITTING: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(**LORA),
    "DoRA": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "rank-stabilised": lambda: peft.LoraConfig(**LORA, use_rslora=True, rank_pattern={"o_proj": 3}),
    "by regular expression": lambda: peft.LoraConfig(**{**LORA, "target_modules": r".*\.(q|o)_proj"}),
    "everything linear": lambda: peft.LoraConfig(**{**LORA, "target_modules": "all-linear"}),
    "head and embeddings saved": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"]),
    "on the embeddings": lambda: peft.LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}),
    "rows of embeddings": lambda: peft.LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [9, 25]}),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "VeRA": lambda: peft.VeraConfig(**LINEAR, r=256),
    "LoHa": lambda: peft.LoHaConfig(**LINEAR, r=2),
    "LoKr": lambda: peft.LoKrConfig(**LINEAR, r=2),
    "OFT": lambda: peft.OFTConfig(**LINEAR, r=0, oft_block_size=4),
    "AdaLoRA": lambda: peft.AdaLoraConfig(**LINEAR, init_r=3, target_r=2, total_step=10),
    "VB-LoRA": lambda: peft.VBLoRAConfig(**LINEAR, r=2, num_vectors=8, vector_length=4),
    "FourierFT": lambda: peft.FourierFTConfig(**LINEAR, n_frequency=10, scaling=1.0),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "tokens alone": lambda: peft.TrainableTokensConfig(
        token_indices=[9, 25], target_modules=["embed_tokens"]
    ),
    "BOFT": lambda: peft.BOFTConfig(**LINEAR, boft_block_size=4),
    "SHiRA": lambda: peft.ShiraConfig(**LINEAR, r=2),
}


@pytest.mark.parametrize("kind", FITTING)
def test_a_pair_of_an_adapter_is_plain_peft_beside_the_base_alone(spec: Path, kind: str) -> None:
    folder = write(spec, FITTING[kind]())
    pair = load(spec)
    tuned = peft.PeftModel.from_pretrained(base_of(spec), folder).eval()
    for _ in range(2):  # switched back and forth
        check_side(pair, "base", base_of(spec))
        check_side(pair, "tuned", tuned.get_base_model())
    tokens = pair.tokens("tuned", pair.prompts_of("val"), Position.DECISION)
    site = Site(1, Hook.RESID_POST)
    with pair.base.engine() as engine:
        base = engine.capture(tokens, [site])[site]
    with pair.tuned.engine() as engine:
        assert not torch.equal(engine.capture(tokens, [site])[site], base)


CHANGED = {
    "all biases": (lambda: peft.LoraConfig(**LORA, bias="all"), r"LORA with bias: all changes its base"),
    "biases of its layers": (lambda: peft.LoraConfig(**LORA, bias="lora_only"), r"LORA with bias: lora_only"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_an_adapter_that_changes_its_base_is_merged_as_the_error_says(spec: Path, kind: str) -> None:
    config, message = CHANGED[kind]
    folder = write(spec, config())
    with pytest.raises(
        MechdiffError, match=rf"{message}.*; merge it into its base \(merge_and_unload, then sa"
    ):
        load(spec)
    with pytest.raises(MechdiffError, match=message):
        load_pair(PairSpec.load(str(spec)), lazily=True).base.model  # noqa: B018
    merged = peft.PeftModel.from_pretrained(base_of(spec), folder).merge_and_unload()
    merged.save_pretrained(spec.parent / "merged")
    toys.tokenizer().save_pretrained(spec.parent / "merged")
    spec.write_text(toys.SPEC.replace("{model: tuned}", "{model: merged}"))
    pair = load(spec)
    check_side(pair, "base", base_of(spec))
    check_side(pair, "tuned", merged.eval())


def test_embeddings_saved_beside_an_adapter_must_be_those_of_the_base(spec: Path) -> None:
    folder = write(spec, peft.LoraConfig(**LORA), save_embedding_layers=True)
    check_side(load(spec), "base", base_of(spec))
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.embed_tokens.weight"
    weights[name][27] += 1  # of a token that no prompt and no check has
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(MechdiffError, match=r"kind LORA changes its base \(model\.embed_tokens\.weight\)"):
        load(spec)
    save_file({**weights, name: torch.zeros(50, 16)}, file, metadata={"format": "pt"})
    with pytest.raises(MechdiffError, match=r"cannot be loaded .*size mismatch.*; check its files there"):
        load(spec)


OUTSIDE: dict[str, Any] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P_TUNING": lambda: peft.PromptEncoderConfig(
        num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8
    ),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(
        adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"
    ),
    "LORA with layer_replication": lambda: peft.LoraConfig(**LORA, layer_replication=[[0, 2], [1, 2]]),
    "LORA with alora_invocation_tokens": lambda: peft.LoraConfig(
        **LORA, alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_acts_outside_the_layers_is_refused_by_kind_before_weights(
    spec: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(spec, OUTSIDE[kind]())
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded weights")
    )
    with pytest.raises(MechdiffError, match=f"is of kind {kind}, which does more than change the layers"):
        load(spec)


def test_of_several_adapters_in_a_folder_one_is_named(spec: Path) -> None:
    torch.manual_seed(1)
    adapted = peft.get_peft_model(base_of(spec), peft.LoraConfig(**LORA), adapter_name="one")
    adapted.save_pretrained(spec.parent / "lora")
    with pytest.raises(MechdiffError, match=r"name one, e\.g\. \S+lora:one\.") as raised:
        load(spec)
    named = str(raised.value).split("e.g. ")[1].removesuffix(".").replace(":", "/")
    spec.write_text(TEXT.replace("adapter: lora", f"adapter: {named}"))
    check_side(load(spec), "tuned", peft.PeftModel.from_pretrained(base_of(spec), named).get_base_model())


def of_layer(n: int) -> str:
    return f"layers.{n}.self_attn.q_proj.lora_A"


def rewrite(folder: Path, change: Callable[[Weights], Weights]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k: v.clone() for k, v in change(load_file(file)).items()}, file, metadata={"format": "pt"})


WEIGHTS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "no prefix": (
        lambda w: {k.removeprefix("base_model.model."): v for k, v in w.items()},
        r"lacks 8 of its weights .*, is given 8 that it has no place for \(model\.layers\.0",
    ),
    "prefix twice": (prefixed("base_model.model."), r"lacks 8 of its weights"),
    "compiled": (
        lambda w: {k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in w.items()},
        r"lacks 8 of its weights .*, is given 8 .*_orig_mod",
    ),
    "wrapped": (prefixed("module."), r"lacks 8 of its weights"),
    "a layer is missing": (
        without("layers.1."),
        r"lacks 4 of its weights \(base_model\.model\.model\.layers\.1",
    ),
    "one is missing": (
        without(of_layer(1)),
        r"lacks 1 of its weights \(base_model.*layers\.1\.self_attn\.q_proj",
    ),
    "one too many": (
        lambda w: w | {f"base_model.model.model.{of_layer(7)}.weight": torch.ones(2, 16)},
        r"is given 1 that it has no place for \(base_model\.model\.model\.layers\.7",
    ),
    "another shape": (
        lambda w: {k: v[:, :8] if "lora_A" in k else v for k, v in w.items()},
        r"cannot be loaded .*size mismatch for base_model",
    ),
    "empty": (lambda w: {}, r"lacks 8 of its weights"),
    "no numbers": (lambda w: {k: v * torch.nan for k, v in w.items()}, r"kind LORA makes numbers NaN or inf"),
    "whole numbers": (
        lambda w: {k: (50 * v).to(torch.int8) for k, v in w.items()},
        r"holds 8 weights as whole numbers \(.* as I8\)",
    ),
}


@pytest.mark.parametrize("shape", WEIGHTS)
def test_adapter_weights_that_do_not_fit_are_named(spec: Path, shape: str) -> None:
    change, message = WEIGHTS[shape]
    rewrite(write(spec, peft.LoraConfig(**LORA)), change)
    with pytest.raises(MechdiffError, match=message) as raised:
        load(spec)
    assert "hub" not in str(raised.value)
    write(spec, peft.LoraConfig(**LORA))  # as the error says: saved again
    load(spec)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 999_999}, r"has rank 999999 \(r\), .* up to 1024, for a base of width 16"),
    "rank of a layer": ({"rank_pattern": {"q_proj": 10**6}}, r"has rank 1000000 \(q_proj\)"),
    "rank that is none": ({"r": "many"}, r"has rank many"),
    "scale": ({"lora_alpha": float("inf")}, r"has lora_alpha=inf, which is not finite"),
    "scale of a layer": ({"alpha_pattern": {"q_proj": float("nan")}}, r"has q_proj=nan, which is not finite"),
    "no expression": (
        {"target_modules": "((("},
        r"failed \(error: missing \), .*\); list the modules",
    ),
    "a slow expression": (
        {"target_modules": r"(([a-z_0-9.]+)+)+!"},
        r"took over 3 s of processor time, .*; list the mod",
    ),
    "a slow key": ({"rank_pattern": {"(([a-z_0-9.]+)+)+!": 2}}, r"took over 3 s of processor time"),
    "slow exclusion": ({"exclude_modules": r"((\w|\.)+)+!"}, r"took over 3 s of processor time"),
    "no modules": ({"target_modules": ["nothing"]}, r"cannot be loaded .*[Tt]arget modules"),
    "an unknown kind": ({"peft_type": "NONSENSE"}, r"cannot be loaded"),
}


@pytest.mark.parametrize("shape", CONFIGS)
def test_adapter_configurations_out_of_bounds(
    spec: Path, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechdiff_mlflow.models.bounded.SECONDS", 3)
    fields, message = CONFIGS[shape]
    file = write(spec, peft.LoraConfig(**LORA)) / "adapter_config.json"
    good = file.read_text()
    file.write_text(json.dumps(json.loads(good) | fields))
    began = time.monotonic()
    with pytest.raises(MechdiffError, match=message) as raised:
        load(spec)
    assert "hub" not in str(raised.value)
    assert time.monotonic() - began < 30
    file.write_text(json.dumps(json.loads(good) | {"target_modules": ["q_proj", "o_proj"], "r": 2}))
    load(spec)


def test_an_adapter_named_as_a_model_and_the_other_way_round(spec: Path) -> None:
    write(spec, peft.LoraConfig(**LORA))
    spec.write_text(toys.SPEC.replace("{model: tuned}", "{model: lora}"))
    with pytest.raises(
        MechdiffError, match=r"a PEFT adapter of another model; name it as tuned: \{adapter: …\}"
    ):
        load(spec)
    spec.write_text(toys.SPEC.replace("{model: tuned}", "{adapter: base}"))
    with pytest.raises(
        MechdiffError, match=r"has no adapter_config\.json; it is a whole model, so write tuned: "
    ):
        load(spec)
    spec.write_text(TEXT)
    load(spec)
