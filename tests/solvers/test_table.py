"""Every solver of the table against its definition written with d×d matrices, and what users may not ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from fitted import fit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.dense_reference import dense_weight
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.protocol import Protocol
from mechdiff_mlflow.experiments.requests import SweepRequest
from mechdiff_mlflow.maps.affine import Family
from mechdiff_mlflow.solvers import SETTINGS, SOLVERS, PairedSpectrum, Setting, Settings, fit_spectrum

G = torch.Generator().manual_seed(7)
VARIANTS: dict[str, list[dict[str, object]]] = {
    "procrustes_scaled": [{}, {"shrink": 1.0}],
    "procrustes": [{}],
    "reduced_rank": [
        {},
        {"ridge": 0.3},
        {"output_metric": "tuned_covariance", "shrink": 0.2},
        {"output_metric": "fisher", "fisher": torch.randn(40, 24, dtype=torch.float64, generator=G)},
    ],
    "ridge": [{}, {"ridge": 0.0}],
    "logit_subspace": [{"basis": torch.randn(5, 24, dtype=torch.float64, generator=G)}],
    "mean_shift": [{}],
    "identity": [{}],
}


CASES = [
    pytest.param(solver.name, family, settings, id=f"{solver.name}-{family}-{i}")
    for solver in SOLVERS.values()  # KeyError here: a new solver needs a row in VARIANTS and in DENSE
    for family in solver.families
    for i, settings in enumerate(VARIANTS[solver.name])
]


@pytest.mark.parametrize(("solver", "family", "settings"), CASES)
@pytest.mark.parametrize("n", [15, 30, 60])
@pytest.mark.parametrize("d_in", [20, 24, 30])
def test_equals_its_definition(
    rows: Callable[..., tuple[Tensor, Tensor]],
    solver: str,
    family: Family,
    settings: dict[str, object],
    n: int,
    d_in: int,
) -> None:
    if family is Family.UPDATE:
        d_in = 24
    x, y = rows(n, d_in, 24)
    solution = fit(solver, x, y, family, **settings)
    requests = [(None, "zero"), (None, "nearest_identity")] if d_in == 24 else [(None, "zero")]
    if SOLVERS[solver].ranked:
        natural = "zero" if family is Family.CONTENT else "nearest_identity"
        requests += [(rank, natural) for rank in (0, 1, 2, 3, 8, 17, 20)]
    for rank, off_span in requests:
        found = solution.map(rank, off_span).dense()
        expected = dense_weight(solver, x, y, str(family), rank, off_span, **settings)
        assert torch.linalg.norm(found - expected) <= 1e-11 * torch.linalg.norm(expected), (rank, off_span)


@pytest.mark.parametrize(("solver", "family", "settings"), CASES)
def test_maps_claim_their_rank_truly_and_say_where_they_come_from(
    rows: Callable[..., tuple[Tensor, Tensor]], solver: str, family: Family, settings: dict[str, object]
) -> None:
    x, y = rows(15, 24)
    solution = fit(solver, x, y, family, **settings)
    for rank in (0, 1, 3, 14, 24) if SOLVERS[solver].ranked else ():
        m = solution.map(rank)
        m.check_rank(rank, family)
        assert m.meta["rank"] == rank
    meta = solution.map().meta
    assert (meta["solver"], meta["family"], meta["n_rows"], meta["span_rank"]) == (solver, family, 15, 14)
    for setting in SOLVERS[solver].settings:
        assert meta[setting.name] == settings.get(setting.name, setting.default)


@pytest.mark.parametrize(("solver", "family", "settings"), CASES)
@pytest.mark.parametrize("n", [15, 60])
def test_turning_the_axes_turns_the_map(
    rows: Callable[..., tuple[Tensor, Tensor]],
    normal: Callable[..., Tensor],
    solver: str,
    family: Family,
    settings: dict[str, object],
    n: int,
) -> None:
    x, y = rows(n, 24)
    turn = torch.linalg.qr(normal(24, 24)).Q
    turned = {k: v @ turn if isinstance(v, Tensor) else v for k, v in settings.items()}
    one, other = fit(solver, x, y, family, **settings), fit(solver, x @ turn, y @ turn, family, **turned)
    requests: list[tuple[int | None, str | None]] = [(None, "zero"), (None, "nearest_identity")]
    if SOLVERS[solver].ranked:
        requests += [(1, None), (5, None)]
    for request in requests:
        expected = turn.mT @ one.map(*request).dense() @ turn
        torch.testing.assert_close(other.map(*request).dense(), expected, rtol=0, atol=1e-9)


@given(
    st.sampled_from([(row.name, f) for row in SOLVERS.values() for f in row.families]),
    st.integers(2, 14),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 999),
)
def test_sites_of_any_shape(which: tuple[str, Family], n: int, d_in: int, d_out: int, seed: int) -> None:
    (solver, family), g = which, torch.Generator().manual_seed(seed)
    d_out = d_in if family is Family.UPDATE else d_out
    x, y, basis = (
        torch.randint(-3, 4, (m, d), generator=g).double() for m, d in ((n, d_in), (n, d_out), (1, d_out))
    )
    x[0], y[0], basis[0, 0] = 9, -9, 1  # whole numbers repeat and align; these make sure that they vary
    settings: dict[str, object] = {"basis": basis} if solver == "logit_subspace" else {}
    solution = fit(solver, x, y, family, **settings)
    for rank in [None, *range(min(d_in, d_out) + 1)] if SOLVERS[solver].ranked else [None]:
        m = solution.map(rank)
        assert bool(torch.isfinite(m(x)).all())
        if rank is not None:
            m.check_rank(rank, family)


def test_one_spectrum_serves_every_solver(rows: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x, y = rows(15, 24)
    spectrum = PairedSpectrum.from_rows(x, y)
    for solver in ("procrustes_scaled", "reduced_rank"):
        assert fit_spectrum(solver, spectrum).map(3) == fit(solver, x, y).map(3)


# What users may not ask


@pytest.mark.parametrize(
    ("solver", "settings", "message"),
    [
        ("svd", {}, "Solver 'svd' is unknown; use one of procrustes_scaled, reduced_rank, "),
        ("reduced_rank", {"family": "rows"}, "Family 'rows' is unknown; use one of update, content"),
        ("mean_shift", {"family": "content"}, "mean_shift has no content family; use update"),
        ("ridge", {"ridge": -0.1}, "ridge is -0.1; give a number from 0 up"),
        ("ridge", {"ridge": float("inf")}, "ridge is inf; give a number"),
        ("ridge", {"ridge": float("nan")}, "ridge is nan; give a number"),
        ("ridge", {"ridge": "big"}, "ridge is 'big'; give a number"),
        ("procrustes_scaled", {"shrink": 1.1}, "shrink is 1.1; give a number from 0 to 1"),
        ("reduced_rank", {"output_metric": "l1"}, "output_metric is 'l1'; use one of identity, tuned_cov"),
        (
            "reduced_rank",
            {"output_metric": "tuned_covariance", "shrink": 0},
            "has rank 4 in 6 dimensions, so the output metric tuned_covariance needs a shrink above 0",
        ),
    ],
)
def test_mistakes_say_what_is_allowed(
    rows: Callable[..., tuple[Tensor, Tensor]], solver: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(MechdiffError, match=message):
        fit(solver, *rows(5, 6), **settings)  # type: ignore[arg-type]


def test_update_of_another_width_names_the_solvers_that_can(
    rows: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    with pytest.raises(MechdiffError, match="not 6 -> 5; use family content with one of procrustes_scaled"):
        fit("ridge", *rows(9, 6, 5))


def test_the_settings_of_all_solvers_are_listed_once_with_their_defaults() -> None:
    assert {s.name: s.kind.text(s.default) for s in SETTINGS} == {
        "shrink": "0.05",
        "ridge": "0.01",
        "output_metric": "identity",
        "directions": "16",
        "unembedding": "tuned",
        "off_span": "auto",
        "alpha_fit": "after",
    }
    assert Protocol() == Protocol(**{s.name: s.default for s in SETTINGS})
    assert {field.name for field in fields(Settings)} == {s.name for s in SETTINGS}
    assert {s.name for s in SETTINGS} <= SweepRequest.options().keys()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_the_text_of_a_setting_reads_as_its_value(setting: Setting) -> None:
    typed = setting.words or [str(setting.default), "1"]
    kind = setting.kind
    assert all(kind.text(kind.read(text)) == text for text in typed)
    assert all(setting.checked(kind.read(text)) == kind.read(text) for text in typed)
    assert kind.read(kind.text(setting.default)) == setting.default


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("shrink", "much", "--shrink 'much' is not a number; pass e.g. 0.05."),
        ("shrink", "nan", "--shrink 'nan' is not a number; pass e.g. 0.05."),
        ("shrink", "1.5", "shrink is 1.5; give a number from 0 to 1."),
        ("ridge", "-1", "ridge is -1.0; give a number from 0 up."),
        ("directions", "1.5", "directions is 1.5; give a whole number from 1 to 100000."),
        ("directions", "0", "directions is 0; give a whole number from 1 to 100000."),
        (
            "output_metric",
            "l1",
            "--output-metric 'l1' is unknown; use one of identity, tuned_covariance, fisher.",
        ),
        ("off_span", "random", "--off-span 'random' is unknown; use one of auto, zero, nearest_identity."),
    ],
)
def test_a_text_that_is_no_value_of_a_setting_says_what_is(name: str, text: str, message: str) -> None:
    setting = next(s for s in SETTINGS if s.name == name)
    with pytest.raises(MechdiffError) as refused:
        setting.kind.read(text)
    assert str(refused.value) == message
