"""What is read of a store does not grow with it, and says the same as reading all of it."""

from __future__ import annotations

import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import pytest
from cli.conftest import Invoke
from mlflow.entities import Metric, Param, RunTag

from benchmarks.growth import grow
from mechdiff_mlflow.report.evidence import Evidence
from mechdiff_mlflow.tracking.commands.documents import TABLES, evidence_of
from mechdiff_mlflow.tracking.content.tag_names import PAIR_SITE, pair_site
from mechdiff_mlflow.tracking.runs import results
from mechdiff_mlflow.tracking.runs.lookup import MOST_VALUES, all_runs
from mechdiff_mlflow.tracking.runs.results import tables_of
from mechdiff_mlflow.tracking.runs.search import FoundRun, find_runs
from mechdiff_mlflow.tracking.store.store import Store, open_store

SWEEP = ("--sites", "L2/attn_out,L3/attn_out", "--ranks", "2,full", "--targets", "10", "--alphas", "1")


def read_whole(store: Store, pair: str) -> Evidence:
    """The evidence by reading every run."""
    runs = results._frame([results._row(run) for run in all_runs(store, [store.experiment_id(pair)])])
    done = runs[runs["status"] == "FINISHED"]
    kinds = {path: done[done["kind"] == kind]["run_id"] for path, kind in TABLES.items()}
    return Evidence.of(pair, runs, {path: tables_of(store, ids, path) for path, ids in kinds.items()})


def assert_same(store: Store, pair: str = "toy") -> Evidence:
    found, right = evidence_of(store, pair, pair), read_whole(store, pair)
    assert list(found.patches) == list(right.patches)
    assert found.quoted() == right.quoted()
    assert found.fingerprint == right.fingerprint
    assert found.least_ranks.equals(right.least_ranks)
    assert list(found.parents["run_id"]) == list(right.parents["run_id"])
    assert found.left_out == right.left_out
    return found


