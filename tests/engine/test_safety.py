"""Whatever happens, the model is as before, and engines do not disturb each other."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from typing import Any

import peft
import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from families import FAMILIES
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechdiff_mlflow.engine import PatchEngine, ScoreResult, VariantGroup
from mechdiff_mlflow.engine.kernels.attention import Prefix
from mechdiff_mlflow.engine.model.forward import Recording
from mechdiff_mlflow.engine.paths.sweep_recording import SweepRecorder
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

SITES = [Site(layer, hook) for layer in range(2) for hook in Hook]
MODES = ["sweep", "masked", "naive"]


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that the engine could have left changed."""
    seen: dict[str, Any] = {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "attention": model.config._attn_implementation,
        "registry": (dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)),
    }
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            is_dict = isinstance(value, dict)
            if key not in ("_parameters", "_buffers"):
                seen[f"{name}.{key}"] = list(value.items()) if is_dict else value
    return seen


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key == "parameters":
            assert all(torch.equal(value[name], after[key][name]) for name in value)
        elif not isinstance(value, Tensor):
            assert value == after[key], key


def groups(n_variants: int = 2, sites: Sequence[Site] = SITES) -> list[VariantGroup]:
    def shifted(index: Tensor, clean: Tensor) -> Tensor:
        return clean.unsqueeze(1) + torch.arange(1, n_variants + 1, device=clean.device)[:, None]

    return [VariantGroup(site, shifted, n_variants) for site in sites]


def same_scores(a: ScoreResult, b: ScoreResult) -> bool:
    return all(
        torch.allclose(x.kl_patched_clean, y.kl_patched_clean, rtol=1e-4, atol=1e-7)
        for x, y in zip(a.divergences, b.divergences, strict=True)
    )


