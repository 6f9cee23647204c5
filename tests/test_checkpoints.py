"""Where weights come from: the hub or not, in how many bits, on which devices."""

from __future__ import annotations

import importlib.util
import shutil
import socket
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import toy as toys
import yaml
from cli.conftest import Invoke, client, empty_store, here, mechdiff  # noqa: F401
from test_pairs import activations
from transformers import AutoModelForCausalLM

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.preflight import examine
from mechdiff_mlflow.models.checkpoints import Checkpoint
from mechdiff_mlflow.models.pairs import Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture
def spec(toy: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy.parent, tmp_path / "pair")
    return tmp_path / "pair" / "toy.yaml"


def load(spec: Path, more: str = "") -> Pair:
    spec.write_text(toys.SPEC + more)
    return load_pair(PairSpec.load(str(spec)))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Notes every attempt to look up or reach another machine, and refuses it."""
    asked: list[Any] = []

    def refuse(*args: Any, **options: Any) -> Any:
        asked.append(args)
        raise OSError("the network is not to be used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return asked


def test_offline_nothing_is_asked_and_a_missing_model_says_so(
    spec: Path, no_network: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load(spec)
    assert no_network == []
    text = toys.SPEC.replace("tuned: {model: tuned}", "tuned: {model: nobody/nothing}")
    spec.write_text(text)
    with pytest.raises(
        MechdiffError, match=r"nobody/nothing .* cannot be loaded .*; HF_HUB_OFFLINE is set, so"
    ):
        load_pair(PairSpec.load(str(spec)))
    assert no_network == []


def test_local_models_need_no_network_at_all(spec: Path, no_network: list[Any]) -> None:
    load(spec)
    assert no_network == []


def test_the_size_of_weights_is_known_before_they_are_loaded(spec: Path) -> None:
    for dtype, number in (("float32", 4), ("bfloat16", 2)):
        spec.write_text(toys.SPEC + f"dtype: {dtype}\n")
        checkpoint = Checkpoint(PairSpec.load(str(spec)), "base", None, "cpu")
        parameters = sum(p.numel() for p in checkpoint.load().parameters())
        assert checkpoint.n_bytes() == number * parameters
        assert checkpoint.n_layers == toys.N_LAYERS


@pytest.mark.parametrize("device_map", ["auto", "{'': cpu}"])
def test_device_maps_go_to_transformers(spec: Path, device_map: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    own = AutoModelForCausalLM.from_pretrained

    def from_pretrained(place: str, **options: Any) -> Any:
        asked.append(options["device_map"])
        return own(place, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    pair = load(spec, f"device_map: {device_map}\n")
    assert asked == [yaml.safe_load(device_map)] * 2
    plain = load(spec)
    for role in ("base", "tuned"):
        torch.testing.assert_close(activations(pair, role), activations(plain, role))
    assert pair.fingerprint == plain.fingerprint, "where weights lie changes no number"


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_quantization_without_bitsandbytes(spec: Path) -> None:
    with pytest.raises(
        MechdiffError, match=r"asks for 4bit weights and bitsandbytes is not installed; install mech"
    ):
        load(spec, "quantization: 4bit\n")


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_pairs_are_sound_and_pairs_of_their_own(spec: Path, bits: str) -> None:
    for seed, side in enumerate(("base", "tuned")):  # kernels for 4 bits want multiples of 64
        net = toys.model(seed, width=128)
        for block in net.model.layers:
            for weight in (w for w in block.parameters() if w.dim() == 2):
                weight.data.mul_(0.1)  # as trained ones are: rounding does not grow from block to block
        toys.write_model(spec.parent / side, net)
    plain = load(spec, "dtype: bfloat16\n")
    pair = load(spec, f"dtype: bfloat16\nquantization: {bits}\n")
    assert pair.fingerprint != plain.fingerprint
    assert getattr(pair.tuned.model, f"is_loaded_in_{bits}")
    for check in examine(pair):
        assert check.passed, check
    assert pair.first_changed_layer() == 0
    found, expected = activations(pair, "tuned").float(), activations(plain, "tuned").float()
    assert 0 < (found - expected).norm() / expected.norm() < 0.5


def test_what_is_quantized_cannot_be_planted_in() -> None:
    fields = PairSpec.load("planted:attn_out:L14:r2").model_dump() | {"quantization": "8bit"}
    with pytest.raises(ValueError, match="nothing can be planted in quantized weights"):
        PairSpec(**fields)


def test_bad_quantization_in_a_spec(spec: Path, mechdiff: Invoke) -> None:  # noqa: F811
    spec.write_text(toys.SPEC + "quantization: 3bit\n")
    output = mechdiff("doctor", str(spec), code=1).output
    assert "quantization: Input should be '8bit' or '4bit'" in output
