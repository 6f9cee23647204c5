"""A scratch experiment in which one tries out what one may do on a store, removed again afterwards."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mlflow.entities import LoggedModelStatus, Metric, Param, RunTag
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import is_local_uri

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store.store import Store

PREFIX = "mechdiff-server-check"
_PROBE_BYTES = 256 * 1024


class Scratch:
    """An experiment, a run, a logged model and a registered map under a name that nobody else uses.

    The methods `runs`, `artifacts` and `registry`, in this order, each try a group of calls and say what they
    saw; they raise `MechdiffError` where the store refuses or does something else than it was asked.
    """

    def __init__(self, store: Store) -> None:
        self.name = f"{PREFIX}-{secrets.token_hex(4)}"
        self.artifact_uri = ""
        """Where the run's artifacts go."""
        self._store, self._client = store, store.client
        self._undo: list[tuple[str, Callable[[], object]]] = []
        self._run_id = self._model_id = ""

    def runs(self) -> str:
        """Make the experiment, a run with a param, a metric and a tag, and a logged model."""
        client, name = self._client, self.name
        experiment_id = self._store.experiment(name)
        self._undo.append((f"experiment {name}", lambda: client.delete_experiment(experiment_id)))
        with self._store.errors():
            run = client.create_run(experiment_id, run_name=name)
            self._run_id, self.artifact_uri = run.info.run_id, run.info.artifact_uri
            self._undo.append((f"run {self._run_id}", lambda: client.delete_run(self._run_id)))
            metric = Metric("checked", 1.0, int(time.time() * 1000), 0)
            client.log_batch(self._run_id, [metric], [Param("check", name)], [RunTag("check", name)])
            client.set_terminated(self._run_id)
            self._model_id = client.create_logged_model(experiment_id, name, self._run_id).model_id
            undo = (f"logged model {self._model_id}", lambda: client.delete_logged_model(self._model_id))
            self._undo.append(undo)
            client.finalize_logged_model(self._model_id, LoggedModelStatus.READY)
        return "may make an experiment, a run and a logged model"

    def artifacts(self) -> str:
        """Send a file to the run's artifacts, get it back and delete it."""
        content = os.urandom(_PROBE_BYTES)
        with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder, self._store.errors():
            sent, back = Path(folder, "probe.bin"), Path(folder, "back")
            sent.write_bytes(content)
            back.mkdir()
            place = get_artifact_repository(self.artifact_uri, tracking_uri=self._store.uri)
            self._undo.append(("file probe.bin", lambda: place.delete_artifacts("probe.bin")))
            place.log_artifact(str(sent))
            found = Path(place.download_artifacts("probe.bin", str(back))).read_bytes()
            self._undo.pop()[1]()
        if found != content:
            raise MechdiffError(f"The {len(content)} bytes sent came back as {len(found)} others.")
        return f"{_PROBE_BYTES // 1024} KiB came back as they were sent"

    def registry(self) -> str:
        """Register a version of a model, point an alias at it and take that away."""
        client, name = self._client, self.name
        # A database's registry looks logged models up in MLflow's default store, not in this one.
        at_server = {"source": f"models:/{self._model_id}", "model_id": self._model_id}
        source = at_server if self._store.is_server else {"source": self.artifact_uri}
        with self._store.errors():
            client.create_registered_model(name)
            self._undo.append((f"registered model {name}", lambda: client.delete_registered_model(name)))
            number = client.create_model_version(name, run_id=self._run_id, **source).version
            client.set_model_version_tag(name, number, "check", name)
            client.set_registered_model_alias(name, "checked", number)
            client.delete_registered_model_alias(name, "checked")
        return "may register a model, and set and take away an alias"

    def remove(self) -> list[str]:
        """Delete everything again, the youngest first; what could not be deleted."""
        left = []
        for what, undo in reversed(self._undo):
            try:
                with self._store.errors():
                    undo()
            except MechdiffError as error:
                left.append(f"{what} ({error})")
        if self.artifact_uri and not self._store.is_server and is_local_uri(self.artifact_uri):
            # <root>/<experiment>/<run>/artifacts, of which the root may be new too
            folder = Path(local_file_uri_to_path(self.artifact_uri)).parents[1]
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                folder.parent.rmdir()
        return left
