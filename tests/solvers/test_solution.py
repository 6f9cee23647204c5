from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fitted import fit
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.solvers import SOLVERS, OffSpan

Rows = Callable[..., tuple[Tensor, Tensor]]
RANKED = [row.name for row in SOLVERS.values() if row.ranked and not row.tensors] + ["reduced_rank"]


@pytest.mark.parametrize("solver", RANKED)
@pytest.mark.parametrize("family", ["update", "content"])
def test_high_ranks_are_the_full_fit(rows: Rows, solver: str, family: str) -> None:
    solution = fit(solver, *rows(15, 24), family)
    assert torch.equal(solution.map(24).dense(), solution.map().dense())
    assert torch.equal(solution.map(solution.max_rank).dense(), solution.map().dense())


@pytest.mark.parametrize("solver", ["reduced_rank", "ridge"])
@pytest.mark.parametrize("family", ["update", "content"])
def test_ranks_are_nested(rows: Rows, solver: str, family: str) -> None:
    """D_k is D_{k+1} without its last direction: the row space of one contains the other's."""
    solution = fit(solver, *rows(15, 24), family)
    start = solution.map(0).dense()
    for k in range(1, 6):
        smaller, larger = (solution.map(j).dense() - start for j in (k, k + 1))
        torch.testing.assert_close(
            torch.linalg.pinv(smaller) @ smaller @ torch.linalg.pinv(larger) @ larger,
            torch.linalg.pinv(smaller) @ smaller,
        )


@pytest.mark.parametrize("solver", ["procrustes_scaled", "reduced_rank"])
@pytest.mark.parametrize("family", ["update", "content"])
def test_off_span_rules_agree_on_the_span_and_differ_off_it(rows: Rows, solver: str, family: str) -> None:
    x, y = rows(15, 24)
    solution = fit(solver, x, y, family)
    zero, identity = solution.map(off_span="zero"), solution.map(off_span=OffSpan.NEAREST_IDENTITY)
    torch.testing.assert_close(zero(x), identity(x))
    seen = (x - x.mean(0)).mT
    unseen = torch.linalg.qr(seen, mode="complete").Q[:, 14:].mT  # directions that no row has
    torch.testing.assert_close(zero.weight(unseen), torch.zeros_like(unseen), atol=1e-12, rtol=0)
    torch.testing.assert_close(identity.weight(unseen), unseen, atol=1e-12, rtol=0)
    assert zero.meta["off_span"] == "zero"


def test_rules_are_one_when_the_rows_span_everything(rows: Rows) -> None:
    solution = fit("procrustes_scaled", *rows(60, 24), "content")
    assert solution.spans_all
    assert solution.map(3, "zero").weight == solution.map(3, "nearest_identity").weight


def test_small_ranks_are_kept_as_factors(rows: Rows) -> None:
    solution = fit("reduced_rank", *rows(60, 24))
    assert solution.map(3).weight.right is not None
    assert solution.map(20).weight.right is None  # 24×24 is smaller


@pytest.mark.parametrize("rank", [-1, 25])
def test_ranks_out_of_range(rows: Rows, rank: int) -> None:
    with pytest.raises(
        MechdiffError, match=f"Rank {rank} is out of range .* width 24; give 0 to 24, or full"
    ):
        fit("reduced_rank", *rows(15, 24)).map(rank)


def test_requests_that_contradict_themselves(rows: Rows) -> None:
    with pytest.raises(
        MechdiffError, match=r"the 10 directions .* as zero; use nearest_identity, or the full"
    ):
        fit("ridge", *rows(15, 24), "update").map(3, "zero")
    with pytest.raises(MechdiffError, match="as nearest_identity; use zero, or the full map"):
        fit("ridge", *rows(15, 24), "content").map(3, "nearest_identity")
    with pytest.raises(MechdiffError, match="needs equal widths, not 24 -> 20; use zero"):
        fit("ridge", *rows(15, 24, 20), "content").map(None, "nearest_identity")
    with pytest.raises(MechdiffError, match="'both' is unknown; use one of zero, nearest_identity"):
        fit("ridge", *rows(15, 24)).map(None, "both")
    with pytest.raises(MechdiffError, match="mean_shift has no maps of rank 3; leave the rank out"):
        fit("mean_shift", *rows(15, 24)).map(3)
