from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.similarity import (
    centred_cosines,
    debiased_cka,
    explained_variance,
    rho,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_hsic(x: Tensor, y: Tensor) -> float:
    """The U-statistic of Song et al. summed over quadruples of different prompts."""
    n, total, count = len(x), 0.0, 0
    k, l = x @ x.mT, y @ y.mT  # noqa: E741
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]))
                        count += 1
    return total / count


@given(st.integers(0, 20))
def test_cka_is_the_ratio_of_u_statistics(seed: int) -> None:
    x = normal(6, 3, seed=seed)
    y = x @ normal(3, 4, seed=seed + 1) + 0.5 * normal(6, 4, seed=seed + 2)
    own = slow_hsic(x, x), slow_hsic(y, y)
    found = debiased_cka(x + 7, y - 2)
    if min(own) <= 0:
        assert found is None
    else:
        assert found == pytest.approx(slow_hsic(x, y) / (own[0] * own[1]) ** 0.5, rel=1e-8)


def test_cka_of_a_turned_stretched_and_shifted_copy_is_one() -> None:
    x, turn = normal(30, 50), torch.linalg.qr(normal(50, 50, seed=1)).Q
    assert debiased_cka(x, 3 * x @ turn + 5) == pytest.approx(1.0)


def test_cka_of_unrelated_rows_is_about_zero_even_when_they_are_few() -> None:
    found = [debiased_cka(normal(30, 200, seed=s), normal(30, 200, seed=s + 100)) for s in range(20)]
    mean = sum(f for f in found if f is not None) / len(found)
    assert abs(mean) < 0.05  # the biased estimate is 0.87 here


def test_cka_of_constant_rows_is_undefined() -> None:
    assert debiased_cka(torch.full((5, 3), 0.1), normal(5, 3)) is None
    assert debiased_cka(normal(5, 3), torch.zeros(5, 3)) is None


def test_rho_is_what_is_left_of_the_change() -> None:
    x, y = normal(9, 4), normal(9, 4, seed=1)
    assert rho(x, y, x) == 1.0
    assert rho(x, y, y) == 0.0
    assert rho(x, y, y + 0.25 * (y - x)) == pytest.approx(0.25)
    assert rho(x, x, y) is None


def test_cosines_are_of_what_differs_from_the_mean() -> None:
    mean = torch.tensor([10.0, 10.0])
    y = mean + torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    mapped = mean + torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 1.0], [1.0, 0.0]])
    found = centred_cosines(y, mapped, mean)
    torch.testing.assert_close(
        found, torch.tensor([1.0, 0.0, -(0.5**0.5), torch.nan]).double(), equal_nan=True
    )


def test_explained_variance_is_one_for_y_and_zero_for_its_mean() -> None:
    y = normal(9, 4) + 3
    assert explained_variance(y, y) == 1.0
    assert explained_variance(y, y.mean(0).expand(9, 4)) == pytest.approx(0.0)
    assert explained_variance(torch.full((7, 2), 0.1), normal(7, 2)) is None


def test_mistakes() -> None:
    x = normal(5, 3)
    with pytest.raises(MechdiffError, match="needs at least 4 prompts, not 3"):
        debiased_cka(x[:3], x[:3])
    with pytest.raises(MechdiffError, match="one width, not 3, 4 and 4"):
        rho(x, normal(5, 4), normal(5, 4))
    with pytest.raises(MechdiffError, match="paired row by row"):
        explained_variance(x, x[:4])
