"""The MLflow flavour of an affine map: plain tensors, a digest and a numeric probe, no pickle.

A saved model has `map.pt`, `probe.safetensors` (a few input rows and what the map made of them when it was
saved), a card, `conda.yaml` and `MLmodel`. MLflow checks nothing when it loads one; we do.
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import mlflow
import numpy as np
import safetensors.torch
import torch
import yaml
from mlflow.entities import LoggedModel, LoggedModelOutput, Run
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.types.schema import ParamSchema, ParamSpec, Schema, TensorSpec

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps import files as mapfiles
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.digests import file_sha256
from mechdiff_mlflow.spec.version import __version__
from mechdiff_mlflow.tracking.content.artifact_files import StoredFiles, sent_digest
from mechdiff_mlflow.tracking.content.card import model_card
from mechdiff_mlflow.tracking.content.names import logged_model_name
from mechdiff_mlflow.tracking.content.records import MAX_TAG_CHARS, ParamValue, param_text
from mechdiff_mlflow.tracking.content.tag_names import SHA256_TAG
from mechdiff_mlflow.tracking.store.store import RunTakenOver, Store, open_store

FLAVOR_NAME = "mechdiff"
MAP_FILE, PROBE_FILE = "map.pt", "probe.safetensors"
CARD_FILE, ENVIRONMENT_FILE = "README.md", "conda.yaml"
NEEDED_FILES = (MLMODEL_FILE_NAME, MAP_FILE, PROBE_FILE)

# The same text as of yaml.SafeDumper in a tenth of the time; some builds of PyYAML lack it.
_YAML_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_MAX_MLMODEL = 1 << 20
_PROBE_ROWS = 4
# Float32 products of some thousand terms differ this much, at most, between machines.
_PROBE_TOLERANCE = 1e-4

Float32Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class LoggedMap:
    """A map that the store holds, complete and read back."""

    model_id: str  # empty while the map is only a file of its run
    location: str  # URI of the model's files, or of that file
    sha256: str  # hex digest of its `map.pt`
    run_id: str = ""

    @property
    def model_uri(self) -> str:
        """What `load_map` takes, and of a model also `load_model` and MLflow."""
        return f"models:/{self.model_id}" if self.model_id else f"runs:/{self.run_id}"


def save_model(the_map: AffineMap, path: str | Path) -> None:
    """Write `the_map` as an MLflow model into the new or empty directory `path`.

    Raises:
        MechdiffError: The directory is not empty.
    """
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise MechdiffError(f"Directory {root} is not empty; save the model into a new one.")
    content = the_map.to_bytes()
    _write(root, the_map, content, Model(), model_card(the_map, {}))


def _write(root: Path, the_map: AffineMap, content: bytes, model: Model, card: str) -> dict[str, str]:
    """Write the files of a model, `content` being its `map.pt`; the SHA-256 of those that loading needs."""
    probe = _probe(the_map)
    rows = safetensors.torch.save(probe)
    digests = {MAP_FILE: _sha256(content), PROBE_FILE: _sha256(rows)}
    (root / MAP_FILE).write_bytes(content)
    (root / PROBE_FILE).write_bytes(rows)
    (root / CARD_FILE).write_text(card, encoding="utf-8")
    (root / ENVIRONMENT_FILE).write_text(_environment(), encoding="utf-8")
    model.signature = _signature(the_map)
    model.add_flavor(
        FLAVOR_NAME,
        data=MAP_FILE,
        sha256=digests[MAP_FILE],
        probe=PROBE_FILE,
        probe_sha256=digests[PROBE_FILE],
        d_in=the_map.d_in,
        d_out=the_map.d_out,
        alpha=the_map.alpha,
        mechdiff_version=__version__,
    )
    mlflow.pyfunc.add_to_model(model, loader_module=__name__, data=MAP_FILE)
    # As a name alone: all of MLflow's environments are then made from that file.
    model.flavors[mlflow.pyfunc.FLAVOR_NAME][mlflow.pyfunc.ENV] = ENVIRONMENT_FILE
    text = yaml.dump(model.to_dict(), Dumper=_YAML_DUMPER, default_flow_style=False)
    (root / MLMODEL_FILE_NAME).write_text(text, encoding="utf-8")
    return {**digests, MLMODEL_FILE_NAME: _sha256(text.encode())}


def log_model(
    the_map: AffineMap,
    name: str,
    *,
    store: Store | None = None,
    run_id: str | None = None,
    experiment_id: str | None = None,
    params: Mapping[str, ParamValue] | None = None,
    metrics: Mapping[str, float] | None = None,
    again: bool = False,
    require_owner: Callable[[], None] = lambda: None,
) -> LoggedMap:
    """Log `the_map` as a model of a run; it becomes READY only when its files read back right.

    with mlflow.start_run():
        logged = mechdiff_mlflow.log_model(the_map, "L26-attn_out")
    mechdiff_mlflow.load_model(logged.model_uri)

    Args:
        the_map: What to log.
        name: Of the logged model; characters it cannot have are replaced.
        store: By default where MLflow tracks to.
        run_id: By default the active one, in the experiment of `experiment_id`.
        experiment_id: By default looked up.
        params: Shown on the model's page.
        metrics: For the model card; log them with `model_id` to link them to the model.
        again: Whether a killed process may have begun this, which is then gone on with.
        require_owner: Called before each step; raises if another process does that by now.

    Raises:
        MechdiffError: No run is active or named, or the store refuses, or gives back other bytes than it got.
    """
    store = store or open_store(mlflow.get_tracking_uri())
    if run_id is None:
        active = mlflow.active_run()
        if active is None:
            raise MechdiffError(
                "No MLflow run is active to log the map to; open one with mlflow.start_run() or pass run_id."
            )
        run_id = str(active.info.run_id)
    client, content, sha256 = store.client, the_map.to_bytes(), the_map.sha256()
    card = model_card(the_map, metrics or {}, f"runs:/{run_id}", params)
    with store.errors():
        experiment_id = experiment_id or client.get_run(run_id).info.experiment_id
        store.require_place(experiment_id)

        def create() -> LoggedModel:
            require_owner()
            return client.create_logged_model(
                experiment_id,
                name=logged_model_name(name),
                source_run_id=run_id,
                tags={SHA256_TAG: sha256, "mlflow.note.content": card[:MAX_TAG_CHARS]},
                params={key: param_text(key, value) for key, value in (params or {}).items()},
                model_type="affine map",
            )

        def made() -> list[LoggedModel]:
            where = f"source_run_id = '{run_id}' AND tags.`{SHA256_TAG}` = '{sha256}'"
            return list(client.search_logged_models([experiment_id], where))

        def find() -> LoggedModel | None:
            """The finished one, or one to go on with."""
            found = made()
            return next((m for status in ("READY", "PENDING") for m in found if m.status == status), None)

        begun = find() if again else None
        logged = begun or store.retries.once(create, find)
        try:
            require_owner()
        except RunTakenOver:  # the other process goes on with this one, unless it has its own
            if len(made()) > 1:
                client.delete_logged_model(logged.model_id)
            raise
        try:
            if logged.status != "READY":  # or another process died before the run named its model
                record = Model(
                    artifact_path=logged.artifact_location,
                    run_id=run_id,
                    model_uuid=logged.model_id,
                    model_id=logged.model_id,
                )
                with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
                    sent = Path(folder, "sent")
                    sent.mkdir()
                    digests = _write(sent, the_map, content, record, card)
                    files = StoredFiles(store, logged.artifact_location)
                    files.send(sent, again=begun is not None)
                    _load_map(files.require_same(digests, Path(folder, "back")))
                require_owner()
                client.finalize_logged_model(logged.model_id, "READY")
            elif _has_output(store, run_id, logged.model_id):
                return LoggedMap(logged.model_id, logged.artifact_location, sha256, run_id)
            add = partial(client.log_outputs, run_id, [LoggedModelOutput(logged.model_id, step=0)])
            store.retries.once(add, lambda: _has_output(store, run_id, logged.model_id) or None)
        except BaseException:
            require_owner()  # or another process may be going on with it
            if logged.status != "READY":
                client.finalize_logged_model(logged.model_id, "FAILED")
            raise
    return LoggedMap(logged.model_id, logged.artifact_location, sha256, run_id)


def _has_output(store: Store, run_id: str, model_id: str) -> bool:
    """Whether a run says that it made a logged model."""
    outputs = store.client.get_run(run_id).outputs
    return any(one.model_id == model_id for one in (outputs.model_outputs if outputs else []))


def load_model(model_uri: str | Path) -> AffineMap:
    """The map of an MLflow model directory, or of a URI in the store that `mlflow.set_tracking_uri` named.

    Its files are checked; `load_map` also checks what the registry says of a version.
    """
    if Path(model_uri).is_dir():
        return load_verified(Path(model_uri))
    with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
        try:
            return load_verified(Path(mlflow.artifacts.download_artifacts(str(model_uri), dst_path=folder)))
        except MlflowException as error:
            raise MechdiffError(f"Model {model_uri} cannot be read: {error}") from error


def load_verified(root: Path) -> AffineMap:
    """The map of the model directory `root`, after checking both digests and the probe.

    Raises:
        MechdiffError: A file is missing, changed or not ours, or the map computes something else by now.
    """
    for name in NEEDED_FILES:
        if not (root / name).is_file():
            raise MechdiffError(
                f"{root} has no {name}: it is no saved map, or an incomplete one; log it again."
            )
        untrusted.inside(root, name, "Model file")
    conf = _flavour_conf(root)
    for name, expected in ((MAP_FILE, conf["sha256"]), (PROBE_FILE, conf["probe_sha256"])):
        if (found := file_sha256(root / name)) != expected:
            raise MechdiffError(
                f"{name} has changed since it was saved (SHA-256 {found[:12]}…, not {str(expected)[:12]}…); "
                "fetch or log the map again."
            )
    return _load_map(root)


def _load_map(root: Path) -> AffineMap:
    """The map in `root`, whose files have the right digests, if it computes what it did when it was saved."""
    the_map = AffineMap.load(root / MAP_FILE)
    _check_probe(the_map, mapfiles.read_plain_tensors(root / PROBE_FILE))
    return the_map


def download(store: Store, location: str, target: Path) -> Path:
    """Copy what is needed of the map at `location` into the directory `target`, and give `target`.

    Of a map that is only a file, the rest of the model is made here.
    """
    target.mkdir(parents=True, exist_ok=True)
    is_file = location.endswith(f"/{MAP_FILE}")
    names = (MAP_FILE,) if is_file else NEEDED_FILES
    back = StoredFiles(store, location.removesuffix(f"/{MAP_FILE}")).read_back(names, target)
    for name in names:
        if back != target and (back / name).is_file():
            shutil.copyfile(back / name, target / name)
    if is_file:
        the_map = AffineMap.load(target / MAP_FILE)
        _write(target, the_map, (target / MAP_FILE).read_bytes(), Model(), "")
    return target


def load_logged(store: Store, logged: LoggedMap) -> AffineMap:
    """A map that a run logged, read from the store and checked."""
    with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder, store.errors():
        root = download(store, logged.location, Path(folder))
        the_map = load_verified(root)
        if file_sha256(root / MAP_FILE) != logged.sha256:
            raise MechdiffError(f"{MAP_FILE} of {logged.model_uri} is not what was logged; fit it again.")
    return the_map


def maps_of(store: Store, run: Run | str) -> list[LoggedMap]:
    """The complete maps that a run, or one by its id, logged, oldest first: its models, or the one file."""
    if isinstance(run, str):
        with store.errors():
            run = store.client.get_run(run)
    run_id, outputs = run.info.run_id, run.outputs.model_outputs if run.outputs else []
    with store.errors():
        models = map(store.client.get_logged_model, dict.fromkeys(one.model_id for one in outputs))
        ready = [m for m in models if m.status == "READY" and SHA256_TAG in m.tags]
    ready.sort(key=lambda model: model.creation_timestamp)
    logged = [LoggedMap(m.model_id, m.artifact_location, m.tags[SHA256_TAG], run_id) for m in ready]
    sha256 = sent_digest(run.data.tags, MAP_FILE)
    if not logged and sha256 is not None:
        logged = [LoggedMap("", f"{run.info.artifact_uri.rstrip('/')}/{MAP_FILE}", sha256, run_id)]
    return logged


class _PyFuncMap:
    """What `mlflow.pyfunc.load_model` and `mlflow models serve` call."""

    def __init__(self, the_map: AffineMap) -> None:
        self._map = the_map

    def predict(self, rows: Any, params: dict[str, Any] | None = None) -> Float32Array:
        """Map float32 rows [n, d_in] to [n, d_out], with params["alpha"] in place of the map's own."""
        alpha = (params or {}).get("alpha", self._map.alpha)
        x = torch.from_numpy(np.array(rows, dtype=np.float32))
        result: Float32Array = self._map.with_alpha(float(alpha))(x).numpy()
        return result


