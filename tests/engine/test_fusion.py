"""The kernels against the code that they stand for; without a GPU: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Olmo2Config, PretrainedConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from mechdiff_mlflow.engine.kernels.attention import Prefix
from mechdiff_mlflow.engine.kernels.attention import split_attention as plain_split_attention
from mechdiff_mlflow.engine.kernels.fusion import Fusion
from mechdiff_mlflow.engine.model.architecture import Decoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts numbers off where a GPU rounds them to bfloat16.
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton", reason="Triton is not installed (torch for CUDA brings it)")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in the environment")
    from mechdiff_mlflow.engine.kernels import triton as kernels_triton

    return kernels_triton


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal but for a last bit here and there."""
    assert found.dtype == expected.dtype
    ulp = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * ulp, atol=ulp / 100)
    assert (found == expected).double().mean() > 0.98


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("norm", "offset", "late"),
    [(LlamaRMSNorm, 0.0, False), (Olmo2RMSNorm, 0.0, True), (GemmaRMSNorm, 1.0, True)],
)
def test_rms_norm(
    kernels: ModuleType, norm: type[nn.Module], offset: float, late: bool, dtype: torch.dtype
) -> None:
    module = norm(100, eps=1e-5).to(DEVICE, dtype)
    module.weight.data = numbers(100, dtype=dtype, seed=1)
    x = 3 * numbers(2, 5, 100, dtype=dtype)
    with torch.no_grad():
        assert_same(kernels.rms_norm(x, module.weight, 1e-5, offset=offset, late=late), module(x))


@pytest.mark.parametrize("dtype", HALF)
def test_gated_mlp(kernels: ModuleType, dtype: torch.dtype) -> None:
    gate, up = (4 * numbers(3, 5, 1000, dtype=dtype, seed=seed) for seed in (0, 1))
    assert_same(kernels.silu_product(gate, up), nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("one_row_of_angles", [True, False])
def test_rotation(kernels: ModuleType, dtype: torch.dtype, one_row_of_angles: bool) -> None:
    x = numbers(2, 7, 3, 24, dtype=dtype).transpose(1, 2)  # [2, 3 heads, 7 tokens, 24]
    angles = numbers(1 if one_row_of_angles else 2, 7, 24, dtype=torch.float32)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    assert_same(kernels.rotate(x, cos, sin), apply_rotary_pos_emb(x, x, cos, sin)[0])
    many = (cos[:, :1].expand(-1, 7, -1), sin[:, :1].expand(-1, 7, -1))  # as every variant of a prompt has
    assert_same(kernels.rotate(x, *many), apply_rotary_pos_emb(x, x, *many)[0])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n_prefix", [0, 1, 63, 130])
@pytest.mark.parametrize("hidden", ["nothing", "padding", "everything"])
def test_split_attention(kernels: ModuleType, dtype: torch.dtype, n_prefix: int, hidden: str) -> None:
    n, heads, key_heads, variants = 2, 6, 2, 37
    q = numbers(n, variants, heads, 24, dtype=dtype).transpose(1, 2)
    k, v = (numbers(n, variants, key_heads, 24, dtype=dtype, seed=s).transpose(1, 2) for s in (1, 2))
    keys, values = (numbers(n, key_heads, n_prefix, 24, dtype=dtype, seed=s) for s in (3, 4))
    mask = None
    if hidden != "nothing":
        mask = torch.ones(n, 1, 1, n_prefix + 1, dtype=torch.bool, device=DEVICE)
        mask[0, ..., : n_prefix // 3 if hidden == "padding" else n_prefix] = False
    prefix = Prefix(keys, values, mask)
    wide = Prefix(keys.double(), values.double(), mask)
    expected = plain_split_attention(q.double(), k.double(), v.double(), wide, suffix=1, scale=0.3)
    added = None if mask is None else prefix.added_mask(1, torch.float32)[:, 0, 0, :-1].contiguous()
    found = kernels.split_attention(q, k, v, keys, values, added, scale=0.3)
    assert found.shape == expected.shape
    # As fused attention everywhere, it rounds the weights of the prefix before the product with the values.
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("config", "mlps"), [(LlamaConfig, 2), (GemmaConfig, 0), (Olmo2Config, 2)])
def test_what_agrees_is_swapped_and_all_is_put_back(
    config: type[PretrainedConfig], mlps: int, device: str
) -> None:
    if device != DEVICE and device == "cuda":
        pytest.skip("needs a GPU")
    sizes = SIZES if config is not Olmo2Config else {k: v for k, v in SIZES.items() if k != "head_dim"}
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**sizes)).to(device, dtype).eval()
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    decoder = Decoder.of(model)
    fusion = Fusion.of(decoder)
    norms = sum("RMSNorm" in type(module).__name__ for module in model.modules())
    assert norms >= 5
    assert len(fusion.forwards) == norms + (mlps if device == "cuda" else 0)
    home = sys.modules[type(decoder.blocks[0].attention).__module__]
    assert fusion.rotations == [home]
    ids = torch.arange(12, device=device).view(2, 6)
    rotation = home.apply_rotary_pos_emb
    tolerance = 1e-4 if device == "cpu" else 0.05
    with torch.no_grad():
        expected = model(ids).logits
        with fusion.applied():
            assert home.apply_rotary_pos_emb is not rotation
            torch.testing.assert_close(model(ids).logits, expected, rtol=tolerance, atol=tolerance)
        with pytest.raises(TypeError), fusion.applied():
            model(ids, no_such_argument=1)()
        assert torch.equal(model(ids).logits, expected)
    assert home.apply_rotary_pos_emb is rotation
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("scaled", ["weight", "input"])
def test_a_norm_that_computes_something_else_is_left_alone(scaled: str) -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            twice = 2 * x if scaled == "input" else x
            return super().forward(twice + 0.01) if scaled == "input" else 1.01 * super().forward(x)

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    n = len(Fusion.of(Decoder.of(model)).forwards)
    model.model.norm = OddRMSNorm(32)
    assert len(Fusion.of(Decoder.of(model)).forwards) == n - 1


def test_somebody_elses_forward_is_left_alone() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    norm = model.model.norm
    theirs = lambda x: 2 * type(norm).forward(norm, x)  # noqa: E731
    norm.forward = theirs
    fusion = Fusion.of(Decoder.of(model))
    assert norm not in [module for module, _ in fusion.forwards]
    with fusion.applied():
        assert norm.forward is theirs
    assert norm.forward is theirs


@pytest.mark.skipif(DEVICE == "cpu", reason="MLPs are swapped on a GPU only")
@pytest.mark.parametrize("activation", ["relu", "gelu_pytorch_tanh"])
def test_a_gated_mlp_of_another_activation_is_left_alone(activation: str) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, hidden_act=activation))
    fusion = Fusion.of(Decoder.of(model.to(DEVICE, torch.bfloat16).eval()))
    assert not any(isinstance(module, LlamaMLP) for module, _ in fusion.forwards)
