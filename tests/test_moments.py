import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.moments import PairedMoments


def rows(n: int, d_in: int = 3, d_out: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, dtype=torch.float64, generator=g)
    return x, x[:, :1] + torch.randn(n, d_out, dtype=torch.float64, generator=g)


def assert_moments_of(m: PairedMoments, x: torch.Tensor, y: torch.Tensor) -> None:
    def scatter(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return sum(torch.outer(u - a.mean(0), v - b.mean(0)) for u, v in zip(a, b, strict=True))

    assert m.n == len(x)
    for found, expected in (
        (m.mean_x, x.mean(0)),
        (m.mean_y, y.mean(0)),
        (m.sxx, scatter(x, x)),
        (m.syy, scatter(y, y)),
        (m.sxy, scatter(x, y)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-10)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_any_batching_streams_to_the_same_moments(sizes: list[int], shift: float, seed: int) -> None:
    x, y = rows(sum(sizes), seed=seed)
    x = x + shift
    total: PairedMoments | None = None
    for xb, yb in zip(x.split(sizes), y.split(sizes), strict=True):
        batch = PairedMoments.from_rows(xb, yb)
        total = batch if total is None else total + batch
    assert total is not None
    assert_moments_of(total, x, y)


def test_half_precision_rows_are_summed_in_float64() -> None:
    x, y = (t.bfloat16() for t in rows(50))
    assert_moments_of(PairedMoments.from_rows(x, y), x.double(), y.double())


@pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((3,), (3,)), ((0, 2), (0, 2)), ((2, 3, 4), (2, 3, 4))])
def test_rows_that_are_not_paired_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(MechdiffError, match=r"paired row by row.*give \[n, d\] of both"):
        PairedMoments.from_rows(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_rows_that_are_not_finite_are_counted() -> None:
    x, y = rows(9)
    y[2, 1], y[5] = torch.inf, torch.nan
    with pytest.raises(MechdiffError, match="2 of 9 rows of tuned activations have NaN or infinite entries"):
        PairedMoments.from_rows(x, y)


def test_moments_of_other_widths_do_not_add() -> None:
    with pytest.raises(MechdiffError, match="3 -> 4 dimensions cannot be added to those of 3 -> 5"):
        PairedMoments.from_rows(*rows(2)) + PairedMoments.from_rows(*rows(2, d_out=5))
