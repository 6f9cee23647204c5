import json
import math

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from mechdiff_mlflow.tracking.content.artifacts import table_json

_CELLS = st.one_of(
    st.floats(), st.integers(-(2**40), 2**40), st.booleans(), st.text(max_size=5), st.none(), st.just(pd.NA)
)


def _slow(value: object) -> object:
    """A cell as JSON holds it, looked at by itself."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


@given(
    mixed=st.lists(_CELLS, min_size=3, max_size=3),
    floats=st.lists(st.floats(width=32), min_size=3, max_size=3),
    whole=st.lists(st.integers(-(2**40), 2**40), min_size=3, max_size=3),
    flags=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_tables_keep_every_digit_of_every_kind_of_column(
    mixed: list[object], floats: list[float], whole: list[int], flags: list[bool]
) -> None:
    table = pd.DataFrame(
        {
            "mixed": pd.Series(mixed, dtype=object),
            "floats": floats,
            "single": pd.Series(floats, dtype=np.float32),
            "whole": whole,
            "flags": flags,
            "nullable": pd.array([1, None, 3], dtype="Int64"),
        }
    )
    stored = json.loads(table_json(table))
    assert stored["columns"] == list(table.columns)
    assert stored["data"] == [[_slow(v) for v in row] for row in table.itertuples(index=False, name=None)]


def test_empty_tables_are_tables() -> None:
    assert json.loads(table_json(pd.DataFrame())) == {"columns": [], "data": []}
    assert json.loads(table_json(pd.DataFrame(columns=["a", "b"]))) == {"columns": ["a", "b"], "data": []}
    twice = pd.DataFrame([[1, "x"]], columns=["a", "a"])
    assert json.loads(table_json(twice)) == {"columns": ["a", "a"], "data": [[1, "x"]]}
