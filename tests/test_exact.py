"""Numbers as text: whatever is written reads as the very same number."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.sweep import SweepSite
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, Rank
from mechdiff_mlflow.spec.plant import Plant
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.text import number_in, text_of
from mechdiff_mlflow.tracking.content.records import check_key, param_text

FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALES = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
SITES = st.builds(Site, st.integers(0, 999_999), st.sampled_from(Hook))


@given(FINITE)
def test_every_finite_number_reads_as_what_was_written(value: float) -> None:
    assert number_in(text_of(value)) == value == float(param_text("x", value))
    check_key(f"min_k/L3-attn_out alpha {text_of(value)}")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.3, "0.3"), (1.0, "1"), (1e-7, "1e-07"), (0.1234567, "0.1234567"), (1e22, "1e22"), (0, "0")],
)
def test_numbers_are_written_as_people_do(value: float, text: str) -> None:
    assert text_of(value) == text


@pytest.mark.parametrize("text", ["", "abc", "1_0", "٣", "0.3;"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a number|could not convert"):
        number_in(text)


@given(st.lists(SCALES, min_size=1, max_size=5, unique=True).map(sorted))
def test_scales_and_grids_parse_their_own_text(values: list[float]) -> None:
    assert Alpha.parse(str(Alpha(tuple(values)))).values == tuple(values)


@given(SCALES)
def test_neighbouring_scales_stay_two(value: float) -> None:
    above = math.nextafter(value, math.inf)
    if math.isfinite(above):
        assert len(Alpha.parse(str(Alpha((value, above)))).values) == 2
        site, rank = Site(3, Hook.ATTN_OUT), Rank(None)
        cells = [Cell(site, "ridge", "update", rank, Alpha((a,))) for a in (value, above)]
        assert len(set(map(str, cells))) == 2


@given(SITES, st.one_of(st.none(), SCALES))
def test_sites_of_a_sweep_parse_their_own_text(site: Site, alpha: float | None) -> None:
    assert Site.parse(str(site)) == Site.parse(site.slug) == site
    assert SweepSite.parse(str(SweepSite(site, alpha))) == SweepSite(site, alpha)


POSITIVE = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)


@given(POSITIVE, POSITIVE, st.integers(1, 999_999), st.integers(0, 999_999_999))
def test_plants_parse_their_own_text(alpha: float, gain: float, rank: int, seed: int) -> None:
    plant = Plant(Site(3, Hook.MLP_OUT), rank, alpha, gain, seed)
    assert Plant.parse(str(plant)) == plant


@pytest.mark.parametrize("text", ["1_0", "٨", "1" * 5000, "8.0", " 8"])
def test_ranks_are_plain_whole_numbers(text: str) -> None:
    with pytest.raises(MechdiffError, match="is not a whole number") as caught:
        Rank.parse(text)
    assert len(str(caught.value)) < 200
