"""What experiments hand over to be tracked: frozen records, checked before any store is touched."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.text import is_text, text_of
from mechdiff_mlflow.tracking.content.tag_names import PAIR_FINGERPRINT

if TYPE_CHECKING:
    import pandas as pd

    from mechdiff_mlflow.maps.affine import AffineMap

ParamValue = str | int | float | bool

MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
MAX_KEY_CHARS = 250

_OTHER_NUMBERS = 1e-2
"""Relative difference at which a number is another one, and not the same computed elsewhere."""
TIME = "time/"
"""Beginning of the names of metrics that are durations."""

# What MLflow accepts on every system: it also takes ":" except on Windows.
_KEY = re.compile(r"[\w.\- /]+")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A prompt set that a run used, shown by MLflow among the run's datasets."""

    name: str  # what the user calls it
    split: str  # `train`, `val` or `test`; MLflow's dataset context
    digest: str  # at most 36 characters that change when any prompt changes
    n: int  # number of prompts
    columns: tuple[str, ...] = ("text",)  # what is known of each
    source: str = ""  # the path that it was read from


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """What one run is to hold.

    Raises:
        MechdiffError: A key, value or length that MLflow refuses or would change.
    """

    kind: str  # `fit`, `patch`, `sweep`, `atlas`, `report`, …; tag `mechdiff.kind`
    name: str  # what differs from its siblings, e.g. `L26/attn_out k=8 α=0.3 procrustes_scaled`
    params: Mapping[str, ParamValue] = field(default_factory=dict)  # no None or "": leave the key out
    metrics: Mapping[str, float] = field(default_factory=dict)  # what is not finite becomes a tag
    stepped_metrics: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # drop_pct over k, …
    undefined: Mapping[str, str] = field(default_factory=dict)  # why a metric has no value
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[Dataset, ...] = ()  # the prompt sets used
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # by artifact path, ending in .json
    texts: Mapping[str, str] = field(default_factory=dict)  # small files by artifact path
    files: Mapping[str, Path] = field(default_factory=dict)  # local files and directories, likewise
    map: AffineMap | None = None  # the map this run fitted
    is_model: bool = True  # whether the map becomes a logged model at once, or stays a file until promoted
    map_run: str | None = None  # the run whose map this run measures; metrics are on that map's page too
    description: str = ""  # Markdown: asked, found, caveats, how to reproduce
    headline: str = ""  # a sentence of Markdown on what was found, for the experiment's page
    started_ms: int | None = None  # Unix times when the work began and ended; None means now
    ended_ms: int | None = None

    def __post_init__(self) -> None:
        for key in (*self.params, *self.metrics, *self.stepped_metrics, *self.undefined, *self.tags):
            check_key(key)
        for key, value in self.params.items():
            param_text(key, value)
        for key, text in (*self.tags.items(), ("name", self.name), ("description", self.description)):
            if not is_text(text):
                raise MechdiffError(
                    f"Tag {key!r} is {text[:80]!r}, which is no UTF-8 text; write it otherwise."
                )
            if len(text) > MAX_TAG_CHARS:
                raise MechdiffError(
                    f"Tag {key!r} has {len(text)} characters and MLflow keeps {MAX_TAG_CHARS}; "
                    "store the text as an artifact instead."
                )


def key_of(record: RunRecord, code: str) -> str:
    """32 hex digits over what a record was asked to be: its kind, settings, prompts, pair and code.

    What was measured is not part of it, nor when. `code` is a version like `0.1.0+g1a2b3c4d5e`.
    """
    asked = {
        "kind": record.kind,
        "name": record.name,
        "params": {key: param_text(key, value) for key, value in record.params.items()},
        "datasets": sorted([p.name, p.split, p.digest] for p in record.datasets),
        "pair": record.tags.get(PAIR_FINGERPRINT, ""),
        # What the map is, where a command was given it: what a name stands for may change.
        "map": [record.tags.get(key, "") for key in ("mechdiff.map", "mechdiff.map_sha256")]
        if "mechdiff.map" in record.tags
        else "",
        "code": code,
    }
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]


def check_same(run_id: str, record: RunRecord, logged: Mapping[str, float]) -> None:
    """Make sure that what was computed again is what a run holds.

    The last digits may differ: another machine, or other chunks after memory ran out.

    Raises:
        MechdiffError: A number is another one.
    """
    for key, value in record.metrics.items():
        if key.startswith(TIME) or not math.isfinite(value) or key not in logged:
            continue
        if not math.isclose(value, logged[key], rel_tol=_OTHER_NUMBERS, abs_tol=1e-6):
            raise MechdiffError(
                f"Run {run_id} holds {key} = {logged[key]:.6g} and the same was now computed as {value:.6g}; "
                "something changed since it was written, so begin anew instead of resuming."
            )


def check_key(key: str) -> None:
    """Refuse a param, metric or tag key that MLflow refuses on any system.

    Raises:
        MechdiffError: With the characters at fault.
    """
    if _KEY.fullmatch(key) is None:
        bad = "".join(sorted(set(re.sub(_KEY, "", key)))) or "nothing in it"
        raise MechdiffError(
            f"Key {key!r} has {bad!r}, which MLflow refuses; use letters, digits and `_ - . /` or a space."
        )
    if len(key) > MAX_KEY_CHARS:
        raise MechdiffError(f"Key {key[:40]!r}… has {len(key)} characters; MLflow takes {MAX_KEY_CHARS}.")
    if str(PurePosixPath(key)) != key or key.startswith(("/", "..")) or key == ".":
        raise MechdiffError(f"Key {key!r} is read as a path; write it without `//`, `..` or a `/` at an end.")


def param_text(key: str, value: object) -> str:
    """How a param is stored: numbers in their shortest exact form, booleans as true and false.

    Raises:
        MechdiffError: The value is None, empty, not plain, or longer than MLflow keeps.
    """
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", 0) == 0:
        value = item()  # a NumPy or torch scalar
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float) or value == "":
        raise MechdiffError(f"Param {key!r} is {value!r}; give a number or some text, or leave the key out.")
    text = text_of(value) if isinstance(value, float) else str(value)
    if not is_text(text):
        raise MechdiffError(f"Param {key!r} is {text[:80]!r}, which is no UTF-8 text; write it otherwise.")
    if len(text) > MAX_PARAM_CHARS:
        raise MechdiffError(
            f"Param {key!r} has {len(text)} characters and MLflow keeps {MAX_PARAM_CHARS}; shorten it, e.g. "
            "share a long list out to several commands."
        )
    return text
