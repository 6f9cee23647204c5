"""A claim is made only where its interval allows it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mechdiff_mlflow.measures.bootstrap import Interval
from mechdiff_mlflow.report import wording
from mechdiff_mlflow.report.evidence import Conditions, Measured
from mechdiff_mlflow.spec.sites import Site

PATCH = Measured(
    run_id="r",
    parent_id=None,
    source="run",
    site=Site.parse("L26/attn_out"),
    solver="procrustes_scaled",
    family="update",
    k=None,
    alpha=0.3,
    conditions=Conditions("test", 150, 450, 0, "decision", "float32"),
    kl_raw=2.0,
    kl_mapped=1.0,
    noise_floor=1e-9,
    rho=0.5,
    drop=Interval(50.0, 40.0, 60.0, 0.95),
    skill=Interval(30.0, 20.0, 40.0, 0.95),
    null="mean_only",
    controls={"mean_only": 1.4},
    leak=False,
    undefined={},
    settings="shrink=0.05",
    p_permutation=None,
    asked_alpha="auto",
)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "yields **50.0 %** KL drop [40.0, 60.0], skill 30.0 [20.0, 40.0] % over the best control"),
        ({"drop": Interval(-20.0, -30.0, -5.0, 0.95)}, "is **not** linearly transportable"),
        ({"drop": Interval(4.0, -3.0, 9.0, 0.95)}, "no evidence of transport"),
        ({"skill": Interval(4.0, -3.0, 9.0, 0.95)}, "the control may do as well"),
        ({"skill": Interval(-9.0, -13.0, -2.0, 0.95)}, "the control does better"),
        ({"kl_raw": 0.0001, "kl_mapped": 0.00005}, "so the drop says little"),
        ({"drop": None, "undefined": {"drop_pct": "below noise floor: x"}}, "below noise floor: x"),
    ],
)
def test_transport(changes: dict[str, object], says: str) -> None:
    sentence = wording.transport(replace(PATCH, **changes))  # type: ignore[arg-type]
    assert says in sentence
    assert ("yields" in sentence) == (says.startswith(("yields", "the control")))


def test_scale_is_spoken_of_only_where_val_chose_it() -> None:
    assert wording.scale(replace(PATCH, asked_alpha="0.3")) is None
    assert "smaller" in str(wording.scale(PATCH))
    assert "edge of the grid" in str(wording.scale(replace(PATCH, asked_alpha="0.3,1")))
    assert "larger" in str(wording.scale(replace(PATCH, alpha=1.6, asked_alpha="0.3,1.6,2")))


AT_32 = replace(PATCH, k=32)
ROW = {
    "site": "L26/attn_out", "solver": "procrustes_scaled", "family": "update",
    "alpha": 0.3, "target_pct": 30.0, "width": 128,
    "k": 8, "low": 8, "high": 32, "p_reached": 0.99, "conservative_k": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "supports **low-rank control**"),
        ({"conservative_k": 33}, "that is not k ≪ d"),
        ({"conservative_k": None}, "not sure enough"),
        ({"conservative_k": float("nan")}, "not sure enough"),
        ({"k": None, "low": None, "high": None}, "**not reached** at any tested rank"),
        ({"k": 128, "high": None}, "k=full"),
    ],
)
def test_low_rank(changes: dict[str, object], says: str) -> None:
    assert says in wording.low_rank({**ROW, **changes}, [PATCH, AT_32], 0.25)


def test_a_low_rank_that_a_control_matches_is_no_control() -> None:
    unskilled = replace(AT_32, skill=Interval(3.0, -4.0, 9.0, 0.95))
    assert "no evidence of control" in wording.low_rank(ROW, [PATCH, unskilled], 0.25)
    assert "says little" in wording.low_rank(ROW, [replace(AT_32, kl_raw=0.001)], 0.25)
    assert "no evidence of control" in wording.low_rank(ROW, [PATCH], 0.25), "nor one that was not patched"
