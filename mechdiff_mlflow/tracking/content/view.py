"""The shared views of each experiment of ours: columns, order, filter and charts in place.

MLflow's UI keeps a shared view as an experiment tag. The format is internal to MLflow (read from 3.17); what
the UI does not understand costs nothing, it then shows its plain table.
"""

from __future__ import annotations

import base64
import json
import logging
import shlex
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Hook
from mechdiff_mlflow.tracking.store.store import Store

CELLS, COMMANDS = "mechdiff", "mechdiff-commands"
"""Keys of the views: maps by falling drop with charts over all, and commands, newest first, to unfold.

The UI folds runs under their parents only where it sorts by date, and its charts leave out what is folded.
"""
_TAG = "mlflow.sharedViewState."
_METRICS = ("drop_pct", "skill_pct", "KL_raw", "KL_mapped")
_PARAMS = ("layer", "hook", "k", "alpha", "solver", "family", "split")
_MORE_METRICS = ("rho", "noise_floor")
_RUN_NAME, _DATE = "attributes.`Run Name`", "runDateAndNestInfo"
_NAME_WIDTH, _DATE_WIDTH, _VALUE_WIDTH = 190, 70, 84
"""Pixels: name and four metrics fit beside MLflow's side panel in a window of 1280."""
_SECTION = "mechdiff-charts"
_LOCAL_UI = "http://127.0.0.1:5000"
# The UI gets slow when it compares many more.
_RUNS = 100
_CURVES = 40
"""Curves in one line chart, at most."""

_log = logging.getLogger(__name__)


def install_views(store: Store, experiment_id: str, tags: Mapping[str, str], curves: Iterable[str]) -> None:
    """Give an experiment with the tags `tags` the views, with line charts of metrics named `curves`, too.

    Never fails, for they are only a convenience.
    """
    try:
        known = [json.loads(tags.get(f"{_TAG}{key}", "{}")) for key in (CELLS, COMMANDS)]
        drawn = {*curves, *(curve for curve in known[1].get("curves", ()) if isinstance(curve, str))}
        for (tag, text), before in zip(view_tags(drawn).items(), known, strict=True):
            if json.loads(text)["state"] != before.get("state"):
                with store.errors():
                    store.client.set_experiment_tag(experiment_id, tag, text)
    except (MechdiffError, ValueError, AttributeError, TypeError, RecursionError) as error:
        _log.debug("The shared views of experiment %s were not written: %s", experiment_id, error)


def view_tags(curves: Iterable[str] = ()) -> dict[str, str]:
    """The tags of an experiment that hold the views."""
    now, drawn = int(time.time() * 1000), sorted(curves)[:_CURVES]
    tags = {}
    for key, state in ((CELLS, _cells()), (COMMANDS, _commands(drawn))):
        packed = "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
        view = {"name": key, "createdAt": now, "updatedAt": now, "state": packed, "curves": drawn}
        tags[f"{_TAG}{key}"] = json.dumps(view)
    return tags


def view_path(experiment_id: str, key: str = CELLS) -> str:
    """Link within MLflow's pages to the experiment's runs in a view."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}&workflowType=machine_learning"


def view_url(store: Store, experiment_id: str) -> str:
    """Link to the experiment's maps in the shared view."""
    address = store.shown if store.is_server else _LOCAL_UI
    return f"{address}/{view_path(experiment_id)}"


def ui_command(store: Store) -> str | None:
    """What to type to see a local store in the browser, where the links lead; None for a server's."""
    return None if store.is_server else f"mlflow ui --backend-store-uri {shlex.quote(store.shown)}"


def _cells() -> dict[str, Any]:
    # The metric `rank`, not the param `k`: the UI leaves the rows of "full" out of a numeric axis.
    rank, drop = ({"key": key, "type": "METRIC"} for key in ("rank", "drop_pct"))
    layer, kl_raw = {"key": "layer", "type": "PARAM"}, {"key": "KL_raw", "type": "METRIC"}
    charts = [
        _chart("SCATTER", name="layer-kl", xaxis=layer, yaxis=kl_raw),
        _chart("PARALLEL", selectedParams=["layer", "hook", "alpha"], selectedMetrics=["rank", "drop_pct"]),
        _chart("SCATTER", xaxis=rank, yaxis=drop),
        _chart("CONTOUR", xaxis=rank, yaxis={"key": "alpha", "type": "PARAM"}, zaxis=drop),
        _chart("BAR", metricKey="drop_pct"),
    ]
    return _state("tags.`mechdiff.kind` = 'patch'", "metrics.`drop_pct`", charts)


def _commands(curves: Sequence[str]) -> dict[str, Any]:
    over_layers = [f"{key}/{hook}" for key in ("KL_raw", "drop_pct") for hook in Hook]
    over_k = [curve for curve in curves if curve not in over_layers]
    names = {"KL_raw over layers": over_layers[: len(Hook)], "drop_pct over layers": over_layers[len(Hook) :]}
    names |= {"drop_pct over k": over_k} if over_k else {}
    charts = [
        _chart("LINE", name=name.replace(" ", "-"), displayName=name, metricKey=keys[0], **_line(keys))
        for name, keys in names.items()
    ]
    return _state("tags.`mechdiff.kind` != 'fit'", "attributes.start_time", charts)


def _line(keys: Sequence[str]) -> dict[str, Any]:
    axis = {"xAxisKey": "step", "useGlobalXaxisKey": False, "scaleType": "linear"}
    return {"selectedMetricKeys": list(keys), **axis}


def _state(where: str, order: str, charts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = [f"metrics.`{key}`" for key in _METRICS] + [f"params.`{key}`" for key in _PARAMS]
    columns += [f"metrics.`{key}`" for key in _MORE_METRICS]
    section = {"uuid": _SECTION, "name": "Maps", "display": True, "isReordered": False}
    return {
        "searchFilter": where,
        "orderByKey": order,
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "columnOrder": [_RUN_NAME, _DATE, *columns],
        "columnWidths": {_RUN_NAME: _NAME_WIDTH, _DATE: _DATE_WIDTH, **dict.fromkeys(columns, _VALUE_WIDTH)},
        "runsHiddenMode": "SHOWALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "compareRunSections": [{**section, "deleted": False, "isGenerated": False}],
        "compareRunCharts": charts,
    }


def _chart(kind: str, name: str = "", **settings: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "uuid": f"mechdiff-{name or kind.lower()}",
        "metricSectionId": _SECTION,
        "deleted": False,
        "isGenerated": False,
        "showAllRuns": True,
        "runsCountToCompare": _RUNS,
        **settings,
    }
