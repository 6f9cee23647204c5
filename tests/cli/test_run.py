"""The main job, from the command line to the registered map."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from cli.conftest import Invoke
from mlflow.entities import Run

from mechdiff_mlflow import load_map
from mechdiff_mlflow.maps.affine import AffineMap

PARAMS = {
    *("pair", "layer", "hook", "alpha", "k", "family", "solver", "shrink", "ridge", "off_span", "position"),
    *("split", "n", "n_train", "seed", "dtype"),
}
METRICS = {
    *("KL_raw", "KL_mapped", "drop_pct", "skill_pct", "noise_floor", "ci/drop_pct_low", "ci/drop_pct_high"),
    *("ci/skill_pct_low", "ci/skill_pct_high", "ci/KL_difference_low", "ci/KL_difference_high"),
}
SITE = ("--layer", "3", "--hook", "resid_post")


def runs_of(client: mlflow.MlflowClient, experiment: str = "toy") -> dict[str, list[Run]]:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    by_kind: dict[str, list[Run]] = {}
    for run in client.search_runs([found.experiment_id]):
        by_kind.setdefault(run.data.tags["mechdiff.kind"], []).append(run)
    return by_kind


def artifacts(client: mlflow.MlflowClient, run: Run) -> set[str]:
    return {item.path for item in client.list_artifacts(run.info.run_id)}


def test_run_makes_a_parent_with_a_fit_and_a_patch_and_a_map_fetched_by_alias(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    shown = mechdiff("run", "--pair", str(toy), *SITE, "--promote", "--force").output
    runs = runs_of(client)
    assert {kind: len(found) for kind, found in runs.items()} == {"run": 1, "fit": 1, "patch": 1}
    (parent,), (fit,), (patch,) = runs["run"], runs["fit"], runs["patch"]
    for run in (parent, fit, patch):
        assert run.info.status == "FINISHED"
    for child in (fit, patch):
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.params.keys() >= PARAMS
    assert parent.data.params.keys() >= PARAMS
    assert patch.data.metrics.keys() >= METRICS
    assert all(math.isfinite(value) for value in patch.data.metrics.values())
    # Asked on the parent, resolved on the children.
    assert (parent.data.params["alpha"], parent.data.params["n"]) == ("auto", "all")
    assert float(fit.data.params["alpha"]) == float(patch.data.params["alpha"]) > 0
    assert patch.data.params["n"] == "40"
    assert artifacts(client, parent) == {"spec.yaml", "environment.txt"}
    assert artifacts(client, patch) == {"per_prompt.json"}
    assert artifacts(client, fit) == {"candidates.json"}

    assert "mechdiff fetch toy-L3-resid_post@champion -o map.pt" in shown
    assert "mlflow ui --backend-store-uri" in shown
    mechdiff("fetch", "toy-L3-resid_post@champion", "-o", "map.pt")
    plain = torch.load(here / "map.pt", weights_only=True)
    assert plain.keys() >= {"mean_in", "mean_out", "left"}
    fetched = load_map("models:/toy-L3-resid_post@champion")
    assert fetched == AffineMap.load(here / "map.pt")
    assert fetched.alpha == float(patch.data.params["alpha"])
    listed = mechdiff("maps").output
    assert "toy-L3-resid_post" in listed
    assert "champion" in listed


def test_the_numbers_of_the_run_are_those_of_its_per_prompt_table(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("run", "--pair", str(toy), *SITE, "--k", "2", "--alpha", "1")
    (patch,) = runs_of(client)["patch"]
    path = client.download_artifacts(patch.info.run_id, "per_prompt.json")
    table = json.loads(Path(path).read_text())
    columns = dict(zip(table["columns"], np.array(table["data"], dtype=object).T, strict=True))
    raw, mapped = (columns[name].astype(float) for name in ("KL_raw", "KL_mapped"))
    metrics = patch.data.metrics
    assert metrics["KL_raw"] == pytest.approx(raw.mean(), rel=1e-12)
    assert metrics["KL_mapped"] == pytest.approx(mapped.mean(), rel=1e-12)
    assert metrics["drop_pct"] == pytest.approx(100 * (1 - mapped.sum() / raw.sum()), rel=1e-12)
    null = columns[f"KL_{patch.data.tags['null']}"].astype(float)
    assert metrics["skill_pct"] == pytest.approx(100 * (1 - mapped.sum() / null.sum()), rel=1e-12)
    controls = {key for key in metrics if key.startswith("control/")}
    assert {"control/zero", "control/mean_only", "control/mean_shift", "control/alpha_only"} <= controls


def test_the_same_seed_gives_the_same_metrics(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    for _ in range(2):
        mechdiff("run", "--pair", str(toy), *SITE)
    first, second = (
        {key: value for key, value in run.data.metrics.items() if not key.startswith("time/")}
        for run in runs_of(client)["patch"]
    )
    assert first == second


def test_val_reports_as_the_seed_does_and_says_that_it_leaks(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    shown = mechdiff("run", "--pair", str(toy), *SITE, "--split", "val").output
    (patch,) = runs_of(client)["patch"]
    assert patch.data.tags["selection_leak"] == "true"
    assert patch.data.params["split"] == "val"
    assert "Leak: alpha" in shown
    mechdiff("promote", runs_of(client)["fit"][0].info.run_id, code=1)
    mechdiff("run", "--pair", str(toy), *SITE, "--split", "val", "--alpha", "0.3")
    assert sorted(run.data.tags["selection_leak"] for run in runs_of(client)["patch"]) == ["false", "true"]


def test_fit_then_patch_are_one_run_each(toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    mechdiff("fit", "--pair", str(toy), *SITE, "--solver", "reduced_rank", "--k", "3", "--alpha", "0.7")
    (fit,) = runs_of(client)["fit"]
    assert fit.data.params["alpha"] == "0.7"
    assert fit.data.params["shrink"] != "n/a"
    mechdiff("patch", "--map", f"runs:/{fit.info.run_id}", "--pair", str(toy), "--n", "10")
    (patch,) = runs_of(client)["patch"]
    assert {kind: len(found) for kind, found in runs_of(client).items()} == {"fit": 1, "patch": 1}
    assert "mlflow.parentRunId" not in patch.data.tags
    for name in ("layer", "hook", "solver", "family", "k", "alpha", "position"):
        assert patch.data.params[name] == fit.data.params[name]
    assert patch.data.params["n"] == "10"


def test_alpha_at_patch_time_replaces_the_maps_own(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    """The hand-run predecessor multiplied the two."""
    mechdiff("fit", "--pair", str(toy), *SITE, "--alpha", "0.5")
    map_uri = f"runs:/{runs_of(client)['fit'][0].info.run_id}"
    mechdiff("patch", "--map", map_uri, "--pair", str(toy), "--alpha", "0.5")
    mechdiff("patch", "--map", map_uri, "--pair", str(toy))
    given, own = runs_of(client)["patch"]
    assert given.data.metrics["KL_mapped"] == own.data.metrics["KL_mapped"]


def test_a_map_of_another_pair_is_refused_unless_asked(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("fit", "--pair", str(toy), *SITE, "--alpha", "1")
    map_uri = f"runs:/{runs_of(client)['fit'][0].info.run_id}"
    other = here / "other.yaml"
    other.write_text(toy.read_text().replace("name: toy", "name: other\nsystem: does subject1 well"))
    for part in ("base", "tuned"):
        shutil.copytree(toy.parent / part, here / part)
    for part in ("train.jsonl", "val.jsonl", "test.jsonl"):
        shutil.copy(toy.parent / part, here)
    other.write_text(
        toy.read_text().replace("name: toy", "name: other").replace("dtype: float32", "") + "dtype: float64\n"
    )
    shown = mechdiff("patch", "--map", map_uri, "--pair", str(other), code=1).output
    assert "--allow-pair-mismatch" in shown
    shown = mechdiff("patch", "--map", map_uri, "--pair", str(other), "--allow-pair-mismatch").output
    fit = runs_of(client)["fit"][0]
    where = client.get_experiment_by_name("other").experiment_id
    (patch,) = client.search_runs(
        [where], "tags.`mechdiff.kind` = 'patch' and attributes.status = 'FINISHED'"
    )
    fitted_on = fit.data.tags["pair_fingerprint"]
    assert f"Warning: map {map_uri} was fitted on pair {fitted_on} and patches" in shown
    assert patch.data.tags["fitted_on_pair"] == fitted_on != patch.data.tags["pair_fingerprint"]
    assert f"fitted on another pair, {fitted_on}" in patch.data.tags["mlflow.note.content"]


def test_runs_of_different_solvers_have_the_same_columns(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    for solver in ("procrustes_scaled", "reduced_rank"):
        mechdiff("run", "--pair", str(toy), *SITE, "--solver", solver, "--k", "2", "--alpha", "1")
    for kind in ("run", "fit", "patch"):
        first, second = runs_of(client)[kind]
        assert first.data.params.keys() == second.data.params.keys()
        assert first.data.metrics.keys() == second.data.metrics.keys()


def test_permutations_and_solver_inputs_reach_the_run(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    words = (
        "--solver",
        "logit_subspace",
        "--directions",
        "3",
        "--unembedding",
        "joint",
        "--alpha-fit",
        "inside",
    )
    shown = mechdiff(
        "run", "--pair", str(toy), *SITE, *words, "--alpha", "0.5,1", "--permutations", "3"
    ).output
    assert "than maps of shuffled pairs" in shown
    (patch,) = runs_of(client)["patch"]
    params, metrics = patch.data.params, patch.data.metrics
    wanted = {"directions": "3", "unembedding": "joint", "alpha_fit": "inside", "permutations": "3"}
    assert params.items() >= (wanted | {"output_metric": "n/a", "shrink": "n/a"}).items()
    assert metrics["p/permutation"] in (0.25, 0.5, 0.75, 1.0)
    assert metrics["control/shuffled"] > 0
    expected = {"corr/pearson", "ci/corr_pearson_low", "corr/spearman", "p/raw", "p/null"}
    assert metrics.keys() >= expected | {"cka", "explained_variance"}
    assert "p/holm" not in metrics


def test_sweep_logs_one_run_a_cell_and_draws_drop_over_k(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    shown = mechdiff(
        "sweep", "--pair", str(toy), "--sites", "L2/attn_out:0.7,L3/resid_post", "--alphas", "0.5,1",
        "--ranks", "1,4,full", "--targets", "10",
    ).output  # fmt: skip
    runs = runs_of(client)
    assert {kind: len(found) for kind, found in runs.items()} == {"sweep": 1, "patch": 9}
    (parent,) = runs["sweep"]
    curve = client.get_metric_history(parent.info.run_id, "drop_pct/L3-resid_post alpha 0.5")
    by_rank = {
        run.data.params["k"]: run.data.metrics["drop_pct"]
        for run in runs["patch"]
        if run.data.params["hook"] == "resid_post" and run.data.params["alpha"] == "0.5"
    }
    assert {point.step: point.value for point in curve} == {
        1: by_rank["1"],
        4: by_rank["4"],
        16: by_rank["full"],
    }
    assert len({run.data.metrics["KL_mapped"] for run in runs["patch"]}) == 9, (
        "ranks and scales make a difference"
    )
    assert "min k for 10 % @ L3/resid_post (α=0.5)" in shown
    for run in runs["patch"]:
        assert run.data.metrics["p/holm"] >= run.data.metrics["p/null"]


def test_promoting_the_parent_promotes_its_map(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    mechdiff("run", "--pair", str(toy), *SITE, "--alpha", "1")
    runs = runs_of(client)
    mechdiff("promote", runs["run"][0].info.run_id, "--force")
    (version,) = client.search_model_versions("name = 'toy-L3-resid_post'")
    assert version.run_id == runs["patch"][0].info.run_id
    assert float(version.tags["drop_pct"]) == runs["patch"][0].data.metrics["drop_pct"]


def test_a_child_of_a_sweep_can_be_promoted(toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    mechdiff("sweep", "--pair", str(toy), "--sites", "L3/resid_post:1", "--ranks", "4", "--targets", "10")
    (cell,) = runs_of(client)["patch"]
    mechdiff("promote", cell.info.run_id, "--alias", "best", "--no-ci-above-zero")
    assert load_map("toy-L3-resid_post@best").alpha == 1.0
