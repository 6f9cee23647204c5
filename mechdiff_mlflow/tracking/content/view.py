"""The shared view that each experiment of ours opens with: columns, order, filter and charts in place.

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
from typing import Any

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store.store import Store

VIEW_KEY = "mechdiff"
_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
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

_log = logging.getLogger(__name__)


def install_view(store: Store, experiment_id: str, *, kind: str = "patch") -> None:
    """Give the experiment the view, listing its runs of `kind`; never fails, for it is only a convenience."""
    ours = view_tag(kind)
    try:
        with store.errors():
            tags = store.seen.get(experiment_id) or store.client.get_experiment(experiment_id).tags
            states = [json.loads(text).get("state") for text in (ours[_TAG], tags.get(_TAG, "{}"))]
            if states[0] != states[1]:
                store.client.set_experiment_tag(experiment_id, _TAG, ours[_TAG])
    except (MechdiffError, ValueError, AttributeError, RecursionError) as error:
        _log.debug("The shared view of experiment %s was not written: %s", experiment_id, error)


def view_tag(kind: str = "patch") -> dict[str, str]:
    """The tag of an experiment that holds the view."""
    now, packed = int(time.time() * 1000), zlib.compress(json.dumps(_state(kind)).encode())
    state = "deflate;" + base64.b64encode(packed).decode()
    return {_TAG: json.dumps({"name": "mechdiff", "createdAt": now, "updatedAt": now, "state": state})}


def view_url(store: Store, experiment_id: str) -> str:
    """Link to the experiment's runs in the shared view."""
    query = f"viewStateShareKey={VIEW_KEY}&workflowType=machine_learning"
    address = store.shown if store.is_server else _LOCAL_UI
    return f"{address}/#/experiments/{experiment_id}/runs?{query}"


def ui_command(store: Store) -> str | None:
    """What to type to see a local store in the browser, where the links lead; None for a server's."""
    return None if store.is_server else f"mlflow ui --backend-store-uri {shlex.quote(store.shown)}"


def _state(kind: str) -> dict[str, Any]:
    columns = [f"metrics.`{key}`" for key in _METRICS] + [f"params.`{key}`" for key in _PARAMS]
    columns += [f"metrics.`{key}`" for key in _MORE_METRICS]
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
    section = {"uuid": _SECTION, "name": "Maps", "display": True, "isReordered": False}
    return {
        "searchFilter": f"tags.`mechdiff.kind` = '{kind}'",
        "orderByKey": "attributes.start_time",
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
