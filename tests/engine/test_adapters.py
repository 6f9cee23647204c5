"""An adapter computes what the attached map does, loaded as a stranger would load it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from families import FAMILIES, Family
from peft.utils import PeftWarning
from torch import Tensor, nn

from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.models import map_adapters as adapters
from mechdiff_mlflow.models.attach import attached
from mechdiff_mlflow.spec.sites import Hook, Site

pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.PeftWarning")
assert PeftWarning
IDS = torch.tensor(tiny.prompts(7, 7).ids)
LINEAR = {"Llama", "GPT-2", "OPT", "Phi", "Bloom", "Qwen2", "Falcon", "GPT-NeoX"}
"""Families whose sublayers end in a linear layer, of every make: with and without bias, Conv1D, parallel."""


def a_map(d: int, *, alpha: float = 1.0, identity: float | Tensor = 1.0, rank: int = 2) -> AffineMap:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator).double() for shape in ((d, rank), (rank, d)))
    means = torch.randn(2, d, generator=generator).double()
    diagonal = torch.as_tensor(identity, dtype=torch.float64)
    return AffineMap(means[0], means[1], Weight(diagonal, 0.3 * left, right), alpha)


def wanted(model: nn.Module, site: Site, the_map: AffineMap) -> Tensor:
    with torch.no_grad(), attached(the_map, model, site, tokens="all"):
        return model(IDS).logits


def write_peft(model: nn.Module, site: Site, the_map: AffineMap, folder: Path) -> adapters.Lora:
    folder.mkdir()
    found = adapters.last_linear(Decoder.of(model), site)
    assert found is not None
    path, linear = found
    lora = adapters.lora_of(the_map, linear)
    adapters.write_peft(lora, linear, path, folder, base_model="base", revision=None)
    return lora


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in LINEAR], ids=lambda family: family.name)
def test_peft_gives_the_logits_of_the_attached_map(family: Family, tmp_path: Path) -> None:
    for i, hook in enumerate((Hook.ATTN_OUT, Hook.MLP_OUT)):
        model, site = family.build("eager"), Site(2, hook)
        the_map = a_map(model.config.hidden_size)
        expected = wanted(model, site, the_map)
        lora = write_peft(model, site, the_map, tmp_path / str(i))
        assert lora.rank == 2
        adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / str(i))).eval()
        with torch.no_grad():
            torch.testing.assert_close(adapted(IDS).logits, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"alpha": 0.3}, 32),
        ({"alpha": 0.5, "identity": 2.0}, 2),
        ({"identity": 0.0}, 32),
        ({"identity": torch.linspace(0.5, 1.5, 32)}, 32),
        ({"rank": 0}, 1),
        ({"rank": 5}, 5),
    ],
    ids=["alpha", "alpha undone", "content", "diagonal", "mean shift", "rank 5"],
)
def test_no_map_loses_anything(tmp_path: Path, options: dict[str, Any], rank: int) -> None:
    """Whatever α, family and structure; the rank is that of α·W − I, one at least."""
    model, site = tiny.llama(), Site(1, Hook.MLP_OUT)
    the_map = a_map(32, **options)
    expected = wanted(model, site, the_map)
    assert write_peft(model, site, the_map, tmp_path / "a").rank == rank
    with adapters.loaded(tmp_path / "a", model) as adapted, torch.no_grad():
        torch.testing.assert_close(adapted(IDS).logits, expected, atol=3e-5, rtol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters()), "gone afterwards"


def test_a_map_that_is_dense_has_the_rank_of_its_update(tmp_path: Path) -> None:
    the_map = a_map(32)
    dense = AffineMap(the_map.mean_in, the_map.mean_out, Weight.from_dense(the_map.dense()))
    assert write_peft(tiny.llama(), Site(1, Hook.ATTN_OUT), dense, tmp_path / "a").rank == 2


def test_peft_merges_where_the_layer_has_a_bias(tmp_path: Path) -> None:
    family = next(f for f in FAMILIES if f.name == "Phi")
    model, site = family.build("eager"), Site(1, Hook.ATTN_OUT)
    the_map = a_map(model.config.hidden_size)
    expected = wanted(model, site, the_map)
    write_peft(model, site, the_map, tmp_path / "a")
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_hook_gives_the_logits_of_the_attached_map_anywhere(family: Family, tmp_path: Path) -> None:
    model = family.build(family.attentions[0])
    decoder = Decoder.of(model)
    for hook in Hook:
        site, folder = Site(2, hook), tmp_path / hook
        folder.mkdir()
        the_map = a_map(decoder.width, alpha=0.7)
        expected = wanted(model, site, the_map)
        adapters.write_hook(the_map, decoder, site, folder)
        with adapters.loaded(folder, model), torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, expected, atol=3e-5, rtol=1e-4)
        assert AffineMap.load(folder / "map.safetensors") == the_map


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_linear_layer_is_claimed_only_where_it_gives_the_activation(family: Family, tmp_path: Path) -> None:
    model = family.build(family.attentions[0])
    for hook in Hook:
        found = adapters.last_linear(Decoder.of(model), Site(2, hook))
        assert found is None or hook in (Hook.ATTN_OUT, Hook.MLP_OUT)
        assert found is not None or family.name not in LINEAR or hook in (Hook.RESID_PRE, Hook.RESID_POST)
        if family.name.startswith("Gemma"):
            assert found is None, "a norm comes after"
    assert not any(m._forward_hooks for m in model.modules())


def test_the_loader_needs_nothing_of_ours(tmp_path: Path) -> None:
    model = tiny.llama()
    adapters.write_hook(a_map(32), Decoder.of(model), Site(1, Hook.RESID_PRE), tmp_path)
    code = "import load_hook, sys; print('mechdiff_mlflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
    (tmp_path / "hook.json").write_text(json.dumps({"format": "other"}))
    spec = importlib.util.spec_from_file_location("load_hook", tmp_path / "load_hook.py")
    assert spec is not None
    assert spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    with pytest.raises(ValueError, match="no hook of format version 1"):
        loader.attach(model)


def test_a_map_of_another_width_is_refused() -> None:
    with pytest.raises(MechdiffError, match="cannot change a layer that gives 32"):
        adapters.lora_of(a_map(16), nn.Linear(8, 32))
