"""Shapes of checkpoints: each gives just the model that was saved, or is refused by name with a remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toy as toys
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_base, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position
from mechdiff_mlflow.spec.sites import Hook, Site

Weights = dict[str, Tensor]
SITE = Site(1, Hook.ATTN_OUT)
LAYERS = toys.N_LAYERS


@pytest.fixture
def spec(toy: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy.parent, tmp_path / "pair")
    return tmp_path / "pair" / "toy.yaml"


def load(spec: Path, **options: str) -> Pair:
    return load_pair(PairSpec.load(str(spec)), options=EngineOptions(**options))


def edit(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Write other weights into a checkpoint."""
    file = folder / "model.safetensors"
    weights = {name: weight.contiguous().clone() for name, weight in change(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"})


def configure(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def plain(model: torch.nn.Module, pair: Pair, role: str) -> tuple[Tensor, Tensor]:
    """Attention output and logits of the val prompts one by one, by a forward hook."""
    seen: list[Tensor] = []
    block = model.get_decoder().layers[SITE.layer]
    handle = block.self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0][0, -1]))
    with torch.no_grad():
        ids = pair.tokens(role, pair.prompts_of("val"), Position.DECISION).ids
        logits = torch.stack([model(input_ids=torch.tensor([one])).logits[0, -1] for one in ids])
    handle.remove()
    return torch.stack(seen), logits


def check_side(pair: Pair, role: str, expected: torch.nn.Module) -> None:
    side = pair.side(role)
    activations, logits = plain(expected, pair, role)
    tokens = pair.tokens(role, pair.prompts_of("val"), Position.DECISION)
    with side.engine() as engine:
        found = engine.capture(tokens, [SITE])[SITE]
    torch.testing.assert_close(found, activations, atol=5e-5, rtol=1e-5)
    with side.switch():
        assert torch.equal(plain(side.model, pair, role)[1], logits)


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def plus(**more: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name.replace("__", "."): weight for name, weight in more.items()}


FITTING = {
    "as it was": dict,
    "rotations saved": plus(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4)),
    "scales of a cache": plus(model__layers__0__self_attn__k_scale=torch.ones(1)),
}


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("shape", FITTING)
def test_what_fits_is_the_model_that_was_saved(spec: Path, shape: str, side: str) -> None:
    expected = AutoModelForCausalLM.from_pretrained(spec.parent / side)
    edit(spec.parent / side, FITTING[shape])
    pair = load(spec, sequential="yes" if shape == "rotations saved" else "no")
    check_side(pair, side, expected)
    if side == "base":
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(load_base(pair)(ids).logits, expected(ids).logits)


def test_a_tied_head_may_be_saved_or_not(spec: Path) -> None:
    folder = spec.parent / "tuned"
    net = LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder, tie_word_embeddings=True)).eval()
    net.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    for change in (dict, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"]}):
        edit(folder, change)
        check_side(load(spec), "tuned", net)


def shallower(folder: Path) -> None:
    configure(folder, num_hidden_layers=LAYERS - 1)


def deeper(folder: Path) -> None:
    configure(folder, num_hidden_layers=LAYERS + 1)


def both_names(weights: Weights) -> Weights:
    return weights | {f"module.{k}": v + 1 for k, v in weights.items()}


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no last layer": (
        lambda f: edit(f, without(f"layers.{LAYERS - 1}.")),
        rf"it lacks 9 of its weights \(model\.layers\.{LAYERS - 1}\..* and 4 more\); download it again",
    ),
    "no head": (lambda f: edit(f, without("lm_head")), r"lacks 1 of its weights \(lm_head\.weight\); down"),
    "no norm": (lambda f: edit(f, without("model.norm")), r"lacks 1 of its weights \(model\.norm\.weight\)"),
    "deeper than its config": (
        shallower,
        rf"is given 9 that it has no place for \(model\.layers\.{LAYERS - 1}",
    ),
    "shallower than its config": (deeper, r"it lacks 9 of its weights .* put the config\.json beside it"),
    "another width": (
        lambda f: configure(f, intermediate_size=8),
        r"is given 12 in another shape \(model\.la",
    ),
    "an unknown prefix": (
        lambda f: edit(f, prefixed("policy.")),
        r"lacks 39 of its weights .* is given 39 .* remove 'policy\.' from the names in its files",
    ),
    "a wrapper of torch.compile": (
        lambda f: edit(f, prefixed("_orig_mod.")),
        r"remove '_orig_mod\.' from the names in its files",
    ),
    "a wrapper and a missing layer": (
        lambda f: edit(f, lambda w: prefixed("module.")(without("layers.1.")(w))),
        r"lacks 39 of its weights",
    ),
    "two that would be one": (lambda f: edit(f, both_names), r"is given 39 that it has no place for"),
    "weights of a multimodal model": (
        lambda f: edit(f, lambda w: prefixed("language_model.")(w) | {"vision_tower.x": torch.ones(2)}),
        r"put the config\.json beside it that these weights were saved with",
    ),
    "a value head": (
        lambda f: edit(f, lambda w: prefixed("pretrained_model.")(w) | {"v_head.weight": torch.ones(2)}),
        r"is given 40 that it has no place for",
    ),
}


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("shape", REFUSED)
def test_what_does_not_fit_is_refused_by_name(spec: Path, shape: str, side: str) -> None:
    break_it, message = REFUSED[shape]
    break_it(spec.parent / side)
    with pytest.raises(MechdiffError, match=f"{side} of pair 'toy' does not fit its weights: .*{message}"):
        load(spec)
    with pytest.raises(MechdiffError, match=message), load(spec, sequential="yes").tuned.engine():
        load(spec, sequential="yes").base.model  # noqa: B018