def _load_pyfunc(path: str) -> _PyFuncMap:
    """MLflow's hook: `path` is the file that `data` names in MLmodel."""
    here = Path(path)
    return _PyFuncMap(load_verified(here if here.is_dir() else here.parent))


def _signature(the_map: AffineMap) -> ModelSignature:
    x, y = (Schema([TensorSpec(np.dtype(np.float32), (-1, d))]) for d in (the_map.d_in, the_map.d_out))
    return ModelSignature(x, y, ParamSchema([ParamSpec("alpha", "double", the_map.alpha)]))


def _probe(the_map: AffineMap) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, the_map.d_in, generator=generator)
    return {"x": x, "y": the_map(x).contiguous()}


def _check_probe(the_map: AffineMap, probe: Mapping[str, torch.Tensor]) -> None:
    if probe.keys() != {"x", "y"} or probe["x"].numel() == 0:
        raise MechdiffError(f"{PROBE_FILE} has no rows x and y; fetch or log the map again.")
    got = the_map(probe["x"])
    off = float((got - probe["y"]).abs().max()) if got.shape == probe["y"].shape else float("inf")
    allowed = _PROBE_TOLERANCE * max(float(probe["y"].abs().max()), 1.0)
    if not off <= allowed:
        raise MechdiffError(
            f"The map computes something else than when it was saved (off by {off:.3g}, allowed "
            f"{allowed:.3g}); fetch or fit it again."
        )


