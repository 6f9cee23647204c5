from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.solvers import PairedSpectrum

Rows = Callable[..., tuple[Tensor, Tensor]]


@pytest.mark.parametrize("n", [9, 15, 60])
def test_gives_the_rows_back(rows: Rows, n: int) -> None:
    x, y = rows(n, 12, 10)
    p = PairedSpectrum.from_rows(x, y)
    torch.testing.assert_close(p.mean_x + p.ux * p.sx @ p.vx.mT, x)
    torch.testing.assert_close(p.mean_y + p.uy * p.sy @ p.vy.mT, y)
    for axes in (p.ux, p.uy, p.vx, p.vy):
        torch.testing.assert_close(axes.mT @ axes, torch.eye(axes.shape[1], dtype=torch.float64))
    torch.testing.assert_close(p.cross, p.ux.mT @ p.uy)
    assert bool((p.sx.diff() <= 0).all())


@pytest.mark.parametrize("n", [15, 60])
def test_keeps_the_axes_that_the_rows_span(rows: Rows, normal: Callable[..., Tensor], n: int) -> None:
    x, y = rows(n, 12)
    flat = normal(n, 3) @ normal(3, 12)
    p = PairedSpectrum.from_rows(flat, y)
    assert p.vx.shape == (12, 3)
    torch.testing.assert_close(flat @ p.vx @ p.vx.mT, flat)
    assert PairedSpectrum.from_rows(x[:9], y[:9]).vx.shape == (12, 8)


@pytest.mark.parametrize("n", [9, 60])
def test_shuffled_pairs_are_a_product_away(rows: Rows, n: int) -> None:
    x, y = rows(n, 12)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    quick, slow = PairedSpectrum.from_rows(x, y).permuted(order), PairedSpectrum.from_rows(x, y[order])

    def covariance(p: PairedSpectrum) -> Tensor:
        return p.vx * p.sx @ p.cross @ (p.vy * p.sy).mT

    torch.testing.assert_close(covariance(quick), covariance(slow))
    torch.testing.assert_close(
        covariance(quick.permuted(order.argsort()).scaled(2.0)), 2 * covariance_of(x, y)
    )


def covariance_of(x: Tensor, y: Tensor) -> Tensor:
    return (x - x.mean(0)).mT @ (y - y.mean(0))


@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 / 3])
def test_rows_that_do_not_vary_are_refused(rows: Rows, n: int, value: float) -> None:
    x, y = rows(n, 6)
    with pytest.raises(MechdiffError, match=f"base activations are the same on all {n} prompts"):
        PairedSpectrum.from_rows(torch.full_like(x, value), y)
    with pytest.raises(MechdiffError, match=f"tuned activations are the same on all {n} prompts"):
        PairedSpectrum.from_rows(x, torch.full_like(y, value))


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_are_above_zero(rows: Rows, factor: float) -> None:
    with pytest.raises(MechdiffError, match="give a finite factor above 0"):
        PairedSpectrum.from_rows(*rows(9, 3)).scaled(factor)


def test_a_single_prompt_is_refused(rows: Rows) -> None:
    with pytest.raises(MechdiffError, match="cannot be fitted on 1 prompt; give at least 2"):
        PairedSpectrum.from_rows(*rows(1, 3))


@pytest.mark.parametrize("n", [15, 60])
def test_half_precision_rows_are_summed_in_float64(rows: Rows, n: int) -> None:
    x, y = (t.bfloat16() for t in rows(n, 12))
    low, high = PairedSpectrum.from_rows(x, y), PairedSpectrum.from_rows(x.double(), y.double())
    assert torch.equal(low.cross, high.cross)
    assert torch.equal(low.mean_x, high.mean_x)


@pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((3,), (3,)), ((0, 2), (0, 2)), ((2, 3, 4), (2, 3, 4))])
def test_rows_that_are_not_paired_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(MechdiffError, match=r"paired row by row.*give \[n, d\] of both"):
        PairedSpectrum.from_rows(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_rows_that_are_not_finite_are_counted(rows: Rows) -> None:
    x, y = rows(9, 3)
    y[2, 1], y[5] = torch.inf, torch.nan
    with pytest.raises(MechdiffError, match="2 of 9 rows of tuned activations have NaN or infinite entries"):
        PairedSpectrum.from_rows(x, y)
