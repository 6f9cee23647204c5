"""`run`, `sweep`, `atlas`, `report-pass` and `compare` against the protocol written out slowly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from cli.conftest import client, empty_store, here, mechdiff  # noqa: F401
from reference.plain_study import HOOKS, PlainPair, PlainSite, bootstrap_drop, drop, min_rank, resampled
from toy import FIRST_CHANGED

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.atlas import atlas
from mechdiff_mlflow.experiments.sweep import least_ranks
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.maps.affine import Weight
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.solvers import PairedSpectrum
from mechdiff_mlflow.solvers.controls import control_map
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Rank
from mechdiff_mlflow.spec.sites import Hook, Site

Invoke = Callable[..., Any]
CLOSE = {"rel": 1e-6, "abs": 1e-9}
ALPHAS = (0.3, 0.7, 1.4)


@pytest.fixture(scope="module")
def plain(spec: Path) -> PlainPair:
    return PlainPair(spec)


def plain_site(plain: PlainPair, layer: int, hook: str, **settings: Any) -> PlainSite:
    """The reference at a site; the random rotation, whose axes are arbitrary, is the package's own."""
    site = PlainSite(plain, layer, hook, **settings)
    made = control_map("random_orthogonal", PairedSpectrum.from_rows(*site.train), seed=0).weight
    assert isinstance(made, Weight)
    return replace(site, random=made.dense())


def patches(client: mlflow.MlflowClient) -> list[Any]:  # noqa: F811
    ids = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(ids, "tags.`mechdiff.kind` = 'patch'"))


def assert_same(run: Any, expected: dict[str, Any]) -> None:
    """A patch run's metrics are the reference's."""
    metrics = run.data.metrics
    for name in (
        *("KL_raw", "KL_mapped", "reverse/KL_mapped", "drop_pct", "skill_pct", "rho", "cos_mean"),
        *("top1_agreement", "delta_logprob"),
    ):
        assert metrics[name] == pytest.approx(expected[name], **CLOSE), name
    for name, mean in expected["controls"].items():
        assert metrics[f"control/{name}"] == pytest.approx(mean, **CLOSE), name
    low, high = bootstrap_drop(expected["raw"], expected["mapped"], seed=0, n_resamples=2000)
    assert metrics["ci/drop_pct_low"] == pytest.approx(low, **CLOSE)
    assert metrics["ci/drop_pct_high"] == pytest.approx(high, **CLOSE)


