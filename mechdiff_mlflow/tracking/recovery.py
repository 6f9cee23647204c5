"""What killed processes left: commands to finish, and runs that stay RUNNING for ever."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run, ViewType

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.keys import ROOT_TAG
from mechdiff_mlflow.tracking.lease import LEASE_S, Holder, holder_in, is_alive
from mechdiff_mlflow.tracking.lookup import all_runs
from mechdiff_mlflow.tracking.provenance import code_version
from mechdiff_mlflow.tracking.store import Store, StoreUnreachable

RESUME_TAG = "mechdiff.resume"
"""Tag of a top run: the command that it is of, as JSON."""

_POLL_S = 2.0
_DIED = "The process that wrote this run died"


@dataclass(frozen=True, slots=True)
class Command:
    """A command whose run can be resumed.

    Args:
        argv: Its words after `mechdiff`, with every option that its numbers depend on.
        folder: The working directory that relative paths in it start from; empty where there are none.
        code: Version of the code.
        has_parent: Whether its results lie below its run, and not in it.
    """

    argv: tuple[str, ...]
    folder: str
    code: str
    has_parent: bool

    @classmethod
    def here(cls, argv: Sequence[str], *, has_parent: bool) -> Command:
        """A command of this process."""
        is_relative = any(word and not Path(word).is_absolute() and Path(word).exists() for word in argv[1:])
        return cls(tuple(argv), str(Path.cwd()) if is_relative else "", code_version(), has_parent)

    @property
    def tag(self) -> dict[str, str]:
        """The tag that says so."""
        fields = {"argv": self.argv, "folder": self.folder, "code": self.code, "parent": self.has_parent}
        return {RESUME_TAG: json.dumps(fields)}

    @classmethod
    def of(cls, run: Run) -> Command:
        """What a run says of itself; anybody who may write tags may have written it.

        Raises:
            MechdiffError: The run does not say how to go on with it.
        """
        try:
            fields = json.loads(run.data.tags[RESUME_TAG])
            argv, folder, code, parent = (fields[key] for key in ("argv", "folder", "code", "parent"))
            texts = [*argv, folder, code]
            if (
                not isinstance(argv, list)
                or not argv
                or not all(isinstance(text, str) for text in texts)
                or not isinstance(parent, bool)
            ):
                raise ValueError("not as written")
        except (KeyError, ValueError, TypeError) as error:
            raise MechdiffError(
                f"Run {run.info.run_id} does not say which command it is of; repeat that command instead."
            ) from error
        return cls(tuple(argv), folder, code, parent)

    def check(self, run: Run) -> None:
        """Make sure that the same code would go on with the same files.

        Raises:
            MechdiffError: It would not.
        """
        run_id = run.info.run_id
        if self.code != code_version():
            raise MechdiffError(
                f"Run {run_id} was begun with mechdiff {self.code} and this is {code_version()}, whose "
                "numbers may differ; use that version, or repeat the command."
            )
        is_here = Path(self.folder).is_dir() and Path(self.folder).samefile(Path.cwd())
        if self.folder and not is_here:
            raise MechdiffError(
                f"Run {run_id} was begun in {self.folder}, where the paths of its command start; go there "
                "(on that machine) and resume."
            )


def run_to_resume(store: Store, run_id: str | None) -> Run | None:
    """The run that was asked for, or the newest unfinished one that no process is at work on, if any.

    Raises:
        MechdiffError: The run does not exist, or is below another.
    """
    if run_id is None:
        for run in _runs(store, "attributes.status != 'FINISHED'"):
            if RESUME_TAG in run.data.tags and is_alive(store, run) is not True:
                return run
        return None
    with store.errors():
        run = store.client.get_run(run_id)
    if run.info.lifecycle_stage == "deleted":
        raise MechdiffError(f"Run {run_id} is deleted; `mlflow runs restore --run-id {run_id}` first.")
    if ROOT_TAG in run.data.tags:
        raise MechdiffError(
            f"Run {run_id} is one of a command's; resume its parent {run.data.tags[ROOT_TAG]}."
        )
    return run


@dataclass(frozen=True, slots=True)
class Stuck:
    """A run that is RUNNING and that nobody is known to be at work on.

    Args:
        run_id: Its id.
        experiment: Name of its experiment.
        name: Its name.
        started_ms: Unix time in ms.
        owner: Who wrote it; None where the run does not say.
        is_dead: Whether that process is known to be dead.
        root: Id of the top run.
        can_resume: Whether `mechdiff resume` would finish the top run.
        orphaned: Why the top run cannot be read; empty where it can.
    """

    run_id: str
    experiment: str
    name: str
    started_ms: int
    owner: Holder | None
    is_dead: bool
    root: str
    can_resume: bool
    orphaned: str = ""


def stuck_runs(store: Store, *, watch: bool = False) -> list[Stuck]:
    """Runs that are RUNNING although their process is dead, or may be.

    Args:
        store: Where to look, in every experiment.
        watch: Wait `LEASE_S` seconds to see whether processes of other machines are at work.
    """
    with store.errors():
        names = {e.experiment_id: e.name for e in store.client.search_experiments(ViewType.ACTIVE_ONLY)}
    running = _runs(store, "attributes.status = 'RUNNING'")
    tops: dict[str, Run] = {run.info.run_id: run for run in running if ROOT_TAG not in run.data.tags}
    gone: dict[str, tuple[bool, str]] = {}
    for run in running:
        root = run.data.tags.get(ROOT_TAG, run.info.run_id)
        if root not in tops and root not in gone:
            try:
                with store.errors():
                    tops[root] = store.client.get_run(root)
            except StoreUnreachable:
                raise
            except MechdiffError as error:
                cause = error.__cause__
                is_deleted = getattr(cause, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"
                gone[root] = is_deleted, "its parent is deleted for good" if is_deleted else str(error)
    alive = {root: is_alive(store, top) for root, top in tops.items()}
    far = [root for root, found in alive.items() if found is None and holder_in(tops[root].data.tags)]
    if watch and far:
        alive.update(_watched(store, {root: tops[root] for root in far}))
    found = []
    for run in running:
        root = run.data.tags.get(ROOT_TAG, run.info.run_id)
        if alive.get(root):
            continue
        what = (
            run.info.run_id,
            names.get(run.info.experiment_id, run.info.experiment_id),
            run.info.run_name or "",
            run.info.start_time or 0,
        )
        if root in gone:
            is_dead, why = gone[root]
            found.append(Stuck(*what, None, is_dead, root, can_resume=False, orphaned=why))
            continue
        top = tops[root]
        is_dead = alive[root] is False or (run is not top and top.info.status != "RUNNING")
        can_resume = RESUME_TAG in top.data.tags and top.info.status != "FINISHED"
        found.append(Stuck(*what, holder_in(top.data.tags), is_dead, root, can_resume))
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
                store.client.set_tag(one.run_id, "mechdiff.failure", f"{_DIED}{who}{remedy}.")
                store.client.set_terminated(one.run_id, "KILLED")
        except StoreUnreachable:
            raise
        except MechdiffError as error:
            left[one.run_id] = str(error)
    return left


def _watched(store: Store, runs: dict[str, Run]) -> dict[str, bool]:
    """Whether the owner of each run counted up while it was watched."""
    until = time.monotonic() + LEASE_S
    before = {run_id: holder_in(run.data.tags) for run_id, run in runs.items()}
    alive = dict.fromkeys(runs, False)
    while time.monotonic() < until and not all(alive.values()):
        time.sleep(_POLL_S)
        for run_id in [run_id for run_id, found in alive.items() if not found]:
            with suppress(MechdiffError), store.errors():
                run = store.client.get_run(run_id)
                alive[run_id] = holder_in(run.data.tags) != before[run_id]
    return alive


def _runs(store: Store, where: str) -> list[Run]:
    """All of every experiment, the newest first."""
    with store.errors():
        experiments = [e.experiment_id for e in store.client.search_experiments(ViewType.ACTIVE_ONLY)]
    return all_runs(store, experiments, where, newest_first=True)
