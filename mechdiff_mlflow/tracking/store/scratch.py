"""Trying out what one may do on a store, in a scratch experiment that is removed again."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from mlflow.entities import LoggedModelStatus, Metric, Param, RunTag
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.utils.file_utils import local_file_uri_to_path

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store.store import Store

PREFIX = "mechdiff-server-check"
_ALIAS = "checked"
_PROBE_BYTES = 256 * 1024


class Scratch:
    """An experiment, a run, a logged model and a registered map under a name that nobody else uses.

    Each method tries one group of calls, in the order below, and says what it saw.

    Raises:
        MechdiffError: From each method: the store refuses, or does something else than it was asked.
    """

    def __init__(self, store: Store) -> None:
        self.name = f"{PREFIX}-{secrets.token_hex(4)}"
        self._store = store
        self._client = store.client
        self._undo: list[tuple[str, Callable[[], object]]] = []
        self._experiment_id = self._run_id = self._artifacts = self._model_id = ""

    def runs(self) -> str:
        """Make the experiment, a run with a param, a metric and a tag, find it, make a logged model."""
        client, name = self._client, self.name
        self._experiment_id = self._store.experiment(name)
        self._undo.append((f"experiment {name}", lambda: client.delete_experiment(self._experiment_id)))
        with self._store.errors():
            run = client.create_run(self._experiment_id, run_name=name)
            self._run_id, self._artifacts = run.info.run_id, run.info.artifact_uri
            self._undo.append((f"run {self._run_id}", lambda: client.delete_run(self._run_id)))
            now = int(time.time() * 1000)
            metric, param, tag = Metric("checked", 1.0, now, 0), Param("check", name), RunTag("check", name)
            client.log_batch(self._run_id, [metric], [param], [tag])
            client.set_terminated(self._run_id)
            found = client.search_runs([self._experiment_id], f"params.`check` = '{name}'")
            if [r.info.run_id for r in found] != [self._run_id] or found[0].data.metrics != {"checked": 1.0}:
                raise MechdiffError(
                    f"Run {self._run_id} was logged but a search does not find what it holds."
                )
            model = client.create_logged_model(self._experiment_id, name, self._run_id)
            self._model_id = model.model_id
            self._undo.append(
                (f"logged model {self._model_id}", lambda: client.delete_logged_model(self._model_id))
            )
            client.finalize_logged_model(self._model_id, LoggedModelStatus.READY)
        return "may make an experiment, a run and a logged model"

    @property
    def artifact_scheme(self) -> str:
        """Of the place where the run's artifacts go: `mlflow-artifacts`, `s3`, …; `file` for a path."""
        return urlsplit(self._artifacts).scheme or "file"

    @property
    def artifact_place(self) -> str:
        """Where the run's artifacts go."""
        return self._artifacts

    def artifacts(self) -> str:
        """Send a file there, get it back, compare digests and delete it."""
        content = os.urandom(_PROBE_BYTES)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder, self._store.errors():
            sent = Path(folder, "probe.bin")
            sent.write_bytes(content)
            place = get_artifact_repository(self._artifacts, tracking_uri=self._store.uri)
            self._undo.append(("file probe.bin", lambda: place.delete_artifacts("probe.bin")))
            place.log_artifact(str(sent))
            back = Path(place.download_artifacts("probe.bin", _made(folder, "back"))).read_bytes()
            took = time.perf_counter() - start
            self._undo.pop()[1]()
            left = place.list_artifacts()
        if hashlib.sha256(back).digest() != hashlib.sha256(content).digest():
            raise MechdiffError(f"The {len(content)} bytes sent came back as {len(back)} others.")
        if left:
            raise MechdiffError("The file that was deleted is still listed.")
        return f"{_PROBE_BYTES // 1024} KiB came back with the same SHA-256 in {1000 * took:.0f} ms, deleted"

    def registry(self) -> str:
        """Register two versions of a model with a tag each."""
        client, name = self._client, self.name
        # A database's registry looks logged models up in MLflow's default store, not in this one.
        at_server = {"source": f"models:/{self._model_id}", "model_id": self._model_id}
        source = at_server if self._store.is_server else {"source": self._artifacts}
        with self._store.errors():
            client.create_registered_model(name)
            self._undo.append((f"registered model {name}", lambda: client.delete_registered_model(name)))
            versions = [
                client.create_model_version(name, run_id=self._run_id, **source).version for _ in range(2)
            ]
            for number in versions:
                client.set_model_version_tag(name, number, "check", name)
        if [int(number) for number in versions] != [1, 2]:
            raise MechdiffError(f"The first two versions of {name} were numbered {versions}.")
        return "may register a model and its versions"

    def aliases(self) -> str:
        """Point an alias at one version, move it to the other, take it away, read it every time."""
        client, name = self._client, self.name
        with self._store.errors():
            for number in ("1", "2"):
                client.set_registered_model_alias(name, _ALIAS, number)
                seen = str(client.get_model_version_by_alias(name, _ALIAS).version)
                if seen != number:
                    raise MechdiffError(f"The alias was set to version {number} and points at {seen}.")
            client.delete_registered_model_alias(name, _ALIAS)
            left = client.get_registered_model(name).aliases
        if left:
            raise MechdiffError("The alias that was deleted still points at a version.")
        return "an alias can be set, moved and taken away"

    def remove(self) -> list[str]:
        """Delete everything again, the youngest first; what could not be."""
        left = []
        for what, undo in reversed(self._undo):
            try:
                with self._store.errors():
                    undo()
            except MechdiffError as error:
                left.append(f"{what} ({error})")
        if self._artifacts and not self._store.is_server and self.artifact_scheme == "file":
            # <root>/<experiment>/<run>/artifacts, of which the root may be new too
            folder = Path(local_file_uri_to_path(self._artifacts)).parents[1]
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                folder.parent.rmdir()
        return left


def _made(*parts: str) -> str:
    """A new directory."""
    path = Path(*parts)
    path.mkdir()
    return str(path)