RUNS: dict[str, tuple[int, str, dict[str, Any], int | None, tuple[float, ...]]] = {
    "full, many α": (2, "attn_out", {}, None, ALPHAS),
    "fewer rows than dimensions": (3, "resid_post", {"n_train": 12}, None, (0.5, 1.0)),
    "rank of the update": (3, "mlp_out", {}, 2, (0.3, 0.7)),
    "rank of the content": (3, "resid_pre", {"solver": "ridge", "family": "content"}, 3, (0.7, 1.0)),
    "reduced rank": (2, "attn_out", {"solver": "reduced_rank"}, 2, (1.0,)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run(
    name: str,
    spec: Path,
    plain: PlainPair,
    mechdiff: Invoke,  # noqa: F811
    client: mlflow.MlflowClient,  # noqa: F811
) -> None:
    layer, hook, settings, rank, alphas = RUNS[name]
    site = plain_site(plain, layer, hook, **settings)
    words = ["--layer", str(layer), "--hook", hook, "--k", str(rank or "full")]
    words += ["--alpha", ",".join(map(str, alphas))]
    for option, value in settings.items():
        words += [f"--{option.replace('_', '-')}", str(value)]
    mechdiff("run", "--pair", str(spec), *words)
    _, alpha, made = site.chosen(rank, alphas)
    (run,) = patches(client)
    assert float(run.data.params["alpha"]) == alpha
    expected = site.report(made, "test", alphas)
    assert run.data.tags["null"] == expected["null"]
    assert_same(run, expected)


def test_the_cases_above_would_notice(plain: PlainPair) -> None:
    """What a wrong choice changes is not nothing on this pair: else the tests above could not fail."""
    site = plain_site(plain, 2, "attn_out")
    scaled = site.best_controls(ALPHAS)
    assert any(made.alpha != 1 for name, (made, _) in scaled.items() if name != "zero")
    # The map of this layer instead of the next one's, and cosines about 0 instead of the tuned mean.
    own = site.fitted(None, "nearest_identity")
    other = site.controls()["wrong_layer"]
    assert float((own.weight - other.weight).norm()) > 0.1
    tuned, mapped = site.rows("tuned", "test"), own(site.rows("base", "test"))
    about_zero = torch.cosine_similarity(tuned, mapped).mean()
    assert abs(float(about_zero) - site.report(own, "test", (1.0,))["cos_mean"]) > 1e-3


def test_a_sweep_and_its_least_rank(
    spec: Path,
    plain: PlainPair,
    mechdiff: Invoke,  # noqa: F811
    client: mlflow.MlflowClient,  # noqa: F811
) -> None:
    sites = {(2, "attn_out"): 0.7, (3, "resid_post"): 1.0}
    target = 30.0
    mechdiff(
        *("sweep", "--pair", str(spec), "--ranks", "1,4,full", "--targets", f"{target:g},{target:g}"),
        *("--sites", ",".join(f"L{layer}/{hook}:{alpha}" for (layer, hook), alpha in sites.items())),
    )
    runs = {
        (int(r.data.params["layer"]), r.data.params["hook"], r.data.params["k"]): r for r in patches(client)
    }
    assert len(runs) == 6
    ids = [e.experiment_id for e in client.search_experiments()]
    (parent,) = client.search_runs(ids, "tags.`mechdiff.kind` = 'sweep'")
    for (layer, hook), alpha in sites.items():
        site, drops = plain_site(plain, layer, hook), {}
        for rank in (1, 4, None):
            made = site.chosen(rank, (alpha,))[2]
            expected = site.report(made, "test", (alpha,))
            assert_same(runs[layer, hook, str(rank or "full")], expected)
            drops[rank or 16] = expected["drop_pct"]
        found = min_rank(drops, target)
        table = json.loads(
            Path(client.download_artifacts(parent.info.run_id, "least_ranks.json")).read_text(
                encoding="utf-8"
            )
        )
        rows = pd.DataFrame(table["data"], columns=table["columns"]).set_index("site")
        shown = rows.loc[f"L{layer}/{hook}", "k"]
        assert (None if pd.isna(shown) else int(shown)) == found


def test_an_atlas(spec: Path, plain: PlainPair) -> None:
    """KL_raw everywhere, maps where it is above the floor, and sublayers promoted by drop on val."""
    study = Study(load_pair(PairSpec.load(str(spec))), Protocol())
    record = atlas(study, hooks=list(Hook), solver="procrustes_scaled", family="update", alpha=1.0, best=16)
    table = record.table.set_index("site")
    left: dict[str, dict[str, float]] = {"val": {}, "test": {}}
    for layer in range(plain.n_layers):
        for hook in HOOKS:
            site = PlainSite(plain, layer, hook)
            raw = site.patched("test", lambda x: x)
            row = table.loc[f"L{layer}/{hook}"]
            assert row["KL_raw"] == pytest.approx(raw.mean(), rel=1e-6, abs=1e-12)
            unchanged = layer < FIRST_CHANGED or (layer == FIRST_CHANGED and hook == "resid_pre")
            assert (raw.mean() < 1e-12) == unchanged
            assert row["above_floor"] == (not unchanged)
            if unchanged:
                assert np.isnan(row["drop_pct"])
                continue
            base, tuned = site.rows("base", "test"), site.rows("tuned", "test")
            assert row["change"] == pytest.approx(float((tuned - base).norm() / tuned.norm()))
            made = site.chosen(None, (1.0,))[2]
            mapped = site.patched("test", made)
            assert row["drop_pct"] == pytest.approx(100 * (1 - mapped.sum() / raw.sum()), rel=1e-6)
            for split, ratios in left.items():
                ratios[f"L{layer}/{hook}"] = (
                    site.patched(split, made).sum() / site.patched(split, lambda x: x).sum()
                )
    sums = atlas(
        study, hooks=[Hook.RESID_POST], solver="procrustes_scaled", family="update", alpha=1.0, best=16
    )
    tells = False
    for found, hooks in ((record, ("attn_out", "mlp_out")), (sums, ("resid_post",))):
        on_val, on_test = (
            sorted((site for site in ratios if site.endswith(hooks)), key=ratios.__getitem__)
            for ratios in left.values()
        )
        tells |= on_val != on_test
        assert [str(site) for site in found.best] == on_val
        for made in (found.fits[found.best[0]].map, found.patches[found.best[0]].map):
            assert selection.entry(f"site (one of {len(on_val)})", study.val_prompts) in selection.of(made)
    assert tells, "this pair cannot tell which split ranks"


def test_a_report_pass_measures_the_promoted_map(
    spec: Path,
    plain: PlainPair,
    mechdiff: Invoke,  # noqa: F811
    client: mlflow.MlflowClient,  # noqa: F811
) -> None:
    mechdiff(
        "run",
        "--pair",
        str(spec),
        "--layer",
        "3",
        "--hook",
        "resid_post",
        "--alpha",
        "0.7,1",
        "--promote",
        "--force",
    )
    (first,) = patches(client)
    mechdiff("report-pass", "--pair", str(spec))
    (again,) = [run for run in patches(client) if run.info.run_id != first.info.run_id]
    site = plain_site(plain, 3, "resid_post")
    _, alpha, made = site.chosen(None, (0.7, 1.0))
    # The winner's α is fixed now: so is that of the controls beside it.
    assert_same(again, site.report(made, "test", (alpha,)))


def test_a_comparison(
    spec: Path,
    plain: PlainPair,
    tmp_path_factory: pytest.TempPathFactory,
    mechdiff: Invoke,  # noqa: F811
    here: Path,  # noqa: F811
) -> None:
    """The difference of two pairs' drops, each resampled by itself."""
    other = tmp_path_factory.mktemp("other") / "pair"
    shutil.copytree(spec.parent, other)
    (other / "toy.yaml").write_text((other / "toy.yaml").read_text().replace("name: toy", "name: other"))
    tests = (other / "test.jsonl").read_text().splitlines()
    groups = ((), (0, 0, 1, 2, 3, 4))
    lines = [{**json.loads(line), "group": f"g{g}"} for line, g in zip(tests, groups[1], strict=False)]
    (other / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ("--layer", "3", "--hook", "resid_post", "--k", "4", "--alpha", "1")
    pairs = (str(spec), str(other / "toy.yaml"))
    for pair in pairs:
        mechdiff("run", "--pair", pair, *words)
    mechdiff("compare", *pairs, "--out", "compared.md")
    raws, mappeds = [], []
    for n in (8, 6):
        site = PlainSite(plain, 3, "resid_post")
        made = site.chosen(4, (1.0,))[2]
        raws.append(site.patched("test", lambda x: x)[:n])
        mappeds.append(site.patched("test", made)[:n])
    ratios = [
        resampled(mapped, raw, seed=seed, n_resamples=9999, groups=of)
        for seed, (raw, mapped, of) in enumerate(zip(raws, mappeds, groups, strict=True))
    ]
    drops = [drop(raw, mapped) for raw, mapped in zip(raws, mappeds, strict=True)]
    gap, error = drops[0] - drops[1], 100 * np.hypot(ratios[0].error, ratios[1].error)
    t = (ratios[1].shifts - ratios[0].shifts) / np.hypot(ratios[0].errors, ratios[1].errors)
    low, high = gap - np.quantile(t, [0.975, 0.025]) * error
    missed = (1 - 0.025 ** (1 / 5)) * (abs(drops[0]) + abs(drops[1]))
    low, high = (low - missed, high) if gap > 0 else (low, high + missed)
    assert f"| {gap:.1f} [{low:.1f}, {high:.1f}] |" in (here / "compared.md").read_text()


@pytest.mark.parametrize(
    ("dtype", "limit"), [("float64", 1e-9), ("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 2e-2)]
)
def test_a_patch_that_is_no_identity_is_refused(
    dtype: str, limit: float, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 an identity patch may move KL by 1e-9 nats and no more."""
    from mechdiff_mlflow.experiments import workers

    score = workers.LocalWorkers.score

    def biased(found: Any) -> Any:
        for rows in found.values():
            if "identity" in rows.patched:  # of reported prompts
                rows.patched["identity"].kl_patched_clean_nats[:] = factor * limit
        return found

    monkeypatch.setattr(workers.LocalWorkers, "score", lambda *args: biased(score(*args)))
    cell = Cell(Site(3, Hook.RESID_POST), "procrustes_scaled", "update", Rank(None), Alpha((1.0,)))
    pair = load_pair(PairSpec.load(str(spec)), dtype=dtype)
    for times, refused in ((0.9, False), (1.1, True)):
        factor = times
        study = Study(pair, Protocol())
        fits = [fit.to_patch for fit in study.fit([cell])]
        if refused:
            with pytest.raises(MechdiffError, match="does not fit this model"):
                study.patch(fits)
        else:
            study.patch(fits)


def test_skill_has_the_same_noise_floor_as_drop(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten floors above the null's KL, and there is no skill."""
    from mechdiff_mlflow.experiments import study as module

    monkeypatch.setattr(module, "FLOOR_LIMIT_NATS", {"float64": 1e9})
    from mechdiff_mlflow.experiments import workers

    score = workers.LocalWorkers.score
    floor = 0.0

    def noisy(self: Any, *args: Any) -> Any:
        found = score(self, *args)
        for rows in found.values():
            if "identity" in rows.patched:
                rows.patched["identity"].kl_patched_clean_nats[:] = floor
        return found

    monkeypatch.setattr(workers.LocalWorkers, "score", noisy)
    cell = Cell(Site(2, Hook.ATTN_OUT), "procrustes_scaled", "update", Rank(None), Alpha((1.0,)))

    def measured() -> Any:
        study = Study(load_pair(PairSpec.load(str(spec))), Protocol())
        return study.patch([fit.to_patch for fit in study.fit([cell])])[0]

    null_kl = (first := measured()).controls[first.null]
    floor = null_kl / 9.9
    below = measured()
    assert below.skill_pct is None
    assert below.p_null is None, "what cannot be told from noise is not tested against it"
    floor = null_kl / 10.1
    above = measured()
    assert above.skill_pct is not None
    assert above.p_null == first.p_null


@pytest.mark.parametrize("kl_raw_nats", [0.0, 5e-17])
def test_rounding_earns_no_drop_where_the_identity_patch_is_exact(
    kl_raw_nats: float, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten floors of zero would be zero: in float32, logits are not known well enough for 5e-17 nats."""
    from mechdiff_mlflow.experiments import workers

    score = workers.LocalWorkers.score

    def of_rounding(self: Any, *args: Any) -> Any:
        found = score(self, *args)
        for rows in found.values():
            for label, patched in rows.patched.items():
                kl = {"identity": 0.0, "raw": kl_raw_nats}.get(label, kl_raw_nats / 3)
                patched.kl_patched_clean_nats[:] = kl
        return found

    monkeypatch.setattr(workers.LocalWorkers, "score", of_rounding)
    study = Study(load_pair(PairSpec.load(str(toy))), Protocol())
    cell = Cell(Site(3, Hook.RESID_POST), "procrustes_scaled", "update", Rank(None), Alpha((1.0,)))
    (patch,) = study.patch([fit.to_patch for fit in study.fit([cell])])
    assert patch.noise_floor > 0
    assert patch.drop_pct is None
    assert patch.skill_pct is None
    assert "below noise floor" in patch.undefined["drop_pct"]
    assert (patch.p_raw, patch.p_null) == (None, None)
    assert least_ranks([patch], [30.0], seed=0) == [], "of what has no drop there is no least rank"
    found = atlas(study, hooks=[Hook.ATTN_OUT], solver="procrustes_scaled", family="update", alpha=1.0)
    assert not found.table["above_floor"].any()


def test_a_map_of_more_than_the_claimed_rank_is_not_kept(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechdiff_mlflow import solvers

    monkeypatch.setattr(
        solvers.Solution,
        "map",
        lambda self, k=None, rule=None, full=solvers.Solution.map: full(self, None, rule),
    )
    cell = Cell(Site(3, Hook.RESID_POST), "procrustes_scaled", "update", Rank(2), Alpha((1.0,)))
    study = Study(load_pair(PairSpec.load(str(spec))), Protocol())
    with pytest.raises(MechdiffError, match="rank"):
        study.fit([cell])
