from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fitted import fit
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.solvers import PairedSpectrum, fit_spectrum, identity_scale, unembedding_directions

Normal = Callable[..., Tensor]
Rows = Callable[..., tuple[Tensor, Tensor]]


def penalised_loss(x: Tensor, y: Tensor, weight: Tensor, start: Tensor, ridge: float, gram: Tensor) -> float:
    """‖(T − Xc·D)·G^½‖² + p·‖D·G^½‖², with G = `gram`."""
    xc, yc, d = x - x.mean(0), y - y.mean(0), weight - start
    residual, penalty = yc - xc @ weight, ridge * float((xc**2).sum()) / x.shape[1]
    return float((residual @ gram * residual).sum() + penalty * (d @ gram * d).sum())


@pytest.mark.parametrize("family", ["update", "content"])
@pytest.mark.parametrize("metric", ["identity", "tuned_covariance", "fisher"])
@pytest.mark.parametrize("n", [15, 60])
def test_reduced_rank_is_optimal(rows: Rows, normal: Normal, family: str, metric: str, n: int) -> None:
    """No rank-k neighbour, and no truncation by another route, has a smaller penalised error."""
    (x, y), k, ridge = rows(n, 20), 3, 0.05
    eye, fisher = torch.eye(20, dtype=torch.float64), normal(8, 20)
    start = eye if family == "update" else 0 * eye
    cov = torch.cov(y.mT)
    gram = {
        "identity": eye,
        "tuned_covariance": torch.linalg.inv(0.95 * cov + 0.05 * cov.trace() / 20 * eye),
        "fisher": fisher.mT @ fisher,
    }[metric]
    settings = {"fisher": fisher} if metric == "fisher" else {}
    solution = fit("reduced_rank", x, y, family, ridge=ridge, output_metric=metric, **settings)

    def loss(weight: Tensor) -> float:
        return penalised_loss(x, y, weight, start, ridge, gram)

    best = solution.map(k).dense()
    assert loss(best) < loss(solution.map(k - 1).dense())
    u, s, vh = torch.linalg.svd(best - start)
    left, right = u[:, :k] * s[:k], vh[:k]
    for size in (1e-3, 1e-2, 1e-1, 1.0):
        for _ in range(20):
            nudged = (left + size * normal(20, k)) @ (right + size * normal(k, 20))
            assert loss(start + nudged) >= loss(best) * (1 - 1e-12)
    for solver in ("ridge", "procrustes_scaled", "procrustes"):
        assert loss(fit(solver, x, y, family).map(k).dense()) >= loss(best)


def test_where_the_metric_is_blind_the_size_of_the_fit_decides(rows: Rows, normal: Normal) -> None:
    """A Fisher metric of rank 2 is the limit of one that sees everything a little."""
    (x, y), fisher = rows(15, 10), normal(2, 10)
    eye = torch.eye(10, dtype=torch.float64)
    exact = fit("reduced_rank", x, y, output_metric="fisher", fisher=fisher)
    near = fit("reduced_rank", x, y, output_metric="fisher", fisher=torch.cat([fisher, 1e-6 * eye]))
    for rank in (1, 2, 4, None):
        torch.testing.assert_close(exact.map(rank).dense(), near.map(rank).dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [20, 60])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_planted_update_is_found_with_its_rank(normal: Normal, n: int, rank: int) -> None:
    x, shift = normal(n, 24) + normal(24), normal(24)
    update = normal(24, rank) @ normal(rank, 24) / 5
    y = x + x @ update + shift
    solution = fit("reduced_rank", x, y, "update", ridge=1e-12)
    found = solution.map(rank)
    found.check_rank(rank, "update")
    torch.testing.assert_close(found(x), y, rtol=1e-6, atol=1e-6)
    span = solution.span @ solution.span.mT
    torch.testing.assert_close(
        span @ (found.dense() - torch.eye(24, dtype=torch.float64)), span @ update, rtol=0, atol=1e-6
    )
    errors = [float((solution.map(k)(x) - y).norm()) for k in range(rank + 1)]
    assert all(e > 0.1 for e in errors[:-1])
    assert errors[-1] < 1e-6
    # The content family needs every direction that the rows have for the same edit.
    content = fit("reduced_rank", x, y, "content", ridge=1e-12)
    assert float((content.map(min(n - 2, 23))(x) - y).norm()) > 0.01


