"""The run and the experiment that a command is started in: by `mlflow run`, or by the calling program."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

import mlflow
from mlflow.entities import Run, RunTag
from mlflow.utils.name_utils import _GENERATOR_NOUNS, _GENERATOR_PREDICATES

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.text import number_in, text_of
from mechdiff_mlflow.tracking.content.records import MAX_TAG_CHARS, RunRecord
from mechdiff_mlflow.tracking.store.database import sqlite_path
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.store import Store, StoreUnreachable, open_store

RUN_ID_VARIABLE = "MLFLOW_RUN_ID"
_DEFAULT_EXPERIMENT = "0"
"""Id of MLflow's Default experiment, where `mlflow run` puts what nobody chose a place for."""
_CUT = " … (cut)"


def experiment_of(store: Store, asked: str | None, pair: str) -> str:
    """The name of the experiment that a command's runs go to, and are read from.

    `--experiment` comes first, then MLFLOW_EXPERIMENT_NAME and MLFLOW_EXPERIMENT_ID (which
    `mlflow.set_experiment` and `mlflow run --experiment-name` set), then that of the active run of this
    process, and last the pair's. Where `mlflow run` was told of none, the pair's if there is one.

    Raises:
        MechdiffError: The id is of no experiment.
    """
    name = asked or os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if name:
        return name
    chosen = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if not chosen:
        run = active_run(store)
        chosen = None if run is None else run.info.experiment_id
    elif chosen == _DEFAULT_EXPERIMENT:
        with store.errors():
            chosen = None if store.client.get_experiment_by_name(pair) is not None else chosen
    if chosen is None:
        return pair
    try:
        with store.errors():
            return str(store.client.get_experiment(chosen).name)
    except StoreUnreachable:
        raise
    except MechdiffError as error:
        raise MechdiffError(
            f"MLFLOW_EXPERIMENT_ID is {chosen[:80]!r} and {store.shown} has no such experiment; unset it, or "
            "name one with --experiment."
        ) from error


def active_run(store: Store) -> Run | None:
    """The run that the calling program is in, if that is of the same store."""
    run = mlflow.active_run()
    if run is None:
        return None
    uri = mlflow.get_tracking_uri()
    is_same = store.uri == uri.rstrip("/")
    return run if is_same or (uri.startswith("sqlite:") and sqlite_path(uri) == store.sqlite_path) else None


def note_failure(reason: str) -> None:
    """Write why the command failed on the run that `mlflow run` waits for; it marks the run FAILED itself.

    Does nothing outside `mlflow run`, or when the run has been taken over, which then ends it.
    """
    run_id = os.environ.pop(RUN_ID_VARIABLE, None)
    if not run_id:
        return
    try:
        store = open_store()
        with store.errors():
            store.client.log_batch(run_id, tags=failure_tags("FAILED", reason))
    except MechdiffError:
        return  # the user hears the reason itself, which matters more than where it could not be noted


def failure_tags(status: str, reason: str, description: str = "") -> list[RunTag]:
    """The tags that say why a run failed; what is longer than MLflow takes is cut visibly."""
    note = f"**{status}:** {reason}\n\n{description}"
    texts = {"mechdiff.failure": redact(reason), "mlflow.note.content": redact(note)}
    cut = MAX_TAG_CHARS - len(_CUT)
    return [RunTag(k, text if len(text) <= MAX_TAG_CHARS else text[:cut] + _CUT) for k, text in texts.items()]


def tags_to_add(run: Run, record: RunRecord, provenance: Mapping[str, str]) -> dict[str, str]:
    """The tags to add to the run that an enclosing `mlflow run` made.

    Raises:
        MechdiffError: It has ended already.
    """
    if run.info.status not in ("RUNNING", "SCHEDULED"):
        raise MechdiffError(
            f"{RUN_ID_VARIABLE} names run {run.info.run_id}, which is {run.info.status} already; unset it "
            "to start a new run."
        )
    tags = {key: value for key, value in provenance.items() if key not in run.data.tags}
    tags |= {"mechdiff.kind": record.kind}
    words = (run.info.run_name or "").split("-")
    is_made_up = (  # by MLflow, as `dapper-owl-42` is
        len(words) == 3
        and words[0] in {word.lower() for word in _GENERATOR_PREDICATES}
        and words[1] in {word.lower() for word in _GENERATOR_NOUNS}
    )
    return {**tags, "mlflow.runName": record.name} if is_made_up else tags


def params_of(run: Run) -> dict[str, str]:
    """A run's params as they were typed: `mlflow run` logs them quoted for the shell."""
    return {key: _unquoted(value) for key, value in run.data.params.items()}


def _unquoted(value: str) -> str:
    try:
        words = shlex.split(value)
    except ValueError:
        return value
    return words[0] if len(words) == 1 else value


def plain(key: str, text: str) -> str:
    """A param's text with a number in its one form, so that `0.30` is `0.3`; all else as it is."""
    try:
        return text_of(number_in(text))
    except ValueError:
        return text
