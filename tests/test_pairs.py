from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import toy as toys
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position
from mechdiff_mlflow.spec.sites import Hook, Site

SITE = Site(3, Hook.RESID_POST)


def copy_of(toy: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy.parent, tmp_path / "pair")
    return tmp_path / "pair" / "toy.yaml"


def load(spec: Path, **options: str) -> Pair:
    return load_pair(PairSpec.load(str(spec)), **options)


def activations(pair: Pair, role: str) -> torch.Tensor:
    side = pair.side(role)
    tokens = pair.tokens(role, pair.prompts_of("val"), Position.DECISION)
    with side.engine() as engine:
        return engine.capture(tokens, [SITE])[SITE]


def test_a_pair_knows_where_its_weights_begin_to_differ(toy: Path) -> None:
    assert load(toy).first_changed_layer() == toys.FIRST_CHANGED


def test_fingerprints_change_with_anything_that_changes_numbers(toy: Path, tmp_path: Path) -> None:
    spec = copy_of(toy, tmp_path)
    seen = {load(toy).fingerprint}
    assert load(spec).fingerprint in seen, "a copy elsewhere is the same pair"
    edits = {
        "dtype": lambda text: text + "dtype: float64\n",
        "system": lambda text: text + "system: well well\n",
        "template": lambda text: text + "template: tuned\n",
        "weights": lambda text: text.replace("tuned: {model: tuned}", "tuned: {model: base}"),
        "prompts": lambda text: text.replace("val: val.jsonl", "val: other.jsonl"),
    }
    (spec.parent / "other.jsonl").write_text('{"text": "does subject1 verb1 well well well"}\n')
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}"
    for name, edit in edits.items():
        spec.write_text(edit(toys.SPEC))
        if name == "system":
            for side in ("base", "tuned"):
                (spec.parent / side / "chat_template.jinja").write_text(template)
        fingerprint = load(spec).fingerprint
        assert fingerprint not in seen, name
        seen.add(fingerprint)


def test_an_adapter_on_the_base_is_the_merged_model_with_the_base_loaded_once(
    toy: Path, tmp_path: Path
) -> None:
    spec = copy_of(toy, tmp_path)
    torch.manual_seed(3)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(spec.parent / "base"),
        LoraConfig(r=2, target_modules=["o_proj"], layers_to_transform=[2], init_lora_weights=False),
    )
    adapted.save_pretrained(spec.parent / "lora")
    shutil.rmtree(spec.parent / "tuned")
    toys.write_model(spec.parent / "merged", adapted.merge_and_unload())
    text = toys.SPEC.replace("tuned: {model: tuned}", "tuned: {adapter: lora}")
    spec.write_text(text)
    adapter = load(spec)
    spec.write_text(text.replace("{adapter: lora}", "{model: merged}"))
    merged = load(spec)

    assert adapter.base.model is adapter.tuned.model
    # Switched back and forth: neither side leaks into the other.
    for role in ("base", "tuned", "base", "tuned"):
        torch.testing.assert_close(
            activations(adapter, role), activations(merged, role), atol=1e-6, rtol=1e-5
        )
    assert not torch.equal(activations(adapter, "base"), activations(adapter, "tuned"))
    assert adapter.tuned.revision != adapter.base.revision


def test_pickled_weights_are_never_read(toy: Path, tmp_path: Path) -> None:
    spec = copy_of(toy, tmp_path)
    (spec.parent / "tuned/model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(1)}, spec.parent / "tuned/pytorch_model.bin")
    with pytest.raises(MechdiffError, match="only pickled weights, which can run code and are not read"):
        load(spec)


def test_a_hub_id_that_cannot_be_reached_names_the_model(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec = copy_of(toy, tmp_path)
    spec.write_text(toys.SPEC.replace("tuned: {model: tuned}", "tuned: {model: nobody/nothing}"))
    with pytest.raises(MechdiffError, match="Model nobody/nothing of pair 'toy' cannot be loaded"):
        load(spec)


def test_prompts_are_checked_before_weights_are_loaded(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = copy_of(toy, tmp_path)
    (spec.parent / "val.jsonl").write_text("{\n")
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("loaded weights")
    )
    with pytest.raises(MechdiffError, match="line 1 is not JSON"):
        load(spec)


def test_the_asked_dtype_is_that_of_both_models(toy: Path) -> None:
    pair = load(toy, dtype="float64")
    assert {side.model.dtype for side in pair.sides} == {torch.float64}
    assert pair.spec.dtype == "float64"


@pytest.mark.parametrize("device", ["cuda:77", "abacus"])
def test_devices_that_are_not_there(toy: Path, device: str) -> None:
    with pytest.raises(MechdiffError, match=f"Device '{device}' cannot be used here"):
        load(toy, device=device)


def test_each_side_reads_through_the_template_that_the_spec_names(toy: Path, tmp_path: Path) -> None:
    spec = copy_of(toy, tmp_path)
    plain = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (spec.parent / "tuned/chat_template.jinja").write_text(plain)
    lengths = {}
    for policy in ("own", "base", "tuned", "none"):
        spec.write_text(toys.SPEC + f"template: {policy}\n")
        pair = load(spec)
        prompts = pair.prompts_of("val", 1)
        base, tuned = (pair.tokens(role, prompts, Position.DECISION).ids[0] for role in ("base", "tuned"))
        lengths[policy] = (len(base), len(tuned))
        assert pair.tokenizers_agree == (policy in ("base", "tuned"))
    long, short = lengths["own"]
    assert long > short
    assert lengths["base"] == (long, long)
    assert lengths["tuned"] == (short, short)
    assert lengths["none"] == (short - 1, short - 1), "this tokenizer adds no BOS by itself"


def test_engine_options_reach_the_engine(toy: Path) -> None:
    pair = load_pair(PairSpec.load(str(toy)), options=EngineOptions(batch_size=3))
    with pair.tuned.engine() as engine:
        assert engine.limits.batch_size == 3