@pytest.mark.parametrize("n", [20, 60])
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0, 1.4])
def test_a_planted_scale_is_recovered_and_then_the_rank(normal: Normal, n: int, alpha: float) -> None:
    x, update = normal(n, 24) + normal(24), normal(24, 4) @ normal(4, 24) / 5
    y = alpha * (x + x @ update + normal(24))
    p = PairedSpectrum.from_rows(x, y)
    found = identity_scale(p)
    assert found == pytest.approx(alpha, abs=1e-6)
    m = fit_spectrum("reduced_rank", p.scaled(1 / found), ridge=1e-12).map(4).with_alpha(found)
    torch.testing.assert_close(m(x), y, rtol=1e-5, atol=1e-5)
    span = p.vx @ p.vx.mT
    torch.testing.assert_close(
        span @ (m.dense() - torch.eye(24, dtype=torch.float64)), span @ update, rtol=0, atol=1e-5
    )
    if alpha != 1:
        unscaled = fit_spectrum("reduced_rank", p, ridge=1e-12)
        assert float((unscaled.map(4)(x) - y).norm()) > 0.1


def test_the_scale_of_a_change_of_width_is_refused(rows: Rows) -> None:
    with pytest.raises(MechdiffError, match="needs equal widths, not 6 -> 5; leave alpha"):
        identity_scale(PairedSpectrum.from_rows(*rows(9, 6, 5)))


def test_a_strong_ridge_leaves_the_prior(rows: Rows) -> None:
    x, y = rows(15, 8)
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(fit("ridge", x, y, "update", ridge=1e12).map().dense(), eye, atol=1e-9, rtol=0)
    torch.testing.assert_close(
        fit("ridge", x, y, "content", ridge=1e12).map().dense(), 0 * eye, atol=1e-9, rtol=0
    )


def test_an_untouched_site_needs_no_update(rows: Rows) -> None:
    x, _ = rows(15, 8)
    for solver in ("reduced_rank", "ridge"):
        m = fit(solver, x, x).map()
        torch.testing.assert_close(m.dense(), torch.eye(8, dtype=torch.float64), atol=1e-13, rtol=0)


def test_logit_subspace_leaves_the_rest_to_the_prior(rows: Rows, normal: Normal) -> None:
    (x, y), basis = rows(15, 8), normal(3, 8)
    update = fit("logit_subspace", x, y, "update", basis=basis).map().dense() - torch.eye(
        8, dtype=torch.float64
    )
    outside = torch.linalg.qr(basis.mT, mode="complete").Q[:, 3:]
    torch.testing.assert_close(update @ outside, torch.zeros(8, 5, dtype=torch.float64), atol=1e-12, rtol=0)
    full = fit("ridge", x, y, "update").map().dense() - torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(update @ basis.mT, full @ basis.mT)


def test_unembedding_directions_move_the_logits_most(normal: Normal) -> None:
    e, other = normal(50, 6) * torch.arange(1, 7), normal(50, 6)
    top = unembedding_directions(e, 2)
    torch.testing.assert_close(top @ top.mT, torch.eye(2, dtype=torch.float64))
    best = torch.linalg.svdvals(e)[:2]
    torch.testing.assert_close((e @ top.mT).norm(dim=0), best)
    joint = unembedding_directions(e, 2, other)
    both = torch.cat([e, other])
    torch.testing.assert_close((both @ joint.mT).norm(dim=0), torch.linalg.svdvals(both)[:2])


@pytest.mark.parametrize("q", [0, 7])
def test_unembedding_directions_out_of_range(normal: Normal, q: int) -> None:
    with pytest.raises(MechdiffError, match=f"q is {q}; give a number of directions from 1 to the width 6"):
        unembedding_directions(normal(50, 6), q)
