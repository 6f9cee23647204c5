"""Runs that stay RUNNING although the process that wrote them died."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlflow.entities import ViewType

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.content.tag_names import ROOT_TAG
from mechdiff_mlflow.tracking.runs.lookup import all_runs, runs_of
from mechdiff_mlflow.tracking.runs.resuming import RESUME_TAG
from mechdiff_mlflow.tracking.runs.run_lock import Owner, is_alive, owner_in, watched
from mechdiff_mlflow.tracking.store.store import Store, StoreUnreachable


@dataclass(frozen=True, slots=True)
class Stuck:
    """A run that is RUNNING and that nobody is known to be at work on."""

    run_id: str
    experiment: str  # its name
    name: str
    started_ms: int  # Unix time
    root: str  # id of the top run
    owner: Owner | None = None  # who wrote it; None where the run does not say
    is_dead: bool = False  # whether that process is known to be dead
    can_resume: bool = False  # whether `mechdiff resume` would finish the top run
    orphaned: str = ""  # why the top run cannot be read


def stuck_runs(store: Store, *, watch: bool = False) -> list[Stuck]:
    """Runs that are RUNNING although their process is dead, or may be, in every experiment.

    With `watch` it waits to see whether processes of other machines are at work.
    """
    with store.errors():
        names = {e.experiment_id: e.name for e in store.client.search_experiments(ViewType.ACTIVE_ONLY)}
    running = all_runs(store, list(names), "attributes.status = 'RUNNING'")
    tops = {run.info.run_id: run for run in running if ROOT_TAG not in run.data.tags}
    gone: dict[str, tuple[bool, str]] = {}
    above = {run.data.tags[ROOT_TAG] for run in running if ROOT_TAG in run.data.tags} - tops.keys()
    tops |= {run.info.run_id: run for run in runs_of(store, above)}
    for root in above - tops.keys():
        try:
            with store.errors():
                tops[root] = store.client.get_run(root)
        except StoreUnreachable:
            raise
        except MechdiffError as error:
            is_deleted = getattr(error.__cause__, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"
            gone[root] = is_deleted, "its parent is deleted for good" if is_deleted else str(error)
    alive = {root: is_alive(store, top) for root, top in tops.items()}
    if watch:
        far = {root for root, found in alive.items() if found is None and owner_in(tops[root].data.tags)}
        alive |= watched(store, {root: tops[root] for root in far})
    found = []
    for run in running:
        info, root = run.info, run.data.tags.get(ROOT_TAG, run.info.run_id)
        experiment = names.get(info.experiment_id, info.experiment_id)
        one = Stuck(info.run_id, experiment, info.run_name or "", info.start_time or 0, root)
        if root in gone:
            found.append(replace(one, is_dead=gone[root][0], orphaned=gone[root][1]))
        elif not alive[root]:
            top = tops[root]
            is_dead = alive[root] is False or (run is not top and top.info.status != "RUNNING")
            can_resume = RESUME_TAG in top.data.tags and top.info.status != "FINISHED"
            found.append(replace(one, owner=owner_in(top.data.tags), is_dead=is_dead, can_resume=can_resume))
    return found


def end_stuck(store: Store, stuck: Sequence[Stuck]) -> dict[str, str]:
    """Set runs whose process died KILLED, with the reason, the ones below others first; why not, by run id.

    Raises:
        StoreUnreachable: Then the rest is not tried.
    """
    left: dict[str, str] = {}
    for one in sorted(stuck, key=lambda one: one.run_id == one.root):
        who = "" if one.owner is None else f" ({one.owner})"
        remedy = f"; `mechdiff resume {one.root}` finishes it" if one.can_resume else ""
        try:
            with store.errors():
                store.client.set_tag(
                    one.run_id, "mechdiff.failure", f"The process that wrote this run died{who}{remedy}."
                )
                store.client.set_terminated(one.run_id, "KILLED")
        except StoreUnreachable:
            raise
        except MechdiffError as error:
            left[one.run_id] = str(error)
    return left
