import base64
import json
import zlib
from typing import Any

import pytest

from mechdiff_mlflow.tracking.content.overview import renew
from mechdiff_mlflow.tracking.content.view import (
    CELLS,
    COMMANDS,
    install_views,
    ui_command,
    view_tags,
    view_url,
)
from mechdiff_mlflow.tracking.store.store import Store


def tags_of(store: Store, experiment_id: str) -> dict[str, str]:
    return dict(store.client.get_experiment(experiment_id).tags)


def state(store: Store, experiment_id: str, key: str = CELLS) -> dict[str, Any]:
    tag = json.loads(tags_of(store, experiment_id)[f"mlflow.sharedViewState.{key}"])
    assert tag.keys() == {"name", "createdAt", "updatedAt", "state", "curves"}
    form, _, packed = tag["state"].partition(";")
    assert form == "deflate"
    found: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return found


def test_the_view_has_the_charts_of_a_sweep(store: Store) -> None:
    experiment_id = store.experiment("demo")
    install_views(store, experiment_id, {}, [])
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


def test_commands_stay_with_what_is_below_them_and_have_lines_of_what_was_run(store: Store) -> None:
    experiment_id = store.experiment("demo")
    install_views(store, experiment_id, {}, ["drop_pct/L2-attn_out alpha 0.3", "KL_raw/attn_out"])
    install_views(store, experiment_id, tags_of(store, experiment_id), ["drop_pct/L3-mlp_out alpha 1"])
    found = state(store, experiment_id, COMMANDS)
    assert found["orderByKey"] == "attributes.start_time", "the UI folds children under parents only so"
    layers, drops, ranks = found["compareRunCharts"]
    assert (layers["type"], layers["selectedMetricKeys"][1]) == ("LINE", "KL_raw/attn_out")
    assert drops["selectedMetricKeys"][1] == "drop_pct/attn_out"
    assert ranks["selectedMetricKeys"] == ["drop_pct/L2-attn_out alpha 0.3", "drop_pct/L3-mlp_out alpha 1"]
    assert list(store.client.search_runs([experiment_id], found["searchFilter"])) == []


def test_installing_them_again_writes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment_id = store.experiment("demo")
    install_views(store, experiment_id, {}, [])
    new = store.experiment("new", view_tags())

    def never(*_: object) -> None:
        pytest.fail("the tag was written again")

    monkeypatch.setattr(store.client, "set_experiment_tag", never)
    for one in (experiment_id, new):
        install_views(store, one, tags_of(store, one), [])


def test_they_are_never_the_reason_for_a_failure(store: Store) -> None:
    install_views(store, "12345", {}, [])
    experiment_id = store.experiment("demo")
    for text in ("not JSON", "[]", '{"curves": 3}', '{"curves": [3]}'):
        install_views(store, experiment_id, {"mlflow.sharedViewState.mechdiff-commands": text}, [])


def test_the_description_keeps_what_people_and_other_commands_wrote(store: Store) -> None:
    experiment_id = store.experiment("demo")
    store.client.set_experiment_tag(experiment_id, "mlflow.note.content", "Ask Ann.\n\n")
    for kind, headline in (("run", "drop 1 %"), ("atlas", "At 4 of 64 sites"), ("run", "drop 75 %")):
        about = "base `b`, tuned `t`"
        renew(store, experiment_id, "r1", about=about, headline=headline, kind=kind, curves=[])
    renew(store, experiment_id, "r2", about="", headline="written", kind="report", curves=[])
    renew(store, "12345", "r2", about="", headline="nowhere", kind="report", curves=[])
    text = tags_of(store, experiment_id)["mlflow.note.content"]
    assert text.startswith("Ask Ann.\n\n**mechdiff**: base `b`, tuned `t`. At 4 of 64 sites\n")
    assert "drop 1 %" not in text
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert lines == [
        f"- **{kind}** ([run](#/experiments/{experiment_id}/runs/{run})): {headline}"
        for kind, run, headline in (
            ("run", "r1", "drop 75 %"),
            ("atlas", "r1", "At 4 of 64 sites"),
            ("report", "r2", "written"),
        )
    ]


def test_links(store: Store) -> None:
    base = "http://127.0.0.1:5000/#/experiments/3/runs"
    query = "viewStateShareKey=mechdiff&workflowType=machine_learning"
    assert view_url(store, "3") == f"{base}?{query}"
    assert ui_command(store) == f"mlflow ui --backend-store-uri {store.uri}"
    server = Store("http://ann:secret@host:5000", store.client)
    assert view_url(server, "3").startswith("http://***@host:5000/#/")
    assert ui_command(server) is None
