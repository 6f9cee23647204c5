"""Runs as a table: what `search_runs` gives, with params as numbers and the columns a person wants first."""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
from mlflow.entities import Run, ViewType

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.tracking.content.artifact_files import StoredFiles, check_read, sent_digest
from mechdiff_mlflow.tracking.content.cells import CELLS, read_cells
from mechdiff_mlflow.tracking.content.tag_names import PAIR_FINGERPRINT
from mechdiff_mlflow.tracking.runs.lookup import MOST_VALUES, all_runs, can_quote, each_run, quoted, runs_of
from mechdiff_mlflow.tracking.store.store import Store, StoreUnreachable

_MAX_TABLE = 256 << 20
# Not what Python reads as numbers: 1_000, nan and 007 stay text.
_INTEGER = r"-?(?:0|[1-9]\d{0,17})"
_DECIMAL = r"-?(?:0|[1-9]\d*)(?:\.\d*)?(?:[eE][+-]?\d+)?"
_PARENT = "mlflow.parentRunId"
_PATCHES = "tags.`mechdiff.kind` = 'patch'"
_CHILDLESS = ("report", "compare", "layers", "heads", "import", "steer", "adapter")
_SAME_AGAIN = ("run", "sweep", "atlas", "layers", "heads")
"""Kinds of runs whose results follow from settings, pair and code."""
_SAYS_NOTHING = ("report", "compare", "import", "steer", "adapter")
_SAME_TAGS = ("mechdiff.command", "mechdiff.version", "mlflow.source.git.commit", PAIR_FINGERPRINT)
"""What two runs of the same command, code and pair have in common."""
_FEW = 10
_MANY = 50
"""Runs whose children are asked for one run at a time, rather than all patch runs there are."""
_FIRST = ["run_id", "name", "kind", "status", "parent_id", "started"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def summarised(
    store: Store, experiment: str, tables: Mapping[str, str]
) -> tuple[pd.DataFrame, dict[str, dict[str, pd.DataFrame]]]:
    """The top runs of an experiment and the patch runs below them, one row each, newest first; and tables.

    A param that reads as a number, true or false is one, so that `k` may hold 1, 8 and "full"; a metric with
    the name of a param gets the column `metric.<name>`; tags are text columns `tag.<name>`. What a finished
    run says of its patch runs is read in place of those. Of commands that were repeated with the same
    settings, pair and code, only the newest one that finished counts, and what was begun since.

    Args:
        store: Where to look.
        experiment: Name of the experiment.
        tables: Paths of tables, each with the kind of top run that has it; the result has them by run id.

    Raises:
        MechdiffError: There is no such experiment.
    """
    ids = [store.experiment_id(experiment)]
    tops = _newest_of_each(_top_runs(store, ids))
    rows, asked = [_row(run) for run in tops], []
    for run in tops:
        kind = run.data.tags.get("mechdiff.kind")
        if kind in _CHILDLESS or (kind == "patch" and "KL_mapped" in run.data.metrics):
            continue
        cells = _cells_of(store, run)
        if cells is None:
            asked.append(run.info.run_id)
        else:
            rows += cells
    if any(row["kind"] == "patch" for row in rows):
        gone = each_run(store, ids, _PATCHES, view=ViewType.DELETED_ONLY)
        deleted = {run.info.run_id for run in gone}
        rows = [row for row in rows if row["run_id"] not in deleted]
    if len(asked) > _MANY:  # one request for all
        below = [run for run in all_runs(store, ids, _PATCHES) if run.data.tags.get(_PARENT) in asked]
    else:
        below = [run for one in asked for run in all_runs(store, ids, f"tags.`{_PARENT}` = '{one}'")]
    rows += map(_row, below)
    rows.sort(key=lambda row: (-row["started"].value, row["run_id"]))
    done = [run for run in tops if run.info.status == "FINISHED"]
    found = {
        path: _tables(store, [run for run in done if run.data.tags.get("mechdiff.kind") == kind], path)
        for path, kind in tables.items()
    }
    return _frame(rows), found


def tables_of(store: Store, run_ids: Iterable[str], path: str) -> dict[str, pd.DataFrame]:
    """The table at `path` among the artifacts of each run that has it.

    Raises:
        MechdiffError: The store cannot be read, or a table is not what was logged.
    """
    return _tables(store, runs_of(store, run_ids), path)


def _tables(store: Store, runs: Iterable[Run], path: str) -> dict[str, pd.DataFrame]:
    found: dict[str, pd.DataFrame] = {}
    for run in runs:
        is_there = sent_digest(run.data.tags, path) is not None  # a run of ours says which files it has
        if not is_there:
            with store.errors():
                is_there = path in [item.path for item in store.client.list_artifacts(run.info.run_id)]
        if is_there:
            found[run.info.run_id] = _read(store, run, path, _table)
    return found


def _read(store: Store, run: Run, path: str, parse: Callable[[Path], _T]) -> _T:
    """What `parse` makes of an artifact, if that is what was logged."""
    with store.errors(), tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
        local = StoredFiles(store, run.info.artifact_uri).read_back([path], Path(folder)) / path
        check_read(local, path, run.info.run_id, run.data.tags)
        return parse(local)


def _top_runs(store: Store, ids: list[str]) -> list[Run]:
    """Runs that are below no other, newest first; a lone patch is told by what only such runs have.

    Of those that say nothing of patches, and that a newer one was the same as, not all are asked for.
    """
    wheres = [f"{_PATCHES} and tags.`{tag}` LIKE '%'" for tag in (_SAME_TAGS[0], "mechdiff.lease.1")]
    found = {run.info.run_id: run for where in wheres for run in each_run(store, ids, where)}
    kinds = [f"tags.`mechdiff.kind` != '{kind}'" for kind in ("patch", "fit", *_SAYS_NOTHING)]
    found |= {run.info.run_id: run for run in _not_all(partial(each_run, store, ids), kinds)}
    tops = [run for run in found.values() if _PARENT not in run.data.tags]
    return sorted(tops, key=lambda run: (-(run.info.start_time or 0), run.info.run_id))


def _not_all(each: Callable[..., Iterable[Run]], where: list[str]) -> Iterator[Run]:
    """Runs that MLflow's filters find, without most of those that are as a newer one, which finished.

    Where a page is full, the next leaves out its commands; of each command, what had another code or pair is
    looked for likewise.
    """
    commands: dict[str, Run] = {}
    while True:
        left = [*where, *(_is_other(_SAME_TAGS[0], run) for run in commands.values())]
        page = list(islice(each(" and ".join(left), page=_FEW), _FEW))
        yield from page
        if len(page) < _FEW:
            break
        fresh = {
            run.data.tags[_SAME_TAGS[0]]: run
            for run in reversed(page)
            if run.info.status == "FINISHED"
            and run.data.tags.get("mechdiff.kind") in _SAME_AGAIN
            and all(can_quote(run.data.tags.get(key, "")) for key in _SAME_TAGS)
            and _SAME_TAGS[0] in run.data.tags
        }
        # Some stores join at most 64 tables, one for each condition.
        if not fresh.keys() - commands.keys() or len(where) + len(commands) + len(fresh) > MOST_VALUES:
            yield from each(" and ".join(left))
            break
        commands |= fresh
    for run in commands.values():
        at = [*where]
        for before, key in pairwise(_SAME_TAGS):
            at += [f"tags.`{before}` = {quoted(run.data.tags[before])}"] if before in run.data.tags else []
            yield from _not_all(each, [*at, _is_other(key, run)])


def _is_other(key: str, run: Run) -> str:
    """The filter of runs that have a tag with another text."""
    text = run.data.tags.get(key)
    return f"tags.`{key}` LIKE '%'" if text is None else f"tags.`{key}` != {quoted(text)}"


def _newest_of_each(runs: Iterable[Run]) -> list[Run]:
    """Without those that a newer one, which finished, was the same as."""
    seen: set[tuple[object, ...]] = set()
    kept = []
    for run in runs:
        tags = run.data.tags
        kind = tags.get("mechdiff.kind")
        asked = (kind, *map(tags.get, _SAME_TAGS[1:]), *sorted(run.data.params.items()))
        if asked not in seen or kind not in _SAME_AGAIN:
            kept.append(run)
            if run.info.status == "FINISHED":
                seen.add(asked)
    return kept


def _cells_of(store: Store, run: Run) -> list[dict[str, Any]] | None:
    """Rows of the patch runs below a run; None where they have to be asked for."""
    if run.info.status != "FINISHED" or sent_digest(run.data.tags, CELLS) is None:
        return None
    try:
        cells = _read(store, run, CELLS, read_cells)
    except StoreUnreachable:
        raise
    except MechdiffError as error:
        _log.warning("%s The runs themselves are read instead.", error)
        return None
    return [
        _row_of(
            [cell["run_id"], cell["name"], "patch", "FINISHED", run.info.run_id, cell["started_ms"]],
            cell["params"],
            cell["metrics"],
            cell["tags"],
        )
        for cell in cells
    ]


def _table(path: Path) -> pd.DataFrame:
    try:
        content = json.loads(untrusted.read_text(path, _MAX_TABLE, "Table"))
        table: pd.DataFrame = pd.DataFrame(content["data"], columns=content["columns"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise MechdiffError(f"{path.name} is not a table that was logged; run that step again.") from error
    return table


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    columns = _FIRST + sorted({key for row in rows for key in row if key not in _FIRST})
    table: pd.DataFrame = pd.DataFrame(rows, columns=columns)
    return table


def _row(run: Run) -> dict[str, Any]:
    info, tags = run.info, run.data.tags
    first = [info.run_id, info.run_name, tags.get("mechdiff.kind"), info.status, tags.get(_PARENT)]
    return _row_of([*first, info.start_time], run.data.params, run.data.metrics, tags)


def _row_of(
    first: list[Any], params: Mapping[str, str], metrics: Mapping[str, float], tags: Mapping[str, str]
) -> dict[str, Any]:
    """A row with the columns `_FIRST`, of which the last is a Unix time in ms, and what a run holds."""
    row: dict[str, Any] = dict(zip(_FIRST, first, strict=True))
    row["started"] = pd.to_datetime(row["started"], unit="ms", utc=True, errors="coerce")
    row |= {key if key not in _FIRST else f"param.{key}": _value(text) for key, text in params.items()}
    row |= {key if key not in row else f"metric.{key}": value for key, value in metrics.items()}
    row |= {f"tag.{key}": text for key, text in tags.items() if not key.startswith("mlflow.")}
    return row


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    if re.fullmatch(_INTEGER, text):
        return int(text)
    if re.fullmatch(_DECIMAL, text) and math.isfinite(number := float(text)):
        return number
    return text
