"""How two registered maps differ: in what was asked for, what was measured, and as linear maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.registry.fetch import load_map, resolve
from mechdiff_mlflow.tracking.registry.versions import Version
from mechdiff_mlflow.tracking.store.store import Store


@dataclass(frozen=True, slots=True)
class MapDiff:
    """Two versions side by side, and how alike the maps are; cosines are in the Frobenius product."""

    a: Version
    b: Version
    facts: Mapping[str, tuple[str | None, str | None]]  # params, metrics and other tags that differ
    cosine_weight: float | None  # of W_a and W_b; None when the widths differ or a weight is zero
    cosine_update: float | None  # of W − I, the change that the fine-tune made, for square W


def diff(store: Store, a: str, b: str) -> MapDiff:
    """Compare the registered maps that `a` and `b` name, e.g. `NAME@champion` and `NAME/2`.

    Raises:
        MechdiffError: One of them is no registered version, or cannot be read.
    """
    va, vb = _version(store, a), _version(store, b)
    keys = sorted(key for key in {*va.tags, *vb.tags} if not key.startswith("mechdiff."))
    facts = {key: (va.tags.get(key), vb.tags.get(key)) for key in keys}
    ma, mb = load_map(va.uri, store=store), load_map(vb.uri, store=store)
    updates = [m.weight.minus_identity().dense() for m in (ma, mb) if m.d_in == m.d_out]
    return MapDiff(
        va,
        vb,
        {key: pair for key, pair in facts.items() if pair[0] != pair[1]},
        _cosine(ma.dense(), mb.dense()),
        _cosine(*updates) if len(updates) == 2 else None,
    )


def _version(store: Store, reference: str) -> Version:
    version = resolve(store, reference).version
    if version is None:
        raise MechdiffError(f"{reference!r} is no registered version; write e.g. NAME@champion or NAME/2.")
    return version


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float | None:
    if a.shape != b.shape:
        return None
    a, b = a.double().flatten(), b.double().flatten()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else None
