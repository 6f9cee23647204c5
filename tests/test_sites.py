import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Hook, Site

SITES = st.builds(Site, st.integers(0, 999_999), st.sampled_from(list(Hook)))


@given(SITES)
def test_parse_inverts_str(site: Site) -> None:
    assert Site.parse(str(site)) == site
    assert Site.parse(site.slug) == site


@pytest.mark.parametrize("text", ["26/attn_out", "L26", "L-1/attn_out", "Lx/attn_out", "L1.5/attn_out", ""])
def test_malformed_sites_say_the_form(text: str) -> None:
    with pytest.raises(MechdiffError, match=r"write e\.g\. L26/attn_out"):
        Site.parse(text)


def test_unknown_hook_lists_the_hooks() -> None:
    with pytest.raises(MechdiffError, match="use one of resid_pre, attn_out, mlp_out, resid_post"):
        Site.parse("L26/attention")


def test_negative_layer_is_refused() -> None:
    with pytest.raises(MechdiffError, match="counted from 0"):
        Site(-1, Hook.ATTN_OUT)
