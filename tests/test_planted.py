"""The planted pair: what is known must be found again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import rows
from mechdiff_mlflow.experiments.workers import LocalWorkers
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.measures.similarity import rho
from mechdiff_mlflow.measures.stats import min_k
from mechdiff_mlflow.models.pairs import Pair, load_pair
from mechdiff_mlflow.models.planted import Plant, operator, plant_in
from mechdiff_mlflow.solvers import PairedSpectrum, fit_spectrum, identity_scale
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position
from mechdiff_mlflow.spec.sites import Hook, Site

RANKS = (1, 2, 3, 4, 5, 8, 16)
TEXT = "planted:attn_out:L14:r4:alpha0.7"
SITE = Site(14, Hook.ATTN_OUT)


@given(
    st.sampled_from([Hook.ATTN_OUT, Hook.MLP_OUT]),
    st.integers(0, 99),
    st.integers(1, 99),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
    st.integers(0, 10**6),
)
def test_parses_its_own_text(hook: Hook, layer: int, rank: int, alpha: float, gain: float, seed: int) -> None:
    plant = Plant(Site(layer, hook), rank, alpha, gain, seed)
    assert Plant.parse(str(plant)) == plant


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("attn_out:14:r4", "is not of the form <hook>:L<layer>:r<rank>"),
        ("attn_out:L14:r0", "planted rank is 0; give at least 1"),
        ("attn_out:L14:r4:alpha0", "planted alpha is 0; give a finite number above 0"),
        ("resid_post:L14:r4", "plant at attn_out or mlp_out"),
        ("resid_pre:L14:r4", "plant at attn_out or mlp_out"),
        ("nose:L14:r4", "Hook 'nose' is unknown"),
    ],
)
def test_bad_plants(text: str, says: str) -> None:
    with pytest.raises(MechdiffError, match=says):
        PairSpec.load(f"planted:{text}")


@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from([Hook.ATTN_OUT, Hook.MLP_OUT]))
def test_a_sublayer_adds_alpha_times_m_of_what_it_added(seed: int, rank: int, hook: Hook) -> None:
    generator = torch.Generator().manual_seed(seed)
    plant = Plant(Site(0, hook), rank, alpha=0.3, gain=5.0, seed=seed)
    sublayer = nn.Module()
    projection = nn.Linear(6, 16, dtype=torch.float64)
    setattr(sublayer, "o_proj" if hook is Hook.ATTN_OUT else "down_proj", projection)
    z = torch.randn(9, 6, dtype=torch.float64, generator=generator)
    before = projection(z)
    m = plant_in(plant, sublayer).dense()
    torch.testing.assert_close(projection(z), 0.3 * before @ m, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.linalg.svdvals(m - torch.eye(16, dtype=torch.float64))[:rank],
        torch.full((rank,), 5.0, dtype=torch.float64),
    )
    assert int(torch.linalg.matrix_rank(m - torch.eye(16, dtype=torch.float64))) == rank


def test_what_cannot_be_planted_is_said() -> None:
    with pytest.raises(MechdiffError, match=r"Rank 5 is too much to plant in 16 dimensions.*at most 4"):
        operator(Plant(Site(0, Hook.ATTN_OUT), 5), torch.eye(16))
    with pytest.raises(MechdiffError, match="Identity does not end in a linear o_proj"):
        plant_in(Plant(Site(0, Hook.ATTN_OUT), 1), nn.Identity())


@pytest.fixture(scope="module")
def planted() -> Pair:
    return load_pair(PairSpec.load(TEXT), dtype="float64")


def recorded(pair: Pair, split: str, sites: list[Site]) -> dict[Site, tuple[torch.Tensor, torch.Tensor]]:
    prompts = pair.prompts_of(split)
    base, tuned = (rows.capture(pair, role, prompts, Position.DECISION, sites) for role in ("base", "tuned"))
    return {site: (base[site], tuned[site]) for site in sites}


def test_the_spec_names_its_pair_and_reads_itself_back(planted: Pair) -> None:
    assert planted.name == "planted-attn_out-L14-r4-alpha0_7"
    spec = planted.spec
    assert PairSpec.parse(spec.to_yaml(), root=spec.root) == spec
    other = load_pair(PairSpec.load(f"{TEXT}:seed1"), dtype="float64")
    assert planted.fingerprint != other.fingerprint
    assert planted.first_changed_layer() == 14


def test_the_change_is_found_where_it_was_planted(planted: Pair) -> None:
    """The first site that differs is the planted one, and only there is the change linear."""
    sites = [Site(layer, hook) for layer in (12, 13, 14, 15, 24) for hook in Hook]
    found = recorded(planted, "train", sites)
    differs = [site for site, (x, y) in found.items() if not torch.equal(x, y)]
    assert differs[0] == SITE
    assert all(site.layer < 14 or site == Site(14, Hook.RESID_PRE) for site in set(sites) - set(differs))
    held_out = recorded(planted, "val", differs)
    rhos = {}
    for site in differs:
        fitted = fit_spectrum("reduced_rank", PairedSpectrum.from_rows(*found[site]), ridge=1e-12).map()
        x, y = held_out[site]
        rhos[site] = rho(x, y, fitted(x))
    at_the_site = rhos.pop(SITE)
    assert at_the_site is not None
    assert at_the_site < 1e-6
    assert all(other is not None and other >= 100 * at_the_site for other in rhos.values())


def test_scale_operator_and_rank_are_recovered(planted: Pair) -> None:
    plant = planted.spec.tuned.plant
    assert plant is not None
    spectrum = PairedSpectrum.from_rows(*recorded(planted, "train", [SITE])[SITE])
    alpha = identity_scale(spectrum)
    assert alpha == pytest.approx(0.7, abs=1e-6)

    solution = fit_spectrum("reduced_rank", spectrum.scaled(1 / alpha), ridge=1e-12)
    weight = planted.base.model.model.layers[14].self_attn.o_proj.weight  # type: ignore[union-attr]
    truth = operator(plant, weight).minus_identity().dense()
    span = spectrum.vx.mT
    difference = span @ (solution.map().weight.minus_identity().dense() - truth)
    assert float(difference.norm() / (span @ truth).norm()) < 1e-6
    assert int(torch.linalg.matrix_rank(solution.map(16).weight.minus_identity().dense(), rtol=1e-6)) == 4

    maps: dict[str, AffineMap] = {str(k): solution.map(k).with_alpha(alpha) for k in RANKS}
    prompts = planted.prompts_of("test", 60)
    scored = LocalWorkers(planted).score(prompts, Position.DECISION, {SITE: maps})[SITE].patched
    least = min_k(
        RANKS,
        scored["raw"].kl_patched_clean_nats,
        [scored[str(k)].kl_patched_clean_nats for k in RANKS],
        target_pct=99.0,
    )
    assert least is not None
    assert (least.k, least.low, least.high) == (4, 4, 4)


def test_a_map_fitted_to_y_itself_has_the_scale_in_its_weight(planted: Pair) -> None:
    """Only α·W can be told from data: without dividing y by α the update is of full rank."""
    spectrum = PairedSpectrum.from_rows(*recorded(planted, "train", [SITE])[SITE])
    as_it_is = fit_spectrum("reduced_rank", spectrum, ridge=1e-12).map()
    divided = fit_spectrum("reduced_rank", spectrum.scaled(1 / 0.7), ridge=1e-12).map().with_alpha(0.7)
    x, _ = recorded(planted, "val", [SITE])[SITE]
    torch.testing.assert_close(as_it_is(x), divided(x), rtol=1e-6, atol=1e-9)
    singular = [torch.linalg.svdvals(m.weight.minus_identity().dense()) for m in (as_it_is, divided)]
    assert float(singular[0].median()) == pytest.approx(0.3, abs=1e-6), "1 − α, in most directions"
    assert float(singular[1][4]) < 1e-6 * float(singular[1][0])
