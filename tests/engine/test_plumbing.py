import warnings
from typing import Any

import pytest
import tiny
import torch
import transformers
from families import FAMILIES, Family

from mechdiff_mlflow.engine import ModuleNames, PatchEngine, check_plumbing
from mechdiff_mlflow.spec.sites import Hook, Site

PROMPTS = tiny.prompts(9, 4, 12, 5, 7, 6, from_end=2)
NAMES = [
    "hooks fire once",
    "capture depends on neither padding nor batch size",
    "sublayers add up",
    "identity patches change nothing",
    "prompts are read as the model reads them",
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family_is_plumbed_right(family: Family) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PatchEngine(family.build(family.attentions[0]))
    checks = check_plumbing(engine, PROMPTS)
    assert [check.name for check in checks] == NAMES
    assert all(check.passed for check in checks), checks
    assert ("times 0.7" in checks[2].detail) == family.scaled
    before = engine.n_forwards
    few = check_plumbing(engine, PROMPTS, thorough=False)
    assert [check.name for check in few] == NAMES
    assert all(check.passed for check in few), few
    assert engine.n_forwards - before <= before // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pass_too(dtype: torch.dtype) -> None:
    checks = check_plumbing(PatchEngine(tiny.llama(dtype=dtype)), PROMPTS)
    assert all(check.passed for check in checks), checks


def test_a_sublayer_that_is_not_what_is_added_is_told() -> None:
    feeds_the_mlp = ModuleNames(mlp_out="post_attention_layernorm")
    with pytest.warns(UserWarning, match="slower way 'masked'"):  # the sweep trusts that it comes after
        engine = PatchEngine(tiny.llama(), overrides=feeds_the_mlp)
    failed = [check for check in check_plumbing(engine, PROMPTS) if not check.passed]
    assert [check.name for check in failed] == ["sublayers add up"]
    assert "largest relative rest" in failed[0].detail


def test_a_model_that_sees_its_padding_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llama()
    engine = PatchEngine(model)
    own = model.model.forward
    blind = {"attention_mask": None, "position_ids": None}
    monkeypatch.setattr(model.model, "forward", lambda **kwargs: own(**{**kwargs, **blind}))
    failed = [check.name for check in check_plumbing(engine, PROMPTS) if not check.passed]
    assert failed == [NAMES[1]]


def test_a_module_called_twice_is_told() -> None:
    model = tiny.llama()
    engine = PatchEngine(model)
    model.model.layers[1].register_forward_hook(lambda module, args, out: (module.mlp(out), out)[1])
    checks = {check.name: check for check in check_plumbing(engine, PROMPTS)}
    assert not checks[NAMES[0]].passed
    assert checks[NAMES[0]].detail == "L1/mlp_out fired 2 times"


def test_identity_patches_that_change_something_are_told() -> None:
    model = tiny.llama()
    engine = PatchEngine(model)
    calls = []

    def drifts(module: object, args: object, out: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return out * (1 + 0.01 * len(calls))

    model.model.layers[3].mlp.register_forward_hook(drifts)
    checks = {check.name: check for check in check_plumbing(engine, PROMPTS)}
    assert not checks[NAMES[3]].passed
    assert "largest KL" in checks[NAMES[3]].detail


@pytest.mark.parametrize(
    ("dtype", "nats", "part"), [(torch.float64, 1e-12, 1e-10), (torch.float32, 1e-6, 1e-4)]
)
def test_how_far_an_identity_patch_and_another_batch_may_be_off(
    dtype: torch.dtype, nats: float, part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PatchEngine(tiny.llama(dtype=dtype))
    score, capture = PatchEngine.score, PatchEngine.capture

    def off_in_kl(self: PatchEngine, *args: Any, **options: Any) -> Any:
        found = score(self, *args, **options)
        for one in found.divergences:
            one.kl_patched_clean[:] = factor * nats
        return found

    def off_when_alone(self: PatchEngine, prompts: Any, *args: Any, **options: Any) -> Any:
        found = capture(self, prompts, *args, **options)
        return {site: x * (1 + factor * part * (len(prompts) == 1)) for site, x in found.items()}

    monkeypatch.setattr(PatchEngine, "score", off_in_kl)
    monkeypatch.setattr(PatchEngine, "capture", off_when_alone)
    for times, failed in ((0.5, []), (2.0, [NAMES[1], NAMES[3]])):
        factor = times
        checks = check_plumbing(engine, PROMPTS)
        assert [check.name for check in checks if not check.passed] == failed, checks


def test_a_hybrid_with_a_gated_norm_and_a_model_without_a_padding_token() -> None:
    config = transformers.Qwen3NextConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        initializer_range=0.2,
    )
    model = tiny.build(config)
    vars(model.config).pop("pad_token_id", None)
    engine, prompts = PatchEngine(model), tiny.prompts(5, 9, 7)
    assert [check for check in check_plumbing(engine, prompts) if not check.passed] == []
    for layer, name in enumerate(("linear_attn", "self_attn")):
        seen: list[torch.Tensor] = []

        def keep(module: object, args: object, out: object, seen: list[torch.Tensor] = seen) -> None:
            seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])

        handle = model.get_submodule(f"model.layers.{layer}.{name}").register_forward_hook(keep)
        with torch.no_grad():
            for ids in prompts.ids:
                model(input_ids=torch.tensor([ids]))
        handle.remove()
        found = engine.capture(prompts, [Site(layer, Hook.ATTN_OUT)])
        torch.testing.assert_close(*found.values(), torch.stack(seen), atol=1e-5, rtol=1e-4)
