"""Maps that are called the same and compute other things get their own numbers, wherever numbers are kept."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import torch
from cli.conftest import Invoke, client, empty_store, here, mechdiff  # noqa: F401
from cli.test_run import SITE as AT
from cli.test_run import runs_of

from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.workers import Journal, LocalWorkers
from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.models.pairs import Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Rank
from mechdiff_mlflow.spec.sites import Hook, Site

CELL = Cell(Site(3, Hook.RESID_POST), "procrustes_scaled", "update", Rank(None), Alpha((1.0,)))


@pytest.fixture
def pair(toy: Path) -> Pair:
    return load_pair(PairSpec.load(str(toy)))


OTHER_SETTINGS = [
    {"shrink": 0.9},
    {"n_train": 20},
    {"shrink": 0.05 + 1e-9},
]


@pytest.mark.parametrize("other", OTHER_SETTINGS, ids=str)
def test_a_study_patches_two_maps_of_one_name_with_their_own_numbers(
    pair: Pair, tmp_path: Path, other: dict[str, float]
) -> None:
    made = [
        Study(pair, Protocol(**settings)).fit([CELL])[0].to_patch  # type: ignore[arg-type]
        for settings in ({}, other)
    ]
    alone = [Study(pair, Protocol()).patch([one])[0] for one in made]
    assert alone[0].kl_mapped != alone[1].kl_mapped
    workers = Journal(LocalWorkers(pair), tmp_path, version="1")
    one_after_the_other, together = Study(pair, Protocol(), workers=workers), Study(pair, Protocol())
    for found in ([one_after_the_other.patch([one])[0] for one in made], together.patch(made)):
        assert [patch.kl_mapped for patch in found] == [patch.kl_mapped for patch in alone]
        assert [patch.rho for patch in found] == [patch.rho for patch in alone]


def test_a_map_is_told_apart_by_what_it_computes_and_by_nothing_else() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 4, dtype=torch.float64)
    map_ = AffineMap(torch.zeros(4).double(), torch.ones(4).double(), Weight.from_dense(weight))
    same = AffineMap(map_.mean_in.clone(), map_.mean_out.clone(), Weight.from_dense(weight.clone()))
    assert map_.digest == same.digest == map_.with_meta(solver="ridge").digest
    others = [
        map_.with_alpha(1 + 2**-52),
        AffineMap(map_.mean_out, map_.mean_in, map_.weight),
        AffineMap(map_.mean_in, map_.mean_out, Weight.from_dense(weight.mT.contiguous())),
        AffineMap(map_.mean_in, map_.mean_out, Weight.low_rank(weight, torch.eye(4).double())),
        map_.to(torch.float32),
    ]
    assert len({map_.digest, *(other.digest for other in others)}) == 1 + len(others)
    before = map_.digest
    weight[0, 0] += 1e-9
    assert map_.digest != before, "a tensor that was changed in place is another"


def test_a_report_pass_measures_two_winners_of_one_site_each_for_itself(
    toy: Path,
    mechdiff: Invoke,  # noqa: F811
    client: mlflow.MlflowClient,  # noqa: F811
) -> None:
    for name, shrink in (("toy-a", "0.05"), ("toy-b", "0.9")):
        mechdiff("run", "--pair", str(toy), *AT, "--alpha", "1", "--shrink", shrink)
        (fit, *_) = sorted(runs_of(client)["fit"], key=lambda run: -run.info.start_time)
        mechdiff("promote", fit.info.run_id, "--name", name, "--force")
    first = {run.data.params["shrink"]: run.data.metrics for run in runs_of(client)["patch"]}
    known = {run.info.run_id for run in runs_of(client)["patch"]}
    mechdiff("report-pass", "--pair", str(toy))
    again = [run for run in runs_of(client)["patch"] if run.info.run_id not in known]
    assert len(again) == 2
    for run in again:
        for key in ("KL_mapped", "drop_pct", "rho"):
            assert run.data.metrics[key] == first[run.data.params["shrink"]][key]
    assert first["0.05"]["KL_mapped"] != first["0.9"]["KL_mapped"]


def test_a_promoted_map_has_the_very_alpha_that_was_measured(
    toy: Path,
    mechdiff: Invoke,  # noqa: F811
    client: mlflow.MlflowClient,  # noqa: F811
) -> None:
    alpha = "0.12345678901234567"
    mechdiff("run", "--pair", str(toy), *AT, "--alpha", alpha, "--promote", "--force")
    version = client.get_model_version_by_alias("toy-L3-resid_post", "champion")
    assert float(version.tags["alpha"]) == float(alpha)
    (patch,) = runs_of(client)["patch"]
    assert float(patch.data.params["alpha"]) == float(alpha)
    mechdiff("fetch", "toy-L3-resid_post@champion", "-o", "map.pt")
    assert AffineMap.load("map.pt").alpha == float(alpha)
    assert AffineMap.load("map.pt").sha256() == patch.data.tags["mechdiff.map_sha256"]


def test_scales_that_differ_in_the_last_digits_are_two_cells_of_a_sweep(
    toy: Path,
    mechdiff: Invoke,  # noqa: F811
    client: mlflow.MlflowClient,  # noqa: F811
) -> None:
    scales = ["0.3", "0.30000000000000004", "0.3000001"]
    mechdiff(
        *("sweep", "--pair", str(toy), "--sites", "L3/resid_post", "--alphas", ",".join(scales)),
        *("--ranks", "2", "--targets", "9"),
    )
    assert sorted(run.data.params["alpha"] for run in runs_of(client)["patch"]) == scales
    (sweep,) = runs_of(client)["sweep"]
    curves = [key for key in sweep.data.metrics if key.startswith("drop_pct/")]
    assert len(curves) == 3
