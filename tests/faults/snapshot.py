"""What a store holds, seen through MLflow's public API alone, and how two stores differ.

Ids, times and what names a process are left out or replaced by what the run is called, so that a run that was
interrupted and resumed can be compared with one that was left in peace.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow.entities import LoggedModel, Run, ViewType
from mlflow.tracking import MlflowClient

KEY_TAG = "mechdiff.key"
PARENT_TAG = "mlflow.parentRunId"
# What belongs to a process, a machine, a checkout or one attempt; the rest must be as in an undisturbed run.
_OF_AN_ATTEMPT = re.compile(
    r"mechdiff\.(process$|lease\.|resume|failure|key$|root$|epoch$|artifacts$)"
    r"|mlflow\.(user|source\.|parentRunId|log-model\.history|runColor)"
)
_TIMES = "time/"
INSTALLED = "environment.txt"
# MLflow's own record of a model: ids and the time it was made.
_MLMODEL = ("model_id", "model_uuid", "run_id", "utc_time_created", "artifact_path", "model_size_bytes")
_PAGE = 1000


@dataclass(frozen=True)
class RunShot:
    """One run, without ids and times.

    Args:
        status: Of the run.
        parent: What its parent is called; empty at the top.
        params: All.
        metrics: Every point of every metric that is no time: (key, step, value), sorted.
        tags: Without those of an attempt.
        inputs: Prompt sets: (name, digest, context).
        artifacts: Path to SHA-256; the files of the run's models are below `model:<name>/`.
        models: Name and status of each logged model that the run made and that has not FAILED.
    """

    status: str
    parent: str
    params: Mapping[str, str]
    metrics: tuple[tuple[str, int, float], ...]
    tags: Mapping[str, str]
    inputs: tuple[tuple[str, str, str], ...]
    artifacts: Mapping[str, str]
    models: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Difference:
    """One thing that is not as in an undisturbed run.

    Args:
        kind: `lost` or `duplicate` for a run, `running` for one that still is; `status`, `parent`, `inputs`,
            `models`, `param`, `tag`, `metric` or `artifact` for what a run holds; `key`.
        run: What it is called.
        text: What is wrong.
    """

    kind: str
    run: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.run} {self.text}".rstrip()


@dataclass(frozen=True)
class Snapshot:
    """The active runs of a store.

    Args:
        runs: By what each is called: its parent's name, its own and its number among those called so.
        unkeyed: Children without a key.
        twice: Keys that several active children of one parent have.
        orphan_models: Logged models of no run that is active.
        installed: What was installed when this was looked at. If it is not what was when an undisturbed run
            was made, the artifact that lists it has no reason to be the same.
    """

    runs: Mapping[str, RunShot]
    unkeyed: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()
    orphan_models: tuple[str, ...] = ()
    installed: str = ""

    @property
    def statuses(self) -> Counter[str]:
        """How many runs have each status."""
        return Counter(run.status for run in self.runs.values())

    def differences(self, right: Snapshot, *, keys: bool = True) -> list[Difference]:
        """What is wrong with this snapshot; empty is good.

        Args:
            right: That of an undisturbed run.
            keys: Whether children must have keys, each its own.
        """
        found = [Difference("lost", name) for name in right.runs if name not in self.runs]
        found += [Difference("duplicate", name) for name in self.runs if name not in right.runs]
        found += [Difference("running", name) for name, run in self.runs.items() if run.status == "RUNNING"]
        for name, run in self.runs.items():
            if name in right.runs:
                found += [Difference(kind, name, text) for kind, text in _unlike(run, right.runs[name])]
        if self.installed != right.installed:
            found = [one for one in found if not one.text.startswith(INSTALLED)]
        if keys:
            found += [Difference("key", name, f"has no {KEY_TAG}") for name in self.unkeyed]
            found += [Difference("key", key, "is that of several runs") for key in self.twice]
        return found


def snapshot(uri: str, experiment: str | None = None, *, artifacts: bool = True) -> Snapshot:
    """What the store at `uri` holds now.

    Args:
        uri: A tracking URI.
        experiment: Only the runs of this one.
        artifacts: Whether to read every artifact too.
    """
    client = MlflowClient(uri)
    runs = list(active_runs(client, experiment))
    names = _names(runs)
    models = list(_models(client, {run.info.experiment_id for run in runs}))
    ids = {**names, **{m.model_id: f"model:{m.name}" for m in models}}
    of_run: dict[str, list[LoggedModel]] = {run.info.run_id: [] for run in runs}
    for model in models:
        of_run.get(model.source_run_id, []).append(model)
    shots = {
        names[run.info.run_id]: _shot(client, run, of_run[run.info.run_id], ids, artifacts) for run in runs
    }
    keys = Counter(
        (run.data.tags[PARENT_TAG], run.data.tags[KEY_TAG])
        for run in runs
        if PARENT_TAG in run.data.tags and KEY_TAG in run.data.tags
    )
    return Snapshot(
        runs=shots,
        unkeyed=tuple(
            names[run.info.run_id]
            for run in runs
            if PARENT_TAG in run.data.tags and KEY_TAG not in run.data.tags
        ),
        twice=tuple(key for (_, key), count in keys.items() if count > 1),
        orphan_models=tuple(m.model_id for m in models if m.source_run_id not in of_run),
        installed=_installed(),
    )


def active_runs(client: MlflowClient, experiment: str | None = None) -> Iterator[Run]:
    """Every run of a store, or of one experiment of it, that is not deleted."""
    experiments = [
        e.experiment_id
        for e in client.search_experiments(ViewType.ACTIVE_ONLY)
        if experiment in (None, e.name)
    ]
    token = None
    while experiments:
        page = client.search_runs(experiments, "", ViewType.ACTIVE_ONLY, _PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def parents(client: MlflowClient, experiment: str | None = None) -> list[Run]:
    """The active runs without a parent, oldest first."""
    tops = [run for run in active_runs(client, experiment) if PARENT_TAG not in run.data.tags]
    return sorted(tops, key=lambda run: int(run.info.start_time))


def _unlike(run: RunShot, right: RunShot) -> Iterator[tuple[str, str]]:
    """Kind and text of what one run has otherwise than it should."""
    for kind in ("status", "parent", "inputs", "models"):
        if getattr(run, kind) != getattr(right, kind):
            yield kind, f"{getattr(run, kind)}, not {getattr(right, kind)}"
    for kind in ("params", "tags", "artifacts"):
        mine, theirs = getattr(run, kind), getattr(right, kind)
        for key in sorted({*mine, *theirs}):
            if mine.get(key) != theirs.get(key):
                yield kind[:-1], f"{key}: {str(mine.get(key))[:80]!r}, not {str(theirs.get(key))[:80]!r}"
    if run.metrics != right.metrics:
        more, fewer = Counter(run.metrics), Counter(right.metrics)
        yield "metric", f"{[*(more - fewer)][:3]} too many, {[*(fewer - more)][:3]} missing"


def _names(runs: list[Run]) -> dict[str, str]:
    """What each run is called, by id; runs called alike are numbered by their start."""
    by_id = {run.info.run_id: run for run in runs}
    seen: Counter[str] = Counter()
    names = {}
    for run in sorted(runs, key=lambda run: (int(run.info.start_time), run.info.run_id)):
        path = [run.info.run_name]
        above = by_id.get(run.data.tags.get(PARENT_TAG, ""))
        while above is not None:
            path.append(above.info.run_name)
            above = by_id.get(above.data.tags.get(PARENT_TAG, ""))
        name = " > ".join(reversed(path))
        seen[name] += 1
        names[run.info.run_id] = name if seen[name] == 1 else f"{name} #{seen[name]}"
    return names


def _models(client: MlflowClient, experiments: set[str]) -> Iterator[LoggedModel]:
    if not experiments:
        return
    token = None
    while True:
        page = client.search_logged_models(sorted(experiments), max_results=100, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _shot(
    client: MlflowClient, run: Run, models: list[LoggedModel], ids: Mapping[str, str], with_artifacts: bool
) -> RunShot:
    data = run.data
    points = [
        (point.key, int(point.step), float(point.value))
        for key in data.metrics
        if not key.startswith(_TIMES)
        for point in client.get_metric_history(run.info.run_id, key)
    ]
    artifacts: dict[str, str] = {}
    if with_artifacts:
        artifacts |= digests(run.info.artifact_uri, client.tracking_uri, ids)
        for model in models:
            if model.status == "READY":
                found = digests(model.artifact_location, client.tracking_uri, ids)
                artifacts |= {f"model:{model.name}/{path}": digest for path, digest in found.items()}
    return RunShot(
        status=run.info.status,
        parent=ids.get(data.tags.get(PARENT_TAG, ""), ""),
        params=dict(data.params),
        metrics=tuple(sorted(points)),
        tags={k: _named(v, ids) for k, v in data.tags.items() if not _OF_AN_ATTEMPT.match(k)},
        inputs=tuple(
            sorted(
                (given.dataset.name, given.dataset.digest, *(tag.value for tag in given.tags))
                for given in (run.inputs.dataset_inputs if run.inputs else [])
            )
        ),
        artifacts=artifacts,
        # An attempt that failed leaves a model that is FAILED: nothing loads it, and it says why.
        models=tuple(sorted((m.name, str(m.status)) for m in models if m.status != "FAILED")),
    )


def digests(location: str, uri: str, ids: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of every file at an artifact location; ids in texts replaced by what they stand for."""
    with tempfile.TemporaryDirectory(prefix="mechdiff-faults-") as folder:
        try:
            local = mlflow.artifacts.download_artifacts(
                artifact_uri=location, dst_path=folder, tracking_uri=uri
            )
        except Exception:
            if _is_empty(location, uri):
                return {}
            raise
        root = Path(local)
        files = [path for path in root.rglob("*") if path.is_file()]
        return {str(path.relative_to(root)): _digest(path, ids or {}) for path in sorted(files)}


