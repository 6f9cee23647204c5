"""What killed processes left: commands to resume or repeat, and runs that stay RUNNING for ever."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from mlflow.entities import Run, ViewType
from pydantic import Field, TypeAdapter, ValidationError

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.untrusted import is_there
from mechdiff_mlflow.tracking.content.keys import ROOT_TAG
from mechdiff_mlflow.tracking.runs import local_records
from mechdiff_mlflow.tracking.runs.local_records import LocalRecord
from mechdiff_mlflow.tracking.runs.lookup import all_runs, runs_of
from mechdiff_mlflow.tracking.runs.mlflow_run import RUN_ID_VARIABLE
from mechdiff_mlflow.tracking.runs.provenance import code_version, provenance_tags
from mechdiff_mlflow.tracking.runs.run_lock import Owner, is_alive, owner_in, watched
from mechdiff_mlflow.tracking.store.server import login_name
from mechdiff_mlflow.tracking.store.store import Store, StoreUnreachable

RESUME_TAG = "mechdiff.resume"
"""Tag of a top run: the command that it is of, as JSON."""

_REPEAT_TAG = "mechdiff.repeat"
"""Tag of a top run: a digest of what was asked, a dot, and one of what it is to hold."""
_DIED = "The process that wrote this run died"


@dataclass(frozen=True, slots=True)
class Command:
    """A command whose run can be resumed.

    Args:
        argv: Its words after `mechdiff`, with every option that its numbers depend on.
        folder: The working directory that relative paths in it start from; empty where there are none.
        code: Version of the code.
        parent: Whether its results lie below its run, and not in it.
        record: Name of the local record of who began it.
        proof: That it is the command of that record.
    """

    argv: Annotated[tuple[str, ...], Field(min_length=1)]
    folder: str
    code: str
    parent: bool
    record: str = ""
    proof: str = ""

    @classmethod
    def here(cls, argv: Sequence[str], who: str, *, has_parent: bool, trusts: bool) -> Command:
        """A command of this process, noted on this machine."""
        is_relative = any(word and not Path(word).is_absolute() and is_there(Path(word)) for word in argv[1:])
        command = cls(tuple(argv), str(Path.cwd()) if is_relative else "", code_version(), has_parent)
        record, proof = local_records.begin(command.text, who, trusts=trusts)
        return replace(command, record=record, proof=proof)

    @property
    def text(self) -> str:
        """What the proof is of."""
        return json.dumps([self.argv, self.folder, self.code, self.parent])

    @property
    def tag(self) -> dict[str, str]:
        """The tag that says so."""
        return {RESUME_TAG: _COMMAND.dump_json(self).decode()}

    @classmethod
    def of(cls, run: Run) -> Command:
        """The command that a run says it is of; anybody who may write tags may have written it.

        Raises:
            MechdiffError: The run does not say how to go on with it.
        """
        try:
            return _COMMAND.validate_json(run.data.tags.get(RESUME_TAG, ""), strict=True)
        except ValidationError:
            raise MechdiffError(
                f"Run {run.info.run_id} does not say which command it is of; repeat that command instead."
            ) from None

    def begun_by(self, run_id: str) -> LocalRecord | None:
        """What this machine knows of who began it, if it was begun here and as it is now."""
        return local_records.proven(self.record, self.text, self.proof, run_id)

    def begun(self, run_id: str, before: str | None) -> None:
        """Note which run the command got; `before` is the record of the command that it goes on with."""
        local_records.bind(self.record, run_id)
        if before:
            local_records.forget(before)

    def done(self) -> None:
        """Forget the command, which is finished."""
        local_records.forget(self.record)

    def check(self, run: Run, *, is_ours: bool) -> None:
        """Make sure that the same code would go on, and with the same files where they are ours.

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
        if is_ours and self.folder and not is_here:
            raise MechdiffError(
                f"Run {run_id} was begun in {self.folder}, where the paths of its command start; go there "
                "(on that machine) and resume."
            )


_COMMAND = TypeAdapter(Command)


