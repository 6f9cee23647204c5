"""Runs: one tree per command, written so that none is left RUNNING and nothing is there twice.

How is in docs/faults.md.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from mlflow.entities import Run, RunTag

from mechdiff_mlflow.tracking.content.records import ParamValue, RunRecord
from mechdiff_mlflow.tracking.content.tag_names import KEY_TAG
from mechdiff_mlflow.tracking.content.view import view_tags
from mechdiff_mlflow.tracking.runs.interrupts import Interrupts
from mechdiff_mlflow.tracking.runs.lookup import made_once, reopen
from mechdiff_mlflow.tracking.runs.mlflow_run import RUN_ID_VARIABLE, active_run, plain, tags_to_add
from mechdiff_mlflow.tracking.runs.open_run import OpenRun
from mechdiff_mlflow.tracking.runs.provenance import provenance_tags
from mechdiff_mlflow.tracking.runs.run_lock import RunLock, taken_over
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.store import Store

__all__ = ["RUN_ID_VARIABLE", "OpenRun", "Tracker"]


class Tracker:
    """Writes runs of one experiment, which is made if there is none.

    The run of an enclosing `mlflow run` brings its own experiment, and its children go there too. A run
    of this experiment that the calling program is in becomes the parent. `resume` is the id of an unfinished
    run to go on with; `as_asked` gives, for a param's name and its text as typed for `mlflow run`, the text
    that is logged; `about` names the models, for the experiment's description.
    """

    def __init__(
        self,
        store: Store,
        experiment: str,
        *,
        resume: str | None = None,
        as_asked: Callable[[str, str], str] = plain,
        about: str = "",
    ) -> None:
        self.store = store
        self.experiment = experiment
        self.as_asked = as_asked
        self.interrupts = Interrupts(store.retries.hurry)
        self._resume, self._about = resume, about

    @contextmanager
    def run(
        self,
        kind: str,
        name: str,
        params: Mapping[str, ParamValue] | None = None,
        *,
        tags: Mapping[str, str] | None = None,
        texts: Mapping[str, str] | None = None,
        description: str = "",
    ) -> Iterator[OpenRun]:
        """An open top-level run: the parent of a sweep's runs, or a lone `fit` or `patch`.

        Inside `mlflow run` it is the run that MLflow made (once); else a new one, or the one that is resumed.
        It ends FINISHED; FAILED when the body raises; KILLED on SIGTERM, SIGHUP or Ctrl-C. The reason becomes
        a tag and goes into the description.

        `texts` are sent before any work, so that a store that takes none is found then. Params that `mlflow
        run` has logged already must agree.

        Raises:
            MechdiffError: The store refuses, MLFLOW_RUN_ID names a run that cannot be continued, or another
                process is at work on the run that is resumed.
        """
        record = RunRecord(
            kind=kind,
            name=name,
            params=params or {},
            tags=tags or {},
            texts=texts or {},
            description=description,
        )
        with self.interrupts.active(), ExitStack() as stack:
            open_run = None
            failure: BaseException | None = None
            try:
                if self._resume is not None:  # may take a minute, and has made nothing yet
                    open_run = stack.enter_context(self._resumed(self._resume))
                else:
                    with self.interrupts.deferred():
                        open_run = stack.enter_context(self._new(record))
                with self.interrupts.deferred():
                    open_run.add(record)
                yield open_run
                with self.interrupts.deferred():
                    open_run.summarise()
                    open_run.renew_overview(kind, self._about)
            except BaseException as error:
                failure = error
                raise
            finally:
                if open_run is not None:
                    with self.interrupts.deferred():
                        open_run.end(failure)

    def log(self, record: RunRecord) -> str:
        """Write a lone finished run; its id."""
        with self.run(record.kind, record.name, record.params) as run:
            run.add(record)
        return run.run_id

    @contextmanager
    def _new(self, record: RunRecord) -> Iterator[OpenRun]:
        """A run that was just made, by us or by `mlflow run`."""
        lock = RunLock(self.store)
        run = self._attach(record, lock) or self._create(record, lock)
        with lock.kept(run.info.run_id):
            yield OpenRun(self.store, run, lock, self.interrupts, as_asked=self.as_asked)

    @contextmanager
    def _resumed(self, run_id: str) -> Iterator[OpenRun]:
        """An unfinished run that another process left, RUNNING again."""
        with self.store.errors():
            run = self.store.client.get_run(run_id)
        self.store.require_place(run.info.experiment_id)
        with taken_over(self.store, run) as lock:
            reopen(self.store, run, {"mechdiff.resumed": str(lock.owner.epoch - 1)})
            yield OpenRun(self.store, run, lock, self.interrupts, resumed=True, as_asked=self.as_asked)

    def _create(self, record: RunRecord, lock: RunLock) -> Run:
        experiment_id, above = self._place()
        key = uuid.uuid4().hex
        # With what resuming needs: a process may be killed before it can add another tag.
        tags = {**_redacted(record), **provenance_tags(), "mechdiff.kind": record.kind, KEY_TAG: key}
        tags |= lock.owner.tag | above
        return made_once(self.store, experiment_id, f"tags.`{KEY_TAG}` = '{key}'", record, tags)

    def _place(self) -> tuple[str, dict[str, str]]:
        """The id of the experiment, and the tag of a run below the active one where that is in there too."""
        run = active_run(self.store)
        if run is not None:
            with self.store.errors():
                theirs = self.store.client.get_experiment(run.info.experiment_id)
            if theirs.name == self.experiment:
                return str(theirs.experiment_id), {"mlflow.parentRunId": run.info.run_id}
        return self.store.experiment(self.experiment, view_tags()), {}

    def _attach(self, record: RunRecord, lock: RunLock) -> Run | None:
        # Taken out of the environment: a second run of this process, or of one it starts, is another run.
        run_id = os.environ.pop(RUN_ID_VARIABLE, None)
        if not run_id:
            return None
        with self.store.errors():
            run = self.store.client.get_run(run_id)
            self.store.require_place(run.info.experiment_id)
            tags = {**_redacted(record), **tags_to_add(run, record, provenance_tags()), **lock.owner.tag}
            self.store.client.log_batch(run_id, tags=[RunTag(key, text) for key, text in tags.items()])
        return run


def _redacted(record: RunRecord) -> dict[str, str]:
    return {key: redact(text) for key, text in record.tags.items()}
