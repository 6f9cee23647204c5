"""What surrounds a command: a run that `mlflow run` or the calling program made, a chosen experiment."""

from __future__ import annotations

import os

import mlflow
from mlflow.entities import Run

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store.database import sqlite_path
from mechdiff_mlflow.tracking.store.store import Store, StoreUnreachable, open_store

_NOBODY_CHOSE = "0"
"""Id of MLflow's Default experiment, where `mlflow run` puts what nobody chose a place for."""


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
    elif chosen == _NOBODY_CHOSE:
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
    path = sqlite_path(uri) if uri.startswith("sqlite:") else None
    return run if store.uri == uri.rstrip("/") or (path is not None and path == store.sqlite_path) else None


def note_failure(reason: str) -> None:
    """Write why the command failed on the run that `mlflow run` waits for; it marks the run FAILED itself.

    Does nothing outside `mlflow run`, or when the run has been taken over, which then ends it.
    """
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if not run_id:
        return
    from mechdiff_mlflow.tracking.store.redaction import redact

    reason = redact(reason)
    try:
        store = open_store()
        with store.errors():
            store.client.set_tag(run_id, "mechdiff.failure", reason[:5000])
            store.client.set_tag(run_id, "mlflow.note.content", f"**FAILED:** {reason[:5000]}")
    except MechdiffError:
        return  # the user hears the reason itself, which matters more than where it could not be noted
