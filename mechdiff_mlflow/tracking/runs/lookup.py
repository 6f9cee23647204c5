"""Runs that are looked up: all that a filter finds, a new one where it finds none, one to go on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from mlflow.entities import Run, RunTag, ViewType

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.runs.provenance import provenance_tags
from mechdiff_mlflow.tracking.store.store import Store

MOST_VALUES = 40
"""Conditions in one filter; some stores join at most 64 tables, one for each."""
_PAGE = 1000
_IDS = 100


def all_runs(store: Store, experiment_ids: Sequence[str], where: str = "") -> list[Run]:
    """Every run of some experiments that MLflow's filter `where` finds, newest first, no deleted ones."""
    return list(each_run(store, experiment_ids, where))


def each_run(
    store: Store,
    experiment_ids: Sequence[str],
    where: str = "",
    *,
    order: Sequence[str] = (),
    page: int = _PAGE,
    view: int = ViewType.ACTIVE_ONLY,
) -> Iterator[Run]:
    """The same in MLflow's `order`, equal ones newest first, asked for page by page as they are taken."""
    if not experiment_ids:
        return
    ids, by = [*experiment_ids], [*order]
    yield from store.every(
        lambda token: store.client.search_runs(ids, where, view, page, by, page_token=token)
    )


def runs_of(store: Store, run_ids: Iterable[str]) -> list[Run]:
    """The runs with some ids that are not deleted, in whichever experiment, many at a request."""
    ids = list(run_ids)
    with store.errors():
        places = [found.experiment_id for found in store.client.search_experiments(ViewType.ALL)]
    batches = [ids[start : start + _IDS] for start in range(0, len(ids), _IDS)]
    wheres = [f"attributes.run_id IN ({', '.join(map(repr, batch))})" for batch in batches]
    return [run for where in wheres for run in each_run(store, places, where)]


def can_quote(text: str) -> bool:
    """Whether MLflow's filters can have a text in them."""
    return not {"'", '"'} <= {*text}


def quoted(text: str) -> str:
    """A text in MLflow's filters.

    Raises:
        MechdiffError: It cannot be in one.
    """
    if not can_quote(text):
        raise MechdiffError(f"{text!r:.300} has both kinds of quotes, which MLflow cannot search for.")
    return f'"{text}"' if "'" in text else f"'{text}'"


def made_once(
    store: Store,
    experiment_id: str,
    where: str,
    record: RunRecord,
    tags: dict[str, str],
    *,
    look: bool = False,
    require: Callable[[], None] = lambda: None,
) -> Run:
    """A new run with the name and start of `record` and some tags, made exactly once.

    The filter `where` finds this run and no other; it is looked up after an answer was lost, and with `look`
    before it is made the first time, too. `require` is called right before each request that makes it, and
    raises if another process does that by now.
    """

    def find() -> Run | None:
        return next(each_run(store, [experiment_id], where), None)

    started_ms = record.started_ms or int(time.time() * 1000)

    def create() -> Run:
        require()
        return store.client.create_run(experiment_id, started_ms, tags, record.name)

    with store.errors():
        if look and (found := find()) is not None:
            return found
        return store.retries.once(create, find)


def reopen(store: Store, left: Run, tags: Mapping[str, str]) -> None:
    """Have a run that an earlier attempt left unfinished RUNNING again, as this process's, with more tags."""
    client, run_id = store.client, left.info.run_id
    with store.errors():
        every = {**provenance_tags(), **tags}
        client.log_batch(run_id, tags=[RunTag(key, text) for key, text in every.items()])
        client.update_run(run_id, status="RUNNING")
        if "mechdiff.failure" in left.data.tags:
            client.delete_tag(run_id, "mechdiff.failure")
