from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fitted import fit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mechdiff_mlflow.solvers import PairedSpectrum
from mechdiff_mlflow.solvers.procrustes import ShrunkCovariance

Normal = Callable[..., Tensor]


@given(st.integers(2, 12), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_shrinkage_keeps_the_trace(n: int, d: int, shrink: float, seed: int) -> None:
    rows = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    p = PairedSpectrum.from_rows(rows, rows)
    cov = ShrunkCovariance.of(p.n, p.sx, p.vx, shrink)
    trace = float(cov.on_axes.sum()) + cov.off_axes * (d - p.vx.shape[1])
    assert trace == pytest.approx(float(rows.var(0).sum()))


def test_shrinkage_leaves_the_identity_alone() -> None:
    cov = ShrunkCovariance.of(10, torch.full((4,), 6.0), torch.eye(4), shrink=0.3)
    torch.testing.assert_close(cov.on_axes, torch.full((4,), 4.0))


@pytest.mark.parametrize("n", [8, 40])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_a_planted_rotation_comes_back(normal: Normal, n: int, scale: float) -> None:
    x, turn, shift = normal(n, 12), torch.linalg.qr(normal(12, 12)).Q, normal(12)
    y = scale * x @ turn + shift
    torch.testing.assert_close(fit("procrustes_scaled", x, y, shrink=1.0).map()(x), y)
    if scale == 1:
        torch.testing.assert_close(fit("procrustes", x, y).map()(x), y)
    if n == 40:
        torch.testing.assert_close(fit("procrustes_scaled", x, y, shrink=1.0).map().dense(), scale * turn)


@pytest.mark.parametrize("rank", [1, 3, None])
def test_the_scale_of_each_rank_is_the_best_one(normal: Normal, rank: int | None) -> None:
    """The whitened error is least at s_k: the predecessor gave every rank the scale of the full map."""
    x = normal(40, 8) @ normal(8, 8)
    y = x @ normal(8, 8) + normal(40, 8)
    m = fit("procrustes_scaled", x, y, "content", shrink=0.0).map(rank)
    colour = torch.linalg.cholesky(torch.cov(y.mT)).inverse().mT  # any C_t^−½ gives the same norm

    def error(scale: float) -> float:
        return float((((y - y.mean(0)) - scale * (x - x.mean(0)) @ m.dense()) @ colour).norm())

    assert error(1.0) < min(error(0.999), error(1.001))


def test_axes_that_do_not_covary_are_not_turned_at_random(normal: Normal) -> None:
    x = normal(40, 6)
    y = torch.cat([x[:, :2], normal(40, 4)], dim=1)
    y[:, 2:] -= (x - x.mean(0)) @ torch.linalg.lstsq(x - x.mean(0), y[:, 2:] - y[:, 2:].mean(0)).solution
    m = fit("procrustes", x, y, "content")
    assert m.max_rank == 2
    m.map().check_rank(2, "content")


def test_the_planes_of_a_rotation_are_not_split(normal: Normal) -> None:
    """Q − I has its singular values in pairs: a rank of 1 has no first direction to take."""
    planes = torch.zeros(6, 6, dtype=torch.float64)
    planes[0, 1], planes[2, 3] = 1.0, 0.3
    axes, x = torch.linalg.qr(normal(6, 6)).Q, normal(40, 6)
    turn = torch.linalg.matrix_exp(axes @ (planes - planes.mT) @ axes.mT)
    solution = fit("procrustes", x, x @ turn, "update")
    assert [solution.map(k).weight_rank("update") for k in range(6)] == [0, 0, 2, 2, 4, 4]
    torch.testing.assert_close(solution.map(4).dense(), turn)


@pytest.mark.parametrize("n", [24, 25, 28, 31, 32])
@pytest.mark.parametrize("decades", [0, 5])
@pytest.mark.parametrize("family", ["content", "update"])
def test_the_order_of_the_rows_does_not_matter(normal: Normal, n: int, decades: int, family: str) -> None:
    """Without shrinkage, n−1 < 2d rows of any spectrum leave 2d − (n−1) singular values equal."""
    d = 16
    spread = torch.logspace(0, -decades, d, dtype=torch.float64)
    x, y = (normal(n, d) * spread @ torch.linalg.qr(normal(d, d)).Q for _ in range(2))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    one, other = (
        fit("procrustes_scaled", *rows, family, shrink=0.0) for rows in ((x, y), (x[order], y[order]))
    )
    for k in [*range(d), None]:
        torch.testing.assert_close(one.map(k)(x), other.map(k)(x), rtol=0, atol=1e-6)
    if family == "content":  # and the ties are as many as the dimensions say: no rank below can be had
        shared = max(2 * d - (n - 1), 1)
        assert one.factors.cuts[:shared] == (0,) * shared
        assert one.factors.cuts[shared] == shared
