"""A request made into a loaded pair and those who compute."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.options import ModelOptions
from mechdiff_mlflow.experiments.preflight import require_sound
from mechdiff_mlflow.experiments.progress import Stage
from mechdiff_mlflow.experiments.requests import ExperimentRequest
from mechdiff_mlflow.experiments.workers import Journal, LocalWorkers, Workers
from mechdiff_mlflow.experiments.workers.workers import compute_environment
from mechdiff_mlflow.models.pairs import Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.version import source_sha256
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.store import user_cache
from mechdiff_mlflow.tracking.store.user_cache import STAGING_VARIABLE, forget_old_staging

Check = Callable[[Pair], None]

SMALL_MODEL = 50_000_000
"""Parameters below which a second thread costs more than it gives on a busy machine."""


@contextlib.contextmanager
def workers_of(
    request: ExperimentRequest, spec: PairSpec, folder: Path, stage: Stage, check: Check
) -> Iterator[Journal]:
    """Those who compute a request, with the pair of `spec` loaded and sound, behind a journal in `folder`.

    `check` is called with the pair before any weights are loaded.
    """
    version = f"{code_version()} {source_sha256()}"
    forget_old_staging()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise MechdiffError(
            f"{folder}, for what is computed, cannot be made ({error.strerror}); set {STAGING_VARIABLE} to a "
            "folder of yours."
        ) from error
    with _computing(request, spec, stage, check, version) as inner:
        yield Journal(inner, folder, version=version, in_memory=request.memory_budget is None)


@contextlib.contextmanager
def _computing(
    request: ExperimentRequest, spec: PairSpec, stage: Stage, check: Check, version: str
) -> Iterator[Workers]:
    if request.engine == "ray":
        from mechdiff_mlflow.experiments.workers.ray_workers import RayWorkers  # Ray is an extra

        with stage("starting workers", 1):  # each loads the pair and checks it; this process holds no model
            workers = RayWorkers(
                load_as_asked(spec, request, lazily=True, check=check),
                request.workers,
                address=request.address,
                device=request.device,
                gpus_per_worker=request.gpus_per_worker,
            )
        with workers:
            _settle_threads(workers.loaded[0].n_parameters, workers.loaded[0].device)
            yield workers
        return
    with stage("loading both models", 1):
        pair = load_as_asked(spec, request, check=check)
    with stage("checking the plumbing", 1):
        _require_sound_once(pair, version)
    yield LocalWorkers(pair)


def _require_sound_once(pair: Pair, version: str) -> None:
    """`require_sound`, unless this version passed it on the same pair, bounds and hardware before."""
    where = str(compute_environment(pair))
    same = [version, transformers.__version__, where, pair.fingerprint, str(pair.options)]
    passed = user_cache.cache_root() / "sound" / hashlib.sha256("\0".join(same).encode()).hexdigest()
    if not os.path.exists(passed):
        require_sound(pair)
        user_cache.write(passed, b"")


def load_as_asked(
    spec: PairSpec, request: ModelOptions, *, lazily: bool = False, check: Check | None = None
) -> Pair:
    """A pair loaded as a request says (see `load_pair`); on the CPU, a small one uses one thread.

    A small model's matrices are too small to share: two threads gain a third on an idle machine, and cost six
    times the wall clock on a busy one. OMP_NUM_THREADS decides where it is set.
    """
    pair = load_pair(
        spec,
        dtype=None if request.dtype == "spec" else request.dtype,
        device=request.device,
        options=request.engine_options,
        lazily=lazily,
        check=check,
    )
    if not lazily:
        _settle_threads(sum(weight.numel() for weight in pair.tuned.model.parameters()), pair.device)
    return pair


def _settle_threads(n_parameters: int, device: str) -> None:
    if device == "cpu" and n_parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
