import warnings

import pytest
import tiny
import torch
from families import FAMILIES, Family

from mechdiff_mlflow.engine import ModuleNames, PatchEngine, check_plumbing

PROMPTS = tiny.prompts(9, 4, 12, 5, 7, 6, from_end=2)
NAMES = [
    "hooks fire once",
    "capture depends on neither padding nor batch size",
    "sublayers add up",
    "identity patches change nothing",
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