def newest_of_mine(store: Store) -> tuple[Run | None, list[str]]:
    """This user's newest unfinished run that no process is at work on, if any; and what others' runs are."""
    me, mine, others = user_of(store), None, []
    for run in _runs(store, f"attributes.status != 'FINISHED' and tags.`{RESUME_TAG}` LIKE '{{%'"):
        with suppress(MechdiffError):  # what says no command is none
            known = Command.of(run).begun_by(run.info.run_id)
            if known is None or known.who != me:
                others.append(f"{run.info.run_id} {run.info.run_name} ({who_began(run)})")
            elif mine is None and is_alive(store, run) is not True:
                mine = run
    return mine, others


def user_of(store: Store) -> str:
    """Who this user is to a store: the login where there is one, else the name on this machine."""
    login = login_name(store.uri) if store.is_server else None
    return f"login {login}" if login else provenance_tags()["mlflow.user"]


def who_began(run: Run) -> str:
    """User and host as a run's tags have them, for people."""
    user, host = (run.data.tags.get(key, "unknown")[:100] for key in ("mlflow.user", "mechdiff.host"))
    return f"{user} on {host}"


def top_run(store: Store, run_id: str) -> Run:
    """The run that was asked for.

    Raises:
        MechdiffError: It does not exist, is deleted, or is below another.
    """
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
class Earlier:
    """The runs that earlier attempts at the same left.

    Args:
        tag: For the run, if one is to be made or gone on with.
        finished: The run that holds all this already.
        unfinished: Id of a run that this machine's attempt left, to be gone on with.
    """

    tag: dict[str, str]
    finished: Run | None = None
    unfinished: str | None = None


def earlier(store: Store, experiment: str, asked: Any, content: Any = "") -> Earlier:
    """The run that an earlier attempt made, if any; deleted ones do not count.

    Args:
        store: Where to look.
        experiment: Name of the experiment, which need not exist.
        asked: What makes it the same request, as JSON holds it.
        content: What the run is to hold: where that is another now, a finished run is another, too.
    """
    request = _digest([asked, code_version()])
    tag = f"{request}.{_digest(content)}"
    with store.errors():
        there = store.client.get_experiment_by_name(experiment)
    if there is None or RUN_ID_VARIABLE in os.environ:  # `mlflow run` has made another run for this
        return Earlier({_REPEAT_TAG: tag})
    found = all_runs(
        store, [there.experiment_id], f"tags.`{_REPEAT_TAG}` LIKE '{request}.%'", newest_first=True
    )
    finished = (run for run in found if run.info.status == "FINISHED" and run.data.tags[_REPEAT_TAG] == tag)
    left = (run for run in found if run.info.status != "FINISHED" and is_alive(store, run) is False)
    unfinished = next((run.info.run_id for run in left), None)
    return Earlier({_REPEAT_TAG: tag}, next(finished, None), unfinished)


@dataclass(frozen=True, slots=True)
class Stuck:
    """A run that is RUNNING and that nobody is known to be at work on.

    Args:
        run_id: Its id.
        experiment: Name of its experiment.
        name: Its name.
        started_ms: Unix time in ms.
        root: Id of the top run.
        owner: Who wrote it; None where the run does not say.
        is_dead: Whether that process is known to be dead.
        can_resume: Whether `mechdiff resume` would finish the top run.
        orphaned: Why the top run cannot be read; empty where it can.
    """

    run_id: str
    experiment: str
    name: str
    started_ms: int
    root: str
    owner: Owner | None = None
    is_dead: bool = False
    can_resume: bool = False
    orphaned: str = ""


def stuck_runs(store: Store, *, watch: bool = False) -> list[Stuck]:
    """Runs that are RUNNING although their process is dead, or may be, in every experiment.

    With `watch` it waits to see whether processes of other machines are at work.
    """
    with store.errors():
        names = {e.experiment_id: e.name for e in store.client.search_experiments(ViewType.ACTIVE_ONLY)}
    running = _runs(store, "attributes.status = 'RUNNING'")
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
                store.client.set_tag(one.run_id, "mechdiff.failure", f"{_DIED}{who}{remedy}.")
                store.client.set_terminated(one.run_id, "KILLED")
        except StoreUnreachable:
            raise
        except MechdiffError as error:
            left[one.run_id] = str(error)
    return left


def _runs(store: Store, where: str) -> list[Run]:
    """All of every experiment, the newest first."""
    with store.errors():
        experiments = [e.experiment_id for e in store.client.search_experiments(ViewType.ACTIVE_ONLY)]
    return all_runs(store, experiments, where, newest_first=True)


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]
