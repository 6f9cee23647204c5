"""Where the models of a command run: options made into a loaded pair and those who compute."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.doctor import require_sound
from mechdiff_mlflow.experiments.progress import Stage
from mechdiff_mlflow.experiments.workers import Journal, LocalWorkers, Workers
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.version import source_sha256
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.store.user_cache import STAGING_VARIABLE, forget_old_staging

Check = Callable[[Pair], None]

SMALL_MODEL = 50_000_000


@contextlib.contextmanager
def workers_of(
    spec: PairSpec, options: dict[str, Any], folder: Path, stage: Stage, check: Check
) -> Iterator[Journal]:
    """Those whom the options ask to compute, with the pair in their hands and sound, behind a journal.

    Args:
        spec: The pair.
        options: The command's parameters by name.
        folder: For the journal.
        stage: Who listens to progress.
        check: Called with the pair before any weights are loaded.
    """
    version = f"{code_version()} {source_sha256()}"
    with _usable(folder) as place, _computing(spec, options, stage, check) as inner:
        yield Journal(inner, place, version=version, in_memory=inner.pair.options.memory_budget is None)


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[Path]:
    """The folder, or a temporary one where nobody asked for it and it cannot be made.

    Raises:
        MechdiffError: It was asked for and cannot be made.
    """
    forget_old_staging()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if STAGING_VARIABLE in os.environ:
            raise MechdiffError(
                f"{STAGING_VARIABLE} is {os.environ[STAGING_VARIABLE]!r}, where no folder can be made "
                f"({error.strerror}); set it to a folder of yours, or to none."
            ) from error
        warnings.warn(
            f"{folder} cannot be made ({error.strerror}), so what is computed is lost if this command is "
            f"stopped; set {STAGING_VARIABLE} to a folder of yours.",
            stacklevel=2,
        )
        with tempfile.TemporaryDirectory(prefix="mechdiff-staging-") as temporary:
            yield Path(temporary)
    else:
        yield folder


@contextlib.contextmanager
def _computing(spec: PairSpec, options: dict[str, Any], stage: Stage, check: Check) -> Iterator[Workers]:
    if options["engine"] == "ray":
        with stage("starting workers", 1):
            workers = _of_a_cluster(spec, options, check)
        with workers:
            yield workers
        return
    with stage("loading both models", 1):
        pair = load_as_asked(spec, options, check=check)
    settle_threads(pair)
    with stage("checking the plumbing", 1):
        require_sound(pair)
    yield LocalWorkers(pair)


def _of_a_cluster(spec: PairSpec, options: dict[str, Any], check: Check) -> Workers:
    """Workers that load the pair and check its plumbing each for itself; this process holds no model."""
    from mechdiff_mlflow.experiments.workers.ray_workers import RayWorkers  # Ray is an extra

    workers = RayWorkers(
        load_as_asked(spec, options, lazily=True, check=check),
        options["workers"],
        address=options["address"],
        device=options["device"],
        gpus_per_worker=options["gpus_per_worker"],
    )
    first = workers.loaded[0]
    _settle_threads(first.n_parameters, first.device)
    return workers


def load_as_asked(
    spec: PairSpec, options: dict[str, Any], *, lazily: bool = False, check: Check | None = None
) -> Pair:
    """The pair, loaded as the options that all such commands share say; see `load_pair`."""
    return load_pair(
        spec,
        dtype=None if options["dtype"] == "spec" else options["dtype"],
        device=options["device"],
        options=EngineOptions(
            **{name: options[name] for name in ("batch_size", "memory_budget", "sequential")}
        ),
        lazily=lazily,
        check=check,
    )


def settle_threads(pair: Pair) -> None:
    """One thread for a small model on the CPU, unless OMP_NUM_THREADS says otherwise.

    Its matrices are too small to share: two threads gain a third on an idle machine, and cost six times the
    wall clock on a busy one, where each waits for the other at every layer.
    """
    _settle_threads(sum(weight.numel() for weight in pair.tuned.model.parameters()), pair.device)


def _settle_threads(n_parameters: int, device: str) -> None:
    if device == "cpu" and n_parameters < SMALL_MODEL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