def _is_empty(location: str, uri: str) -> bool:
    return not mlflow.artifacts.list_artifacts(artifact_uri=location, tracking_uri=uri)


def _digest(path: Path, ids: Mapping[str, str]) -> str:
    content = path.read_bytes()
    if path.name == "MLmodel":
        fields: dict[str, Any] = yaml.safe_load(content)
        content = yaml.safe_dump({k: v for k, v in fields.items() if k not in _MLMODEL}).encode()
    if path.suffix == ".json":
        content = _without_times(content)
    if b"\0" not in content[:1024]:
        for one, name in ids.items():
            content = content.replace(one.encode(), name.encode())
    return hashlib.sha256(content).hexdigest()


def _without_times(content: bytes) -> bytes:
    """A table of ours without its columns of seconds."""
    table = json.loads(content)
    if not isinstance(table, dict) or table.keys() != {"columns", "data"}:
        return content
    kept = [i for i, column in enumerate(table["columns"]) if not str(column).startswith(_TIMES)]
    rows = [[table["columns"][i] for i in kept], *([row[i] for i in kept] for row in table["data"])]
    return json.dumps(rows).encode()


def _installed() -> str:
    """A digest of the installed packages, which may change while a long benchmark runs."""
    names = sorted(f"{one.metadata['Name']}=={one.version}" for one in distributions())
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _named(text: str, ids: Mapping[str, str]) -> str:
    for one, name in ids.items():
        text = text.replace(one, name)
    return text