class Bomb:
    """A hook that fails at its n-th call."""

    def __init__(self) -> None:
        self.left = -1

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt("bomb")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "path", ["model.embed_tokens", "model.layers.1", "model.layers.1.self_attn", "model.norm"]
)
def test_a_failure_anywhere_leaves_the_model_as_it_was(mode: str, path: str) -> None:
    model, prompts = tiny.llama(n_layers=2), tiny.prompts(4, 6, 5)
    bomb = Bomb()
    model.get_submodule(path).register_forward_hook(bomb)
    engine = PatchEngine(model, mode=mode, batch_size=2, max_rows=16, head_rows=8)
    expected = engine.score(prompts, groups(1))
    before = state(model)
    n_failures = 0
    for n in (1, 2, 3, 4, 7, 11, 1000):
        bomb.left = n
        try:
            engine.score(prompts, groups(1))
        except KeyboardInterrupt:
            n_failures += 1
        assert_same(before, state(model))
    bomb.left = -1
    assert n_failures >= 2
    assert same_scores(engine.score(prompts, groups(1)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_failures_of_callers_leave_the_model_as_it_was(mode: str) -> None:
    model, prompts = tiny.llama(n_layers=2), tiny.prompts(4, 6, 5)
    engine = PatchEngine(model, mode=mode, batch_size=2)
    before = state(model)

    def second_chunk_fails(index: Tensor, clean: Tensor) -> Tensor:
        if 1 in index.tolist():
            raise RuntimeError("the caller's own mistake")
        return clean.unsqueeze(1) + 1

    def interrupted(index: Tensor, clean: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError, match="the caller's own mistake"):
        engine.score(prompts, [VariantGroup(SITES[3], second_chunk_fails, 1)])
    with pytest.raises(KeyboardInterrupt):
        engine.score(prompts, [VariantGroup(SITES[3], interrupted, 1)])
    assert_same(before, state(model))


@pytest.mark.parametrize("family", FAMILIES[::4], ids=lambda f: f.name)
def test_using_an_engine_leaves_no_trace(family: Any) -> None:
    model, prompts = family.build(family.attentions[0]), tiny.prompts(6, 3)
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PatchEngine(model)
    assert_same(before, state(model))
    engine.capture(prompts, SITES)
    engine.score(prompts, groups())
    assert_same(before, state(model))


def test_engines_on_two_models_with_one_configuration_take_turns() -> None:
    first = tiny.llama(n_layers=2)
    second = tiny.build(first.config, seed=1)
    assert first.config is second.config
    prompts = tiny.prompts(4, 6, 5)
    alone = [PatchEngine(model).score(prompts, groups()) for model in (first, second)]
    engines = [PatchEngine(first), PatchEngine(second)]
    inner: list[ScoreResult] = []

    def with_the_other(index: Tensor, clean: Tensor) -> Tensor:
        inner.append(engines[1].score(prompts, groups()))  # in the middle of the first one's work
        return clean.unsqueeze(1) + 1

    for _ in range(2):
        for engine, expected in zip(engines, alone, strict=True):
            assert same_scores(engine.score(prompts, groups()), expected)
    engines[0].score(prompts, [VariantGroup(SITES[1], with_the_other, 1)])
    assert same_scores(inner[0], alone[1])
    assert same_scores(engines[0].score(prompts, groups()), alone[0])


def test_an_adapter_is_switched_under_two_engines_on_one_module() -> None:
    base, merged, prompts = tiny.llama(n_layers=2), tiny.llama(n_layers=2), tiny.prompts(4, 6, 5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(base, config).eval()
    tuned_engine = PatchEngine(model)
    with model.disable_adapter():
        base_engine = PatchEngine(model)
    merged.load_state_dict(_merged_weights(model, merged))
    for _ in range(2):
        with model.disable_adapter():
            found = base_engine.score(prompts, groups())
        assert same_scores(found, PatchEngine(tiny.llama(n_layers=2)).score(prompts, groups()))
        assert same_scores(
            tuned_engine.score(prompts, groups()), PatchEngine(merged).score(prompts, groups())
        )


def _merged_weights(model: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    weights = dict(like.state_dict())
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            weights[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
    return weights


def test_wrapped_forwards_are_kept_and_used() -> None:
    model, prompts = tiny.llama(n_layers=2), tiny.prompts(4, 6, 5)
    expected = PatchEngine(model).score(prompts, groups())
    for module in (*model.model.layers, model.model.layers[1].self_attn, model.lm_head):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    before = state(model)
    engine = PatchEngine(model)
    assert engine.mode == "sweep"
    assert same_scores(engine.score(prompts, groups()), expected)
    assert_same(before, state(model))


@pytest.fixture
def steered() -> nn.Module:
    model = tiny.llama(n_layers=2)
    model.model.layers[1].register_forward_hook(lambda module, args, out: out + 0.5 * torch.arange(32) / 32)
    return model


@pytest.mark.parametrize("mode", ["sweep", "masked"])
def test_hooks_of_the_user_are_part_of_the_model(steered: nn.Module, mode: str) -> None:
    prompts = tiny.prompts(4, 6, 5)
    expected = PatchEngine(steered, mode="naive").score(prompts, groups())
    plain = PatchEngine(tiny.llama(n_layers=2)).score(prompts, groups())
    assert not same_scores(plain, expected)
    assert same_scores(PatchEngine(steered, mode=mode).score(prompts, groups()), expected)


def test_other_kernels_are_run_as_sdpa() -> None:
    model, prompts = tiny.llama(n_layers=2), tiny.prompts(4, 6, 5)
    expected = PatchEngine(model).score(prompts, groups())
    model.config._attn_implementation_internal = "flash_attention_2"
    engine = PatchEngine(model)
    assert engine.mode == "sweep"
    assert same_scores(engine.score(prompts, groups()), expected)
    assert model.config._attn_implementation == "flash_attention_2"


def test_slower_ways_are_announced_and_forced_ones_refused() -> None:
    bloom = next(f for f in FAMILIES if f.name == "Bloom").build("eager")
    with pytest.warns(
        UserWarning, match="BloomForCausalLM are computed the slower way 'naive': BloomAttention"
    ):
        assert PatchEngine(bloom).mode == "naive"
    with pytest.raises(
        MechdiffError, match=r"Mode 'sweep' does not fit BloomForCausalLM \(.*\); use mode 'auto'"
    ):
        PatchEngine(bloom, mode="sweep")


def test_a_way_that_would_be_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechdiff_mlflow.engine.paths.sweep.split_attention", _forgets_itself)
    with pytest.warns(UserWarning, match=r"slower way 'masked': Its logits are off by"):
        assert PatchEngine(tiny.llama(n_layers=2)).mode == "masked"


def _forgets_itself(query: Tensor, key: Tensor, value: Tensor, prefix: Any, **kwargs: Any) -> Tensor:
    keys, values = (x.repeat_interleave(2, 1) for x in (prefix.keys, prefix.values))
    return nn.functional.scaled_dot_product_attention(query, keys, values).transpose(1, 2)


SITE = Site(1, Hook.ATTN_OUT)
PROMPTS = tiny.prompts(4, 6, 5)


@pytest.mark.parametrize(
    ("ids", "positions", "message"),
    [
        ((), (), "There are no prompts; give at least one"),
        (((1, 2), ()), (1, 0), r"Prompt 1 has 0 tokens and no position 0; check its text"),
        (((1, 2),), (2,), r"Prompt 0 has 2 tokens and no position 2"),
        (((1, 2),), (-1,), r"Prompt 0 has 2 tokens and no position -1"),
        (
            ((1, 97),),
            (1,),
            r"Prompt 0 has token ids from 1 to 97, but the model's vocabulary is 0 to 96; tokenize",
        ),
    ],
)
def test_prompts_that_cannot_be_run_are_refused(ids: Any, positions: Any, message: str) -> None:
    engine = PatchEngine(tiny.llama(n_layers=2))
    with pytest.raises(MechdiffError, match=message):
        engine.capture(TokenizedPrompts(ids, positions), [SITE])
    with pytest.raises(MechdiffError, match=message):
        engine.score(TokenizedPrompts(ids, positions), [VariantGroup.identity(SITE)])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            VariantGroup(Site(9, Hook.MLP_OUT), torch.zeros(3, 1, 32)),
            r"Layer 9 does not exist: the model has 2 layers",
        ),
        (
            VariantGroup(SITE, torch.full((3, 1, 32), torch.nan)),
            r"Replacement 0 of prompt \d at L1/attn_out is NaN",
        ),
    ],
)
def test_bad_replacements_are_refused(group: VariantGroup, message: str) -> None:
    with pytest.raises(MechdiffError, match=message):
        PatchEngine(tiny.llama(n_layers=2)).score(PROMPTS, [group])


def test_replacements_beyond_the_range_of_the_dtype_are_refused() -> None:
    engine = PatchEngine(tiny.llama(n_layers=2, dtype=torch.float16))
    huge = torch.zeros(3, 2, 32)
    huge[1, 1, 5] = 1e6
    with pytest.raises(
        MechdiffError, match=r"Replacement 1 of prompt 1 at L1/attn_out .* range of torch\.float16"
    ):
        engine.score(PROMPTS, [VariantGroup(SITE, huge)])


def test_activations_that_are_not_finite_are_refused() -> None:
    model = tiny.llama(n_layers=2)
    engine = PatchEngine(model)
    token = PROMPTS.ids[1][-1]
    assert token not in PROMPTS.ids[0] + PROMPTS.ids[2]
    with torch.no_grad():
        model.model.embed_tokens.weight[token, 3] = torch.inf
    for use in (lambda: engine.capture(PROMPTS, [SITE]), lambda: engine.score(PROMPTS, groups())):
        with pytest.raises(
            MechdiffError, match=r"The activation at L\d/\w+ of prompt 1 is NaN or infinite; load the"
        ):
            use()


def test_logits_that_are_not_finite_are_refused() -> None:
    model = tiny.llama(n_layers=2)
    engine = PatchEngine(model, batch_size=2)
    engine.score(PROMPTS, [VariantGroup(SITE, torch.zeros(3, 1, 32))])
    site = Site(1, Hook.RESID_POST)
    own = engine.capture(PROMPTS, [site])[site]
    big = own[:, None].repeat(1, 2, 1)
    big[2, 1] = 1e3 * torch.eye(32)[0]
    with torch.no_grad():
        model.lm_head.weight[7, 0] = 1e38  # a logit in range for the clean norm, beyond it for this one
    with pytest.raises(
        MechdiffError, match=r"Replacement 1 at L1/resid_post makes the logits of prompt 2 NaN or inf"
    ):
        engine.score(PROMPTS, [VariantGroup.identity(SITE), VariantGroup(site, big)])


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(
        MechdiffError, match=r"training mode, where dropout is random; call model\.eval\(\) first"
    ):
        PatchEngine(tiny.llama(n_layers=2).train())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "Mode 'fast' is unknown; use one of auto, sweep, masked, naive"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(MechdiffError, match=message):
        PatchEngine(tiny.llama(n_layers=2), **arguments)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_chunk_left_is_gone_before_the_garbage_is_collected(mode: str) -> None:
    engine = PatchEngine(tiny.llama(), mode=mode, batch_size=2)
    prompts = tiny.prompts(7, 9, 9, 12)
    groups = [VariantGroup(SITES[1], torch.randn(4, 2, engine.width))]
    gc.collect()
    gc.disable()
    before = tiny.alive(Recording, SweepRecorder, Prefix)
    try:
        engine.score(prompts, groups)
        assert tiny.alive(Recording, SweepRecorder, Prefix) <= before
    finally:
        gc.enable()