def test_what_is_refused_is_mended_by_the_remedy(spec: Path) -> None:
    folder = spec.parent / "tuned"
    expected = AutoModelForCausalLM.from_pretrained(folder)
    edit(folder, prefixed("policy."))
    edit(folder, lambda w: {name.removeprefix("policy."): weight for name, weight in w.items()})
    shallower(folder)
    with pytest.raises(
        MechdiffError, match=r"put the config\.json beside it that these weights were saved with"
    ):
        load(spec)
    expected.config.save_pretrained(folder)
    check_side(load(spec), "tuned", expected)
    edit(folder, without("lm_head"))
    with pytest.raises(MechdiffError, match="save_pretrained writes both"):
        load(spec)
    expected.save_pretrained(folder)
    check_side(load(spec), "tuned", expected)


def test_what_is_planted_in_is_whole_too(spec: Path) -> None:
    edit(spec.parent / "base", without("layers.1."))
    spec.write_text(toys.SPEC.replace("{model: tuned}", "{planted: 'attn_out:L1:r2'}"))
    with pytest.raises(MechdiffError, match="lacks 9 of its weights"):
        load(spec)


def sharded(folder: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    net.save_pretrained(folder, max_shard_size="10KB")


def lose_a_shard(folder: Path) -> None:
    sharded(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def empty_a_shard(folder: Path) -> None:
    sharded(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    first = dict(list(load_file(shard).items())[:1])
    save_file(first, shard, metadata={"format": "pt"})


def in_two_shards(folder: Path) -> None:
    sharded(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    name, weight = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: weight + 1}, second, metadata={"format": "pt"})


def whole_numbers(folder: Path) -> None:
    edit(folder, lambda w: {k: (20 * v).to(torch.int8) if "mlp.up" in k else v for k, v in w.items()})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is not there": (lose_a_shard, r"names 'model-00002-.*', which is not there; copy that file"),
    "a shard lacks weights": (empty_a_shard, r"does not fit its weights: it lacks \d+ of its weights"),
    "in two shards": (in_two_shards, r"both hold .*, so it is not known which is meant; copy the shards"),
    "whole numbers": (whole_numbers, r"holds 4 weights as whole numbers \(.*up_proj.* as I8\) .*; save it"),
    "pickles": (pickled, r"has only pickled weights, .* use_safetensors=False\)\.save_pretrained"),
    "truncated": (truncated, r"is damaged, truncated or no safetensors file .*; download it again"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), r"is damaged, truncated or"),
    "no config.json": (lambda f: (f / "config.json").unlink(), r"has no config\.json; copy the one"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has neither model\.safetensors nor"),
    "an unknown type": (lambda f: configure(f, model_type="nonsense"), r"; check its files there, or copy"),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text("{}") and (f / "adapter_model.safetensors").touch(),
        r"adapter",
    ),
}


@pytest.mark.parametrize("shape", FILES)
def test_errors_of_local_files_are_about_local_files(spec: Path, shape: str) -> None:
    break_it, message = FILES[shape]
    break_it(spec.parent / "tuned")
    with pytest.raises(MechdiffError, match=message) as raised:
        load(spec)
    assert "hub" not in str(raised.value).replace("huggingface_hub", "")
    assert "huggingface.co" not in str(raised.value)


