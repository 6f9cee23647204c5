import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content.records import (
    RunRecord,
    check_key,
    param_text,
)


@given(st.text(max_size=12) | st.text(alphabet="ab/.-_ α%:=()@", max_size=8))
def test_keys_that_pass_are_keys_that_mlflow_takes(key: str) -> None:
    try:
        check_key(key)
    except MechdiffError:
        return
    try:
        for validate in (_validate_metric_name, _validate_param_name, _validate_tag_name):
            validate(key)
    except MlflowException as error:
        pytest.fail(f"MLflow refuses {key!r}: {error}")


@pytest.mark.parametrize(
    "key", ["drop%", "a=b", "f(x)", "p@1", "a:b", "", "a//b", "../a", "/a", "a/", "x" * 251]
)
def test_bad_keys_are_refused_before_any_call(key: str) -> None:
    with pytest.raises(MechdiffError):
        RunRecord(kind="fit", name="x", metrics={key: 1.0})


@pytest.mark.parametrize("key", ["KL_raw", "ci/drop_pct_low", "α", "time/fit.s", "top-1 agreement"])
def test_the_names_we_use_are_accepted(key: str) -> None:
    check_key(key)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.3, "0.3"), (1, "1"), (True, "true"), (np.float64(0.1), "0.1"), (np.int64(8), "8"), ("full", "full")],
)
def test_params_are_stored_in_their_shortest_exact_form(value: object, text: str) -> None:
    assert param_text("p", value) == text


@pytest.mark.parametrize("value", [None, "", [1, 2], {"a": 1}])
def test_params_without_a_plain_value_are_refused(value: object) -> None:
    with pytest.raises(MechdiffError, match=r"'p' is .*leave the key out"):
        RunRecord(kind="fit", name="x", params={"p": value})  # type: ignore[dict-item]


def test_long_descriptions_are_refused_rather_than_cut() -> None:
    with pytest.raises(MechdiffError, match="8001 characters and MLflow keeps 8000"):
        RunRecord(kind="fit", name="x", description="x" * 8001)
