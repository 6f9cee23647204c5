"""The atlas: every site has its row, the first difference is found, and sites above the floor get runs."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
import toy as toys
from cli.conftest import Invoke
from cli.test_run import SITE, artifacts, runs_of

from mechdiff_mlflow import load_map
from mechdiff_mlflow.measures import stats
from mechdiff_mlflow.report.profiles import atlas_figures, where
from mechdiff_mlflow.tracking.commands.documents import evidence_of
from mechdiff_mlflow.tracking.store.store import open_store


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair with prompts enough for the best two sites to be told from their controls."""
    spec = toys.write_pair(tmp_path_factory.mktemp("toy"))
    toys.write_prompts(spec.parent, n_test=100)
    return spec


@pytest.fixture
def shown(toy: Path, mechdiff: Invoke) -> str:
    return mechdiff("atlas", "--pair", str(toy), "--promote-best", "2", "--force").output


def test_atlas_finds_where_the_models_begin_to_differ(
    shown: str, toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    evidence = evidence_of(open_store(), "toy", "toy")
    table = evidence.atlas
    assert table is not None
    assert list(table["site"][:3]) == ["L0/resid_pre", "L0/attn_out", "L0/mlp_out"]
    assert len(table) == 4 * toys.N_LAYERS
    # The toy's output projections of attention differ from layer 2 on, and nothing before.
    first = 4 * toys.FIRST_CHANGED + 1
    assert (table["change"][:first] == 0).all()
    assert (table["KL_raw"][:first] == 0).all()
    assert table["change"][first] > 0
    assert table["site"][first] == "L2/attn_out"
    assert "The first site whose activations differ is L2/attn_out; the 9 sites before it" in shown
    assert "A linear map carries the difference at" in shown

    above = table[table["above_floor"]]
    runs = runs_of(client)
    assert {kind: len(found) for kind, found in runs.items()} == {"atlas": 1, "patch": len(above)}
    for run in runs["patch"]:
        row = above[above["site"] == f"L{run.data.params['layer']}/{run.data.params['hook']}"].iloc[0]
        for key in ("KL_raw", "KL_mapped", "drop_pct", "skill_pct", "rho"):
            assert row[key] == run.data.metrics[key]
    places = above[~((above["hook"] == "resid_pre") & (above["layer"] > 0))]
    assert list(places["p_holm"]) == stats.holm(list(places["p"]))
    (parent,) = runs["atlas"]
    assert {"atlas.json", "figures.html", "figures"} <= artifacts(client, parent)
    curve = client.get_metric_history(parent.info.run_id, "KL_raw/attn_out")
    attention = table[table["hook"] == "attn_out"]
    values = dict(zip(attention["layer"], attention["KL_raw"], strict=True))
    end = toys.N_LAYERS  # one step on stands the site with the largest KL_raw, whose values tables show
    assert {p.step: p.value for p in curve} == values | {end: max(values.values())}
    best = attention.loc[attention["KL_raw"].astype(float).idxmax()]
    assert parent.data.metrics["drop_pct/attn_out"] == best["drop_pct"]


def test_a_place_with_two_names_is_computed_and_printed_once(shown: str, toy: Path) -> None:
    """What enters a block is what left the one before: one row of the output, two of the table, two runs."""
    evidence = evidence_of(open_store(), "toy", "toy")
    table = evidence.atlas
    assert table is not None
    rows = table.set_index("site").drop(columns=["layer", "hook"])
    for layer in range(toys.N_LAYERS - 1):
        left, entered = (rows.loc[f"L{at}"] for at in (f"{layer}/resid_post", f"{layer + 1}/resid_pre"))
        assert left.equals(entered)
    assert "L2/resid_post = L3/resid_pre" in shown
    assert "\n L3/resid_pre" not in shown
    assert {"L2/resid_post", "L3/resid_pre"} <= {str(patch.site) for patch in evidence.patches}


def test_the_best_on_val_are_registered_and_each_place_once(
    shown: str, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    names = [line.split()[3] for line in shown.splitlines() if line.startswith("Fetch:")]
    assert len(names) == 2
    assert all("attn_out" in name or "mlp_out" in name for name in names), "residual sites are sums"
    for name in names:
        assert load_map(name).alpha == 1.0


def test_the_report_shows_the_atlas(shown: str, toy: Path, here: Path, mechdiff: Invoke) -> None:
    mechdiff("run", "--pair", str(toy), *SITE, "--alpha", "1")
    mechdiff("report", "--pair", str(toy))
    text = (here / "mechdiff-report.md").read_text()
    start = text.index("## Where")
    assert "nats or more: **the attention of L2–L3" in text[start : text.index("## How")]
    assert "atlas-kl-raw.png" in text
    mechdiff("report", "--pair", str(toy), "--min-effect", "1000")
    text = (here / "mechdiff-report.md").read_text()
    assert "None of 8 attention and MLP outputs has an effect" in text
    assert "KL_raw below 1000 nats" in text


def test_the_places_named_are_those_with_an_effect(shown: str) -> None:
    table = evidence_of(open_store(), "toy", "toy").atlas
    assert table is not None
    at = table["site"].isin(["L2/attn_out", "L2/mlp_out", "L3/attn_out"])
    table = table.assign(
        KL_raw=table["KL_raw"].mask(at, 0.5).where(at | (table["hook"] == "resid_post"), 1e-5)
    )
    first, *sites, _ = where(table, 0.01)
    assert "3 of 8 attention and MLP outputs" in first
    assert "**the attention of L2–L3 and the MLP of L2**" in first
    assert len(sites) == 3
    assert "0.6 nats" in where(table, 0.6)[0]
    drop = atlas_figures(table, 0.6)[1]
    assert drop.png != atlas_figures(table, 0.01)[1].png, "cells without an effect are grey"


def test_one_hook_of_equal_models(toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient) -> None:
    words = ("--hooks", "resid_pre", "--promote-best", "1", "--min-effect", "1000")
    assert "Fetch:" not in mechdiff("atlas", "--pair", str(toy), *words).output, "nothing has that effect"
    table = evidence_of(open_store(), "toy", "toy").atlas
    assert table is not None
    assert set(table["hook"]) == {"resid_pre"}
    equal = table[:2].assign(change=0.0)
    assert "are equal at all 2 sites" in where(equal, 0.01)[-1]
    assert "residual sites, which are sums of all before them" in where(table, 0.01)[0]
