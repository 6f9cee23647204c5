import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import (
    _validate_logged_model_name,
    _validate_model_alias_name,
    _validate_model_name,
)

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, Rank
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.tracking.content import fields
from mechdiff_mlflow.tracking.content.names import check_alias, check_name, logged_model_name, registered_name

SITE = Site(26, Hook.ATTN_OUT)
TEXT = st.text(max_size=12) | st.text(alphabet="aB1-_./:%@ v", max_size=8)


def test_the_name_says_pair_and_site() -> None:
    assert registered_name("cultural-demo", SITE) == "cultural-demo-L26-attn_out"


@pytest.mark.parametrize(
    "pair", ["meta-llama/Llama", "a:b", "a.b", "a b", "50%", "it's", "", "-x", "x" * 200]
)
def test_pairs_that_cannot_be_names_are_refused(pair: str) -> None:
    with pytest.raises(MechdiffError, match="Maps cannot be registered as"):
        registered_name(pair, SITE)


@given(TEXT)
def test_mlflow_takes_every_name_and_alias_that_we_take(text: str) -> None:
    for ours, theirs in ((check_name, _validate_model_name), (check_alias, _validate_model_alias_name)):
        try:
            ours(text)
        except MechdiffError:
            continue
        theirs(text)


@given(TEXT)
def test_any_run_name_becomes_a_logged_models_name(text: str) -> None:
    _validate_logged_model_name(logged_model_name(text))


@pytest.mark.parametrize("alias", ["latest", "v1", "V12", "3", "a b", "", "a.b", "a/b"])
def test_aliases_that_mean_something_else_are_refused(alias: str) -> None:
    with pytest.raises(MechdiffError, match=r"Alias .* is not possible"):
        check_alias(alias)


def test_run_names_differ_in_what_a_narrow_column_shows() -> None:
    cells = [
        Cell(Site(layer, hook), "procrustes_scaled", "update", Rank(k), Alpha((0.3,)))
        for layer in (4, 24)
        for hook in Hook
        for k in (1, 8, 32, None)
    ]
    assert len({fields._name(cell)[:20] for cell in cells}) == len(cells)
