import base64
import json
import zlib
from typing import Any

import pytest

from mechdiff_mlflow.tracking.content import view
from mechdiff_mlflow.tracking.content.view import install_view, ui_command, view_url
from mechdiff_mlflow.tracking.store.store import Store


def state(store: Store, experiment_id: str) -> dict[str, Any]:
    tag = json.loads(store.client.get_experiment(experiment_id).tags["mlflow.sharedViewState.mechdiff"])
    assert tag.keys() == {"name", "createdAt", "updatedAt", "state"}
    form, _, packed = tag["state"].partition(";")
    assert form == "deflate"
    found: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return found


def test_the_view_has_the_charts_of_a_sweep(store: Store) -> None:
    experiment_id = store.experiment("demo")
    install_view(store, experiment_id)
    found = state(store, experiment_id)
    layers, parallel, scatter, contour, bar = found["compareRunCharts"]
    assert (layers["xaxis"]["key"], layers["yaxis"]["key"]) == ("layer", "KL_raw")
    assert len({chart["uuid"] for chart in found["compareRunCharts"]}) == 5
    assert (parallel["type"], parallel["selectedParams"]) == ("PARALLEL", ["layer", "hook", "alpha"])
    assert parallel["selectedMetrics"] == ["rank", "drop_pct"]
    assert (scatter["type"], scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == (
        "SCATTER",
        "rank",
        "drop_pct",
    )
    assert contour["type"] == "CONTOUR"
    assert [contour[axis]["key"] for axis in ("xaxis", "yaxis", "zaxis")] == ["rank", "alpha", "drop_pct"]
    assert (bar["type"], bar["metricKey"]) == ("BAR", "drop_pct")
    sections = {section["uuid"] for section in found["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in found["compareRunCharts"]} <= sections
    assert found["orderByKey"] == "metrics.`drop_pct`"
    assert found["selectedColumns"][:5] == [
        *(f"metrics.`{key}`" for key in ("drop_pct", "skill_pct", "KL_raw", "KL_mapped")),
        "params.`layer`",
    ]
    # MLflow must be able to run the filter, or the UI shows an error instead of the runs.
    assert list(store.client.search_runs([experiment_id], found["searchFilter"])) == []


def test_installing_it_again_writes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment_id = store.experiment("demo")
    install_view(store, experiment_id)
    new = store.experiment("new", view.view_tag())
    assert store.experiment("demo") == experiment_id

    def never(*_: object) -> None:
        pytest.fail("the tag was written again")

    monkeypatch.setattr(store.client, "set_experiment_tag", never)
    for one in (experiment_id, new):
        install_view(store, one)


def test_it_is_never_the_reason_for_a_failure(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    install_view(store, "12345")
    experiment_id = store.experiment("demo")
    store.client.set_experiment_tag(experiment_id, view._TAG, "not JSON")
    install_view(store, experiment_id)


def test_links(store: Store) -> None:
    base = "http://127.0.0.1:5000/#/experiments/3/runs"
    query = "viewStateShareKey=mechdiff&workflowType=machine_learning"
    assert view_url(store, "3") == f"{base}?{query}"
    assert ui_command(store) == f"mlflow ui --backend-store-uri {store.uri}"
    server = Store("http://ann:secret@host:5000", store.client)
    assert view_url(server, "3").startswith("http://***@host:5000/#/")
    assert ui_command(server) is None