def test_pickles_are_converted_by_what_the_error_says(spec: Path) -> None:
    folder = spec.parent / "tuned"
    expected = AutoModelForCausalLM.from_pretrained(folder)
    pickled(folder)
    with pytest.raises(MechdiffError) as raised:
        load(spec)
    call = str(raised.value).split("with transformers: ")[1].removesuffix(".")
    eval(call, {"AutoModelForCausalLM": AutoModelForCausalLM})
    check_side(load(spec), "tuned", expected)


def test_sharded(spec: Path) -> None:
    folder = spec.parent / "tuned"
    expected = AutoModelForCausalLM.from_pretrained(folder)
    sharded(folder)
    check_side(load(spec), "tuned", expected)


TEXT = {
    "vocab_size": len(toys.tokenizer()),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
MULTIMODAL = {
    "Gemma3": lambda: transformers.Gemma3Config(
        text_config={**TEXT, "layer_types": ["full_attention"] * 2},
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=1,
        image_token_index=5,
    ),
    "Llava": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=5,
    ),
}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_multimodal_models_are_read_whole(spec: Path, kind: str) -> None:
    torch.manual_seed(0)
    whole = getattr(transformers, f"{kind}ForConditionalGeneration")(MULTIMODAL[kind]()).eval()
    for side in ("base", "tuned"):
        whole.lm_head.weight.data.add_(0.1)
        (spec.parent / side / "config.json").unlink()
        whole.save_pretrained(spec.parent / side)
    pair = load(spec)
    assert pair.n_layers == 2
    seen: list[Tensor] = []
    decoder = (
        whole.get_decoder()
        .layers[1]
        .register_forward_hook(
            lambda module, args, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
        )
    )
    tokens = pair.tokens("tuned", pair.prompts_of("val"), Position.DECISION)
    with torch.no_grad():
        for ids in tokens.ids:
            whole(input_ids=torch.tensor([ids]))
    decoder.remove()
    site = Site(1, Hook.RESID_POST)
    with pair.tuned.engine() as engine:
        torch.testing.assert_close(
            engine.capture(tokens, [site])[site], torch.stack(seen), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("T5Config", r"is an encoder with a decoder \(t5\), .*; name a decoder-only model"),
        ("BartConfig", r"is an encoder with a decoder \(bart\), .*; name a decoder-only model"),
        ("ViTConfig", r"is no causal language model \(vit\), .*; name a decoder-only model"),
    ],
)
def test_what_is_no_decoder_is_refused_before_weights(spec: Path, config: str, message: str) -> None:
    getattr(transformers, config)().save_pretrained(spec.parent / "tuned")
    with pytest.raises(MechdiffError, match=message):
        load(spec)


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("GPT2Config", {"n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}),
        ("OPTConfig", {"ffn_dim": 16, "word_embed_proj_dim": 16, "num_attention_heads": 2}),
        ("LlamaConfig", {"num_attention_heads": 2}),
    ],
)
def test_prompts_beyond_the_positions_are_refused_before_weights(
    spec: Path, config: str, more: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"hidden_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 12, "vocab_size": 40}
    fields = {k: v for k, v in fields.items() if config != "GPT2Config" or k == "vocab_size"}
    net = AutoModelForCausalLM.from_config(getattr(transformers, config)(**fields, **more))
    for side in ("base", "tuned"):
        (spec.parent / side / "config.json").unlink()
        net.save_pretrained(spec.parent / side)
    lines = (spec.parent / "val.jsonl").read_text().splitlines()
    long = json.dumps({"text": "does subject1 verb1" + " well" * 30})
    (spec.parent / "val.jsonl").write_text("\n".join([*lines[:3], long]))
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded weights"))
        with pytest.raises(
            MechdiffError, match="Prompt 4 of val has 37 tokens and base has positions for 12"
        ):
            load(spec)
    (spec.parent / "val.jsonl").write_text("\n".join(lines[:3]))
    assert load(spec).n_layers == 2


@pytest.mark.parametrize("device", ["meta", "cuda:99", "mps"])
def test_devices_that_hold_no_numbers(spec: Path, device: str) -> None:
    for lazily in (False, True)[: 1 + (device == "meta")]:
        with pytest.raises(MechdiffError, match=f"Device '{device}' cannot be used here; pass --device cpu"):
            load_pair(PairSpec.load(str(spec)), device=device, lazily=lazily)
    if device == "meta":
        spec.write_text(toys.SPEC + "device_map: {'': meta}\n")
        with pytest.raises(MechdiffError, match="Device 'meta' cannot be used here"):
            load(spec)
