"""A pair whose models load when they are touched is the pair whose models are loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import toy as toys
from asking import answers, assert_same

from mechdiff_mlflow.experiments.workers import LocalWorkers
from mechdiff_mlflow.models.pairs import EngineOptions, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec


def adapter_spec(toy: Path, folder: Path) -> Path:
    """The toy's base with a LoRA of random weights."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    shutil.copytree(toy.parent, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    peft.get_peft_model(toys.model(0), config).save_pretrained(folder / "lora")
    (folder / "toy.yaml").write_text(toys.SPEC.replace("tuned: {model: tuned}", "tuned: {adapter: lora}"))
    return folder / "toy.yaml"


@pytest.mark.parametrize("kind", ["models", "adapter", "planted"])
def test_answers_are_the_same(kind: str, toy: Path, tmp_path: Path) -> None:
    path = adapter_spec(toy, tmp_path) if kind == "adapter" else toy
    spec = PairSpec.load(str(path))
    if kind == "planted":
        spec = spec.model_validate(
            {**spec.model_dump(), "root": spec.root, "tuned": {"planted": "attn_out:L2:r2:alpha0.7"}}
        )
    options = EngineOptions(batch_size=4)
    eager, lazy = load_pair(spec, options=options), load_pair(spec, options=options, lazily=True)
    assert lazy.fingerprint == eager.fingerprint
    assert (lazy.n_layers, lazy.tokenizers_agree) == (eager.n_layers, eager.tokenizers_agree)
    assert not lazy.base.model_cache._models
    assert_same(answers(LocalWorkers(lazy)), answers(LocalWorkers(eager)))


def test_a_device_that_is_not_here_is_no_matter(toy: Path) -> None:
    """The driver needs none: workers have it."""
    assert load_pair(PairSpec.load(str(toy)), device="cuda:99", lazily=True).device == "cuda:99"