def counting(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many runs searches give."""
    seen: Counter[str] = Counter()
    search: Callable[..., Any] = mlflow.MlflowClient.search_runs

    def counted(*args: Any, **kwargs: Any) -> Any:
        page = search(*args, **kwargs)
        seen["requests"] += 1
        seen["runs"] += len(page)
        return page

    monkeypatch.setattr(mlflow.MlflowClient, "search_runs", counted)
    return seen


def test_evidence_is_the_same_from_files_of_parents_as_from_every_run(
    toy: Path, here: Path, mechdiff: Invoke, client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    mechdiff("sweep", "--pair", str(toy), *SWEEP)
    mechdiff("run", "--pair", str(toy), "--layer", "3")
    store = open_store()
    first = assert_same(store)
    assert len(first.patches) == 4  # the lone run measured one of the sweep's cells again
    seen = counting(monkeypatch)
    evidence_of(store, "toy", "toy")
    assert seen["runs"] <= 4  # two parents, and what is below the one that is not a sweep

    experiment = client.get_experiment_by_name("toy").experiment_id
    cell = next(patch.run_id for patch in first.patches if patch.source == "sweep")
    client.delete_run(cell)
    assert len(assert_same(store).patches) == 3
    client.restore_run(cell)

    [sweep] = client.search_runs([experiment], "tags.`mechdiff.kind` = 'sweep'")
    file = Path(sweep.info.artifact_uri.removeprefix("file://"), "cells.json")
    content = file.read_text()
    for damaged in (content.replace("full", "8"), "[" * 7000, "{}"):
        file.write_text(damaged)
        assert_same(store)
    file.write_text(content)

    mechdiff("sweep", "--pair", str(toy), *SWEEP)  # again: the newer one stands for both
    found, right = evidence_of(store, "toy", "toy"), read_whole(store, "toy")
    assert list(found.patches) == list(right.patches)
    assert found.least_ranks.equals(right.least_ranks)
    seen.clear()
    evidence_of(store, "toy", "toy")
    assert seen["runs"] <= 5


def test_sweeps_that_were_repeated_are_not_all_read(
    toy: Path, here: Path, mechdiff: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    mechdiff("sweep", "--pair", str(toy), *SWEEP)
    grow(here / "mlflow.db", 60 * 4, "sweeps")
    store = open_store()

    def same_as_from_all() -> None:
        found = evidence_of(store, "toy", "toy")
        with monkeypatch.context() as patch:
            patch.setattr(results, "_not_all", lambda each, where: each(" and ".join(where)))
            right = evidence_of(store, "toy", "toy")
        assert list(found.patches) == list(right.patches)
        assert found.left_out == right.left_out
        assert found.least_ranks.equals(right.least_ranks)
        assert list(found.parents["run_id"]) == list(right.parents["run_id"])

    same_as_from_all()
    seen = counting(monkeypatch)
    evidence_of(store, "toy", "toy")
    assert seen["runs"] <= 12
    assert seen["requests"] <= 9

    # Some with other code, of another pair, and of a command that ended badly.
    with closing(sqlite3.connect(here / "mlflow.db")) as db, db:
        others = [row[0] for row in db.execute("SELECT run_uuid FROM tags WHERE value = 'sweep'")]
        changes = (("mechdiff.version", "0.0.1"), ("pair_fingerprint", "0" * 16), ("mechdiff.command", "m"))
        for n, (key, text) in enumerate(changes):
            for run_id in others[10 * n + 5 : 10 * n + 15]:
                db.execute("UPDATE tags SET value = ? WHERE key = ? AND run_uuid = ?", (text, key, run_id))
        db.execute("UPDATE runs SET status = 'KILLED' WHERE run_uuid = ?", (others[40],))
    same_as_from_all()


def measured_runs(client: mlflow.MlflowClient, n: int, layers: int) -> None:
    """Patch runs of several pairs and many sites, some without what is asked for."""
    draw = random.Random(0)
    experiment = client.create_experiment("raw")
    for i in range(n):
        params = {"pair": draw.choice(["one", "its", "two"]), "layer": str(draw.randrange(layers))}
        params["hook"] = draw.choice(["attn_out", "mlp_out"])
        if i % 17 == 0:
            del params["layer"]
        if i % 11 == 0:
            params["k"] = "[/red]"  # malformed, and perhaps the best of its site
        tags = {"mechdiff.kind": "patch"}
        if i % 7 and "layer" in params:  # the others as an earlier version wrote them
            site = f"L{params['layer']}/{params['hook']}"
            tags[PAIR_SITE] = "another" if i % 31 == 0 else pair_site(params["pair"], site)
        run = client.create_run(experiment, start_time=i, tags=tags)
        metrics = [] if i % 13 == 0 else [Metric("drop_pct", draw.uniform(-9, 90), i, 0)]
        metrics.append(Metric("KL_mapped", draw.random(), i, 0))
        client.log_batch(
            run.info.run_id, metrics, [Param(*item) for item in params.items()], [RunTag("a", "b")]
        )
        client.set_terminated(run.info.run_id)


@pytest.mark.parametrize("layers", [3, MOST_VALUES + 8])
@pytest.mark.parametrize("metric", ["drop_pct", "KL_mapped"])
def test_the_best_of_each_site_is_found_without_reading_the_others(
    here: Path, client: mlflow.MlflowClient, layers: int, metric: str
) -> None:
    measured_runs(client, 90, layers)
    store = open_store()
    every = find_runs(store, metric=metric)
    sign = 1 if metric == "KL_mapped" else -1
    assert every == sorted(every, key=lambda run: (sign * run.value, -run.started_ms))
    right: dict[tuple[str, str], FoundRun] = {}
    for run in every:
        right.setdefault((run.pair, run.site), run)
    assert find_runs(store, metric=metric, best=True) == list(right.values())
    one = [run for run in right.values() if run.pair == "its"]
    assert find_runs(store, metric=metric, best=True, pair="its") == one
    assert find_runs(store, metric=metric, limit=7) == every[:7]


def test_a_list_of_runs_asks_for_those_that_it_shows(
    here: Path, client: mlflow.MlflowClient, mechdiff: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_runs(client, 30, 3)
    seen = counting(monkeypatch)
    shown = mechdiff("runs").output
    assert "--limit" in shown
    assert seen["requests"] <= 2
    seen.clear()
    rows = json.loads(mechdiff("runs", "--json", "--limit", "200").output)
    assert len(rows) >= 20


def test_where_every_run_is_malformed_that_is_said(
    here: Path, client: mlflow.MlflowClient, mechdiff: Invoke
) -> None:
    experiment = client.create_experiment("raw")
    run = client.create_run(experiment, tags={"mechdiff.kind": "patch"})
    params = [Param("pair", "it's"), Param("layer", "2"), Param("hook", "attn_out")]
    client.log_batch(run.info.run_id, [Metric("drop_pct", 5.0, 0, 0)], params)
    client.set_terminated(run.info.run_id)
    for words in ([], ["--best"]):
        said = " ".join(mechdiff("runs", "--pair", "it's", *words, code=1).output.split())
        assert "Every patch run of it's at any site with the metric 'drop_pct' is malformed" in said
