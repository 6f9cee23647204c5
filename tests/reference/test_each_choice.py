"""Each choice of docs/method.md by the value that it makes, at the cost of one site and without a store.

`test_protocol.py` runs whole commands; here site and scales were looked for with which val and test would
choose differently, so that a choice made on the wrong prompts, or not at all, changes a number.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.plain_study import PlainPair, PlainSite, bootstrap_drop, draws, drop, min_rank, p_above_0

from mechdiff_mlflow.experiments import PatchRecord, Protocol, Study
from mechdiff_mlflow.experiments.sweep import least_ranks
from mechdiff_mlflow.maps.affine import Weight
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.solvers import PairedSpectrum
from mechdiff_mlflow.solvers.controls import control_map
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Rank
from mechdiff_mlflow.spec.sites import Hook, Site

CLOSE = {"rel": 1e-6, "abs": 1e-9}
ALPHAS = (0.9, 1.2)
SITE = Site(2, Hook.ATTN_OUT)
SEED, N_RESAMPLES = 5, 300


@pytest.fixture(scope="module")
def site(spec: Path) -> PlainSite:
    """The site by plain hooks; the random rotation, whose axes are arbitrary, is the package's own."""
    found = PlainSite(PlainPair(spec), SITE.layer, str(SITE.hook))
    made = control_map("random_orthogonal", PairedSpectrum.from_rows(*found.train), seed=SEED).weight
    assert isinstance(made, Weight)
    found.random = made.dense()
    return found


def study_of(spec: Path, **more: Any) -> Study:
    protocol = Protocol(seed=SEED, n_resamples=N_RESAMPLES, **more)
    return Study(load_pair(PairSpec.load(str(spec))), protocol)


def cell(k: int | None = None, alphas: tuple[float, ...] = (1.0,)) -> Cell:
    return Cell(SITE, "procrustes_scaled", "update", Rank(k), Alpha(alphas))


def patched(study: Study, *cells: Cell) -> list[PatchRecord]:
    return study.patch([fit.to_patch for fit in study.fit(cells)])


def rows(record: PatchRecord, name: str) -> np.ndarray:
    """A column of the per-prompt table."""
    return np.asarray(record.per_prompt[name], dtype=np.float64)


