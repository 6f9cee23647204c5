"""The kernels against the float64 path; without a GPU, in Triton's interpreter: TRITON_INTERPRET=1 pytest."""

from __future__ import annotations

import os
from types import ModuleType

import pytest
import torch

from mechdiff_mlflow.measures.metrics import NextToken, compare_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton is not installed (torch for CUDA brings it)")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 in the environment", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    from mechdiff_mlflow.measures import metrics_triton

    return metrics_triton


@pytest.mark.parametrize("vocabulary", [2, 50, 4096, 9001])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_the_float64_path(
    kernels: ModuleType, dtype: torch.dtype, size: float, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = (3 * torch.randn(3, vocabulary, generator=generator)).to(dtype)
    owner = torch.tensor([0, 0, 1, 2, 2])
    noise = size * torch.randn(5, vocabulary, generator=generator)
    patched = (clean[owner].float() + noise).to(dtype)
    expected = compare_rows(patched, NextToken.of(clean), owner)
    log_q = kernels.log_softmax_rows(clean.to(DEVICE))
    top = clean.argmax(-1)
    found = kernels.compare_rows(patched.to(DEVICE), log_q, owner.to(DEVICE), top.to(DEVICE)).cpu().double()
    # A log-probability is rounded to 1e-6, which the KL feels in proportion to its root.
    for row, kl in ((0, expected.kl_patched_clean), (1, expected.kl_clean_patched)):
        limit = 1e-5 * kl + 1e-6 * kl.sqrt() + 1e-12
        assert bool(((found[row] - kl).abs() <= limit).all()), (found[row], kl)
    torch.testing.assert_close(found[2], expected.top1_agrees, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[3], expected.delta_logprob, rtol=1e-5, atol=2e-6)
    assert torch.equal(found[4], expected.top)
    torch.testing.assert_close(found[5], expected.top_logprob, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_logits_are_exactly_zero_apart(kernels: ModuleType, dtype: torch.dtype) -> None:
    clean = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    owner = torch.tensor([0, 1, 1], device=DEVICE)
    found = kernels.compare_rows(clean[owner], kernels.log_softmax_rows(clean), owner, clean.argmax(-1))
    assert found[:4].tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3, [0.0] * 3]
    assert torch.equal(found[4].long(), clean[owner].argmax(-1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_comes_out_as_such(kernels: ModuleType, bad: float) -> None:
    clean = torch.randn(1, 100, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    patched = clean.clone()
    patched[0, 7] = bad
    owner = torch.zeros(1, dtype=torch.long, device=DEVICE)
    found = kernels.compare_rows(patched, kernels.log_softmax_rows(clean), owner, clean.argmax(-1))
    assert not torch.isfinite(found[:2]).all()
