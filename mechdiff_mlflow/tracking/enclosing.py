"""The run that an enclosing `mlflow run` made for us, when we cannot even start."""

from __future__ import annotations

import os

from mechdiff_mlflow.errors import MechdiffError


def note_failure(reason: str) -> None:
    """Write why the command failed on the run that `mlflow run` waits for; it marks the run FAILED itself.

    Does nothing outside `mlflow run`, or when the run has been taken over, which then ends it.
    """
    run_id = os.environ.pop("MLFLOW_RUN_ID", None)
    if not run_id:
        return
    from mechdiff_mlflow.tracking.redaction import redact
    from mechdiff_mlflow.tracking.store import open_store

    reason = redact(reason)
    try:
        store = open_store()
        with store.errors():
            store.client.set_tag(run_id, "mechdiff.failure", reason[:5000])
            store.client.set_tag(run_id, "mlflow.note.content", f"**FAILED:** {reason[:5000]}")
    except MechdiffError:
        return  # the user hears the reason itself, which matters more than where it could not be noted
