import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.metrics import NextToken, compare_rows, next_token_divergences, rounding_kl


def reference_kl(p_logits: Tensor, q_logits: Tensor) -> float:
    """KL of one pair of rows from the definition, in extended precision."""
    p, q = (np.asarray(x.double().numpy(), dtype=np.longdouble) for x in (p_logits, q_logits))
    log_p, log_q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (p, q))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def logits(seed: int, vocabulary: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(3, vocabulary, generator=generator, dtype=torch.float64) * scale).to(dtype)


@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(2, 300),
    scale=st.sampled_from([0.1, 1.0, 10.0, 200.0]),
    size=st.sampled_from([1e-5, 1e-3, 0.1, 1.0, 50.0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_divergences_are_those_of_the_definitions(
    seed: int, vocabulary: int, scale: float, size: float, dtype: torch.dtype
) -> None:
    clean = logits(seed, vocabulary, scale, dtype)
    patched = (clean.double() + logits(seed + 1, vocabulary, size, torch.float64)).to(dtype)
    found = next_token_divergences(patched, clean)
    size = max(float(clean.abs().max()), float(patched.abs().max()), 10.0)
    for row in range(3):
        for kl, p, q in (
            (found.kl_patched_clean[row], patched[row], clean[row]),
            (found.kl_clean_patched[row], clean[row], patched[row]),
        ):
            # Log-probabilities of size |log p| are rounded to 1e-16 |log p|.
            assert float(kl) == pytest.approx(reference_kl(p, q), rel=1e-12, abs=1e-15 * size)
            assert kl >= 0


def test_tiny_divergences_keep_their_digits_in_float32() -> None:
    clean = logits(0, 5000, 3.0)
    patched = clean + 1e-4 * logits(1, 5000, 1.0)
    found = next_token_divergences(patched, clean).kl_patched_clean
    true = [reference_kl(p, q) for p, q in zip(patched, clean, strict=True)]
    assert max(true) < 1e-8
    assert found.tolist() == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identical_logits_are_exactly_zero_apart(dtype: torch.dtype) -> None:
    clean = logits(0, 1000, 5.0, dtype)
    found = next_token_divergences(clean.repeat(40, 1), clean.repeat(40, 1))
    assert (found.kl_patched_clean == 0).all()
    assert (found.kl_clean_patched == 0).all()
    assert (found.delta_logprob == 0).all()
    assert (found.top1_agrees == 1).all()


def test_disjoint_certainties_stay_finite() -> None:
    clean, patched = torch.tensor([[500.0, 0.0, 0.0]]), torch.tensor([[0.0, 500.0, 0.0]])
    found = next_token_divergences(patched, clean)
    assert found.kl_patched_clean.item() == pytest.approx(500)
    assert found.kl_clean_patched.item() == pytest.approx(500)
    assert found.delta_logprob.item() == pytest.approx(-500)
    assert found.top1_agrees.item() == 0


def test_top_token_by_hand() -> None:
    clean = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5]])
    patched = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.0, 0.5]])
    found = next_token_divergences(patched, clean)
    assert found.top1_agrees.tolist() == [1.0, 0.0]
    expected = torch.log_softmax(patched, -1)[[0, 1], [0, 1]] - torch.log_softmax(clean, -1)[[0, 1], [0, 1]]
    assert torch.allclose(found.delta_logprob, expected.double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("patched", "clean", "agreement"),
    [
        ([1.0, 1.0], [0.0, 1.0], 1 / 2),
        ([7.0, 7.0, 7.0, 7.0], [0.0, 1.0, 0.5, 0.0], 1 / 4),  # a dead patch has no top token
        ([0.0, 1.0, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0], 1 / 4),
        ([2.0, 2.0, 2.0, 0.0], [0.0, 3.0, 3.0, 3.0], 2 / 4),
        ([2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 3.0], 0),
        ([4.0, 4.0, 0.0, 0.0], [3.0, 3.0, 1.0, 0.0], 1),
    ],
)
def test_ties_agree_as_far_as_they_are_shared(
    dtype: torch.dtype, patched: list[float], clean: list[float], agreement: float
) -> None:
    found = next_token_divergences(torch.tensor([patched], dtype=dtype), torch.tensor([clean], dtype=dtype))
    assert found.top1_agrees.item() == agreement


def test_clean_logits_broadcast_and_rows_know_their_prompt() -> None:
    clean, patched = logits(0, 50, 1.0), logits(1, 50, 1.0)
    grid = next_token_divergences(
        patched[None], clean[:, None]
    ).kl_patched_clean  # every patched, every clean
    assert grid.shape == (3, 3)
    owner = torch.tensor([0, 0, 1, 2, 2])
    rows = compare_rows(patched[[0, 1, 2, 0, 1]], NextToken.of(clean), owner).kl_patched_clean
    assert torch.equal(rows, grid[owner, [0, 1, 2, 0, 1]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["patched", "clean"])
def test_logits_that_are_not_finite_are_refused(bad: float, which: str) -> None:
    good, broken = logits(0, 10, 1.0), logits(0, 10, 1.0)
    broken[1, 3] = bad
    pair = (broken, good) if which == "patched" else (good, broken)
    with pytest.raises(
        MechdiffError, match=f"The {which} logits hold NaN or infinite values; load the model in"
    ):
        next_token_divergences(*pair)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_rounding_leaves_is_what_random_rounding_gives(dtype: torch.dtype) -> None:
    clean = logits(0, 300, 4.0, torch.float64)[:1]
    ulp = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(clean.abs())))
    generator = torch.Generator().manual_seed(1)
    runs = [clean + (torch.rand(2000, 300, generator=generator).double() - 0.5) * ulp for _ in range(2)]
    found = float(rounding_kl(clean.to(dtype)))
    measured = float(next_token_divergences(*runs).kl_patched_clean.mean())
    if dtype is torch.float64:  # where all that is left is what the sum itself loses
        assert measured <= found < 1e-14
    else:
        assert found == pytest.approx(measured, rel=0.1)