def test_a_record_is_the_reference_number_by_number(spec: Path, site: PlainSite) -> None:
    study = study_of(spec)
    (fit,) = study.fit([cell(None, ALPHAS)])
    (record,) = study.patch([fit.to_patch])
    # Val chooses the scale: every candidate has its KL on val, and the least of them is taken.
    offers = site.offers(None, ALPHAS)
    on_val = {alpha: site.patched("val", made).mean() for (_, alpha), made in offers.items()}
    assert dict(zip(fit.candidates["alpha"], fit.candidates["KL_mapped"], strict=True)) == {
        alpha: pytest.approx(kl, **CLOSE) for alpha, kl in on_val.items()
    }
    rule, alpha, made = site.chosen(None, ALPHAS)
    assert (record.map.alpha, fit.off_span) == (alpha, rule)
    on_test = {a: site.patched("test", offer).mean() for (_, a), offer in offers.items()}
    assert alpha != min(on_test, key=lambda a: on_test[a]), "this pair cannot tell which split chooses"
    val_rows = site.rows("base", "val"), site.rows("tuned", "val")
    left = (val_rows[1] - made(val_rows[0])).norm() / (val_rows[1] - val_rows[0]).norm()
    assert fit.rho == pytest.approx(float(left), **CLOSE)
    # Test is what is reported.
    expected = site.report(made, "test", ALPHAS)
    assert record.split == "test"
    np.testing.assert_allclose(rows(record, "KL_raw"), expected["raw"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(rows(record, "KL_mapped"), expected["mapped"], rtol=1e-6, atol=1e-12)
    found = {
        "KL_raw": record.kl_raw,
        "KL_mapped": record.kl_mapped,
        "reverse/KL_mapped": record.kl_mapped_reverse,
        "rho": record.rho,
        "cos_mean": record.cos_mean,
        "top1_agreement": record.top1_agreement,
        "delta_logprob": record.delta_logprob,
    }
    assert found == {name: pytest.approx(expected[name], **CLOSE) for name in found}
    assert record.controls == {name: pytest.approx(kl, **CLOSE) for name, kl in expected["controls"].items()}
    assert record.null == expected["null"]
    least = min(expected["controls"], key=lambda name: expected["controls"][name])
    assert record.null != least, "this pair cannot tell on which split the null is chosen"
    drawn = {"seed": SEED, "n_resamples": N_RESAMPLES}
    for interval, reference in ((record.drop_pct, "raw"), (record.skill_pct, "null_rows")):
        assert interval is not None
        assert interval.estimate == pytest.approx(drop(expected[reference], expected["mapped"]), **CLOSE)
        ends = bootstrap_drop(expected[reference], expected["mapped"], **drawn)
        assert (interval.low, interval.high) == pytest.approx(ends, **CLOSE)
    for p, reference in ((record.p_raw, "raw"), (record.p_null, "null_rows")):
        assert p == pytest.approx(p_above_0(expected[reference] - expected["mapped"], seed=SEED), abs=1e-3)


def test_where_train_leaves_directions_open_val_chooses_what_happens_to_them(spec: Path) -> None:
    """Twelve prompts span 11 of 16 dimensions: the rest is dropped or passes, whichever does better."""
    site = PlainSite(PlainPair(spec), SITE.layer, str(SITE.hook), n_train=12)
    (fit,) = study_of(spec, n_train=12).fit([cell(None, ALPHAS)])
    on_val = {key: site.patched("val", made).mean() for key, made in site.offers(None, ALPHAS).items()}
    assert {rule for rule, _ in on_val} == {"zero", "nearest_identity"}
    tried = fit.candidates.set_index(["off_span", "alpha"])["KL_mapped"].to_dict()
    assert tried == {key: pytest.approx(kl, **CLOSE) for key, kl in on_val.items()}
    assert (fit.off_span, fit.map.alpha) == min(on_val, key=lambda key: on_val[key])


def test_a_map_that_does_harm_has_a_p_value_of_one(spec: Path, site: PlainSite) -> None:
    """At a tenth of its length the map does worse than the raw patch, which a two-sided test would reward."""
    (record,) = patched(study_of(spec), cell(None, (0.1,)))
    made = site.fitted(None, "nearest_identity").scaled(0.1)
    expected = site.report(made, "test", (0.1,))
    assert expected["mapped"].sum() > expected["raw"].sum()
    assert (record.p_raw, record.p_null) == (1.0, 1.0)


@pytest.fixture(scope="module")
def grouped(spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pair: test has four groups of two prompts, and no two groups of train are of one size."""
    folder = tmp_path_factory.mktemp("grouped") / "pair"
    shutil.copytree(spec.parent, folder)
    ends = [0, 1, 4, 10, 19, 40]
    sizes = [b - a for a, b in pairwise(ends)]
    names = {
        "test": [f"t{i // 2}" for i in range(8)],
        "train": [f"g{size}" for size in sizes for _ in range(size)],
    }
    for split, groups in names.items():
        lines = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        both = [json.dumps({**line, "group": group}) for line, group in zip(lines, groups, strict=True)]
        (folder / f"{split}.jsonl").write_text("\n".join(both))
    return folder / spec.name


def test_groups_of_prompts_are_drawn_tested_and_shuffled_as_wholes(grouped: Path) -> None:
    groups, drawn = [i // 2 for i in range(8)], {"seed": SEED, "n_resamples": N_RESAMPLES}
    records = patched(study_of(grouped), cell(1), cell(4), cell())
    for record in records:
        mapped = rows(record, "KL_mapped")
        raw, null = rows(record, "KL_raw"), rows(record, f"KL_{record.null}")
        for interval, reference in ((record.drop_pct, raw), (record.skill_pct, null)):
            assert interval is not None
            ends = bootstrap_drop(reference, mapped, groups=groups, **drawn)
            assert (interval.low, interval.high) == pytest.approx(ends, **CLOSE)
            assert ends != pytest.approx(bootstrap_drop(reference, mapped, **drawn), rel=1e-3)
        for p, reference in ((record.p_raw, raw), (record.p_null, null)):
            assert p == pytest.approx(p_above_0(reference - mapped, seed=SEED, groups=groups), abs=1e-3)
    # p is never below 1/16 of four groups, and would be far below of eight prompts.
    assert p_above_0(raw - mapped, seed=SEED, groups=groups) > 4 * p_above_0(raw - mapped, seed=SEED)
    # The least rank, too, and how often it is reached: of targets that nearly all resamples reach, and half.
    ks, table = (1, 4, 16), [rows(record, "KL_mapped") for record in records]
    drops = [drop(raw, one) for one in table]
    for target in ((drops[0] + drops[1]) / 2, drops[2]):
        (least,) = least_ranks(records, [target], seed=SEED)
        resampled = [
            min_rank({k: drop(raw[i], one[i]) for k, one in zip(ks, table, strict=True)}, target)
            for i in draws(groups, seed=SEED, n_resamples=9999)
        ]
        assert least.found.k == min_rank(dict(zip(ks, drops, strict=True)), target)
        p_reached = np.mean([k is not None for k in resampled])
        assert least.found.p_reached == pytest.approx(p_reached, abs=1e-12)
    assert 0.2 < p_reached < 0.8
    # Groups change places with groups of their size: of train every one stays where it is.
    (shuffled,) = patched(study_of(grouped, permutations=2), cell(4))
    assert shuffled.controls["shuffled"] == pytest.approx(shuffled.kl_mapped, rel=1e-6)


def test_what_stands_together_is_corrected_by_holm(spec: Path) -> None:
    """The smallest of three p-values times three, the next times two, and never below the one before."""
    records = patched(study_of(spec), cell(None, (0.9,)), cell(None, (1.0,)), cell(None, (0.6,)))
    p = [record.p_null for record in records]
    assert None not in p
    first, second, third = sorted(range(3), key=lambda i: p[i] or 0.0)
    assert p[first] != p[third]
    expected = {first: min(1.0, 3 * p[first])}  # type: ignore[operator]
    expected[second] = max(expected[first], min(1.0, 2 * p[second]))  # type: ignore[operator]
    expected[third] = max(expected[second], p[third])  # type: ignore[type-var]
    assert [record.p_holm for record in records] == pytest.approx([expected[i] for i in range(3)], rel=1e-12)


def test_a_layer_near_the_end_has_its_wrong_layer_below(spec: Path) -> None:
    """An eighth of four layers is one: of the last block the wrong layer is the third."""
    last = Site(3, Hook.ATTN_OUT)
    (record,) = patched(study_of(spec), replace(cell(), site=last))
    plain = PlainSite(PlainPair(spec), 3, "attn_out")
    below = PlainSite(plain.pair, 2, "attn_out").fitted(None, "nearest_identity")
    assert record.controls["wrong_layer"] == pytest.approx(plain.patched("test", below).mean(), **CLOSE)
    own = plain.fitted(None, "nearest_identity")
    assert record.kl_mapped == pytest.approx(plain.patched("test", own).mean(), **CLOSE)
