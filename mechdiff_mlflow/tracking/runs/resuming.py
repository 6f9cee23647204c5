"""Commands that a killed process left: which they are, who began them, and the runs they left.

Whoever may write to a store may give a run any tags. So a command's tag names a record in a local file of who
began it, with the digest of that command; `resume` goes on by itself only where that fits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from mlflow.entities import Run, ViewType
from pydantic import Field, TypeAdapter, ValidationError

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.untrusted import is_there
from mechdiff_mlflow.tracking.content.tag_names import ROOT_TAG
from mechdiff_mlflow.tracking.runs.lookup import all_runs
from mechdiff_mlflow.tracking.runs.mlflow_run import RUN_ID_VARIABLE
from mechdiff_mlflow.tracking.runs.provenance import PROCESS_TAG, code_version, provenance_tags
from mechdiff_mlflow.tracking.runs.run_lock import is_alive
from mechdiff_mlflow.tracking.store import user_cache
from mechdiff_mlflow.tracking.store.server import login_name
from mechdiff_mlflow.tracking.store.store import Store

RESUME_TAG = "mechdiff.resume"
"""Tag of a top run: the command that it is of, as JSON."""
_REPEAT_TAG = "mechdiff.repeat"
"""Tag of a top run: a digest of what was asked, a dot, and one of what it is to hold."""

_RECORD = re.compile("[0-9a-f]{32}")
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class LocalRecord:
    """What this machine knows of a command that was begun on it."""

    command: str  # its digest
    who: str  # the user's login to the store, or of the system
    trusts: bool  # whether its pair's spec said `trust_remote_code: true`
    run_id: str = ""  # its top run, so that its tag proves nothing on another; empty until that is made


@dataclass(frozen=True, slots=True)
class Command:
    """A command whose run can be resumed."""

    argv: Annotated[tuple[str, ...], Field(min_length=1)]  # its words after `mechdiff`
    folder: str  # the working directory that relative paths in it start from; empty where there are none
    code: str  # version of the code
    parent: bool  # whether its results lie below its run, and not in it
    record: str = ""  # name of the local record of who began it

    @classmethod
    def here(cls, argv: Sequence[str], who: str, *, has_parent: bool, trusts: bool) -> Command:
        """A command of this process, noted on this machine."""
        names = [name for word in argv[1:] for name in names_in(word)]
        is_relative = any(not Path(name).is_absolute() and is_there(Path(name)) for name in names)
        folder = str(Path.cwd()) if is_relative else ""
        command = cls(tuple(argv), folder, code_version(), has_parent, secrets.token_hex(16))
        # Where it cannot be written, who resumes the run has to say that it is wanted.
        _write(command.record, LocalRecord(command.digest, who, trusts))
        return command

    @property
    def digest(self) -> str:
        """SHA-256 of what it does, in hex."""
        what = json.dumps([self.argv, self.folder, self.code, self.parent])
        return hashlib.sha256(what.encode()).hexdigest()

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
        record = _read(self.record)
        is_same = record is not None and (record.command, record.run_id or run_id) == (self.digest, run_id)
        return record if is_same else None

    def begun(self, run_id: str, before: str | None) -> None:
        """Note which run the command got; `before` is the record of the command that it goes on with."""
        if (record := _read(self.record)) is not None:
            _write(self.record, replace(record, run_id=run_id))
        if before:
            _forget(before)

    def done(self) -> None:
        """Forget the command, which is finished."""
        _forget(self.record)

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


_COMMAND, _LOCAL_RECORD = TypeAdapter(Command), TypeAdapter(LocalRecord)


def names_in(word: str) -> list[str]:
    """What may be names of files in a command's word: all of it, and what commas and colons part."""
    return [name for name in (word, *re.split("[,:]", word)) if name]


def newest_of_mine(store: Store) -> tuple[Run | None, list[str]]:
    """This user's newest unfinished run that no process is at work on, if any; and what others' runs are."""
    me, mine, others = user_of(store), None, []
    with store.errors():
        experiments = [e.experiment_id for e in store.client.search_experiments(ViewType.ACTIVE_ONLY)]
    where = f"attributes.status != 'FINISHED' and tags.`{RESUME_TAG}` LIKE '{{%'"
    for run in all_runs(store, experiments, where):
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
    user, process = (run.data.tags.get(key, "unknown")[:100] for key in ("mlflow.user", PROCESS_TAG))
    return f"{user} on {process.partition(',')[0]}"


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
class EarlierAttempts:
    """The runs that earlier attempts at the same left."""

    tag: dict[str, str]  # for the run, if one is to be made or gone on with
    finished: Run | None = None  # the run that holds all this already
    unfinished: str | None = None  # id of a run that this machine's attempt left, to be gone on with


def earlier_attempts(store: Store, experiment: str, asked: Any, content: Any = "") -> EarlierAttempts:
    """The runs that attempts at the same request made in an experiment, which need not exist.

    `asked` is what makes it the same request, `content` what the run is to hold, both as JSON: where the
    content is another now, a finished run is another, too.
    """
    request = _digest([asked, code_version()])
    tag = f"{request}.{_digest(content)}"
    with store.errors():
        there = store.client.get_experiment_by_name(experiment)
    if there is None or RUN_ID_VARIABLE in os.environ:  # `mlflow run` has made another run for this
        return EarlierAttempts({_REPEAT_TAG: tag})
    found = all_runs(store, [there.experiment_id], f"tags.`{_REPEAT_TAG}` LIKE '{request}.%'")
    finished = (run for run in found if run.info.status == "FINISHED" and run.data.tags[_REPEAT_TAG] == tag)
    left = (run for run in found if run.info.status != "FINISHED" and is_alive(store, run) is False)
    unfinished = next((run.info.run_id for run in left), None)
    return EarlierAttempts({_REPEAT_TAG: tag}, next(finished, None), unfinished)


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def _record_file(name: str) -> Path | None:
    return user_cache.cache_root() / "began" / f"{name}.json" if _RECORD.fullmatch(name) else None


def _read(name: str) -> LocalRecord | None:
    if (path := _record_file(name)) is None:
        return None
    try:
        with path.open("rb") as file:
            return _LOCAL_RECORD.validate_json(file.read(_MAX_BYTES), strict=True)
    except (OSError, ValidationError):
        return None


def _write(name: str, record: LocalRecord) -> None:
    if (path := _record_file(name)) is not None:
        user_cache.write(path, _LOCAL_RECORD.dump_json(record))


def _forget(name: str) -> None:
    if (path := _record_file(name)) is not None:
        with suppress(OSError):
            path.unlink()