def _flavour_conf(root: Path) -> dict[str, Any]:
    """What MLmodel says of the map; read here, since MLflow's reader follows aliases without bound."""
    path = root / MLMODEL_FILE_NAME
    try:
        fields = untrusted.parse_yaml(untrusted.read_text(path, _MAX_MLMODEL, "File"), str(path))
        conf = fields["flavors"][FLAVOR_NAME]
        digests = conf["sha256"], conf["probe_sha256"]
        if not all(re.fullmatch("[0-9a-f]{64}", text) for text in digests):
            raise ValueError("its digests are none")
    except (MechdiffError, KeyError, TypeError, ValueError) as error:
        raise MechdiffError(f"{root} is an MLflow model but not a map of mechdiff; name another.") from error
    return dict(conf)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=1)
def _environment() -> str:
    """The file that MLflow makes a conda, virtualenv or uv environment from; the same for every map."""
    pins = [
        f"mechdiff-mlflow=={__version__}",
        f"mlflow=={mlflow.__version__}",
        f"torch=={torch.__version__.split('+')[0]}",
        f"numpy=={np.__version__}",
    ]
    conda = {
        "name": "mechdiff-map",
        "channels": ["conda-forge"],
        "dependencies": [f"python={platform.python_version()}", "pip", {"pip": pins}],
    }
    return str(yaml.safe_dump(conda, sort_keys=False))
