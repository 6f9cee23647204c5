"""What experiments hand over to be tracked: frozen records, checked before any store is touched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.text import is_text, text_of

if TYPE_CHECKING:
    import pandas as pd

    from mechdiff_mlflow.maps.affine import AffineMap

ParamValue = str | int | float | bool

MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
MAX_KEY_CHARS = 250
MAX_DIGEST_CHARS = 36

# What MLflow accepts on every system: it also takes ":" except on Windows.
_KEY = re.compile(r"[\w.\- /]+")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A prompt set that a run used, shown by MLflow among the run's datasets.

    Args:
        name: What the user calls it, e.g. `cultural-demo`.
        split: `train`, `val` or `test`; MLflow's dataset context.
        digest: At most 36 characters that change when any prompt changes.
        n: Number of prompts.
        source: The path that it was read from.
    """

    name: str
    split: str
    digest: str
    n: int
    source: str = ""

    def __post_init__(self) -> None:
        if not self.digest or len(self.digest) > MAX_DIGEST_CHARS:
            raise MechdiffError(
                f"Digest {self.digest!r} of prompt set {self.name!r} has {len(self.digest)} characters; "
                f"MLflow stores 1 to {MAX_DIGEST_CHARS}, so shorten it."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class RunRecord:
    """What one run is to hold; refuses what MLflow would refuse or mangle.

    Args:
        kind: `fit`, `patch`, `sweep`, `atlas`, `report`, …; tag `mechdiff.kind`.
        name: Says what differs from its siblings, e.g. `L26/attn_out k=8 α=0.3 procrustes_scaled`.
        params: Resolved settings. Absent means absent: leave a key out rather than passing None or "".
        metrics: Final values. NaN and infinities are not stored; the run gets a tag that says so.
        stepped_metrics: Curves, key to {step: value}, e.g. drop_pct over k.
        undefined: Why a metric has no value, e.g. {"drop_pct": "KL_raw is below the noise floor"}.
        tags: Free labels; `mlflow.` and `mechdiff.` ones are written by the tracker.
        datasets: The prompt sets used.
        tables: Path in the run's artifacts (ending in .json) to a table that MLflow's UI can show.
        texts: Path to the text of a small file.
        files: Path to an existing local file or directory to copy there.
        map: The map this run fitted; becomes a logged model of the run.
        is_model: Or else the map stays a file of the run, until it is promoted.
        map_run: The run whose map this run evaluates; metrics appear on that map's page too.
        description: Markdown: asked, found, caveats, how to reproduce.
        started_ms: Unix time in ms when the work began; None means now.
        ended_ms: Unix time in ms when the work ended; None means now.

    Raises:
        MechdiffError: A key, path, value or length that MLflow refuses or would change.
    """

    kind: str
    name: str
    params: Mapping[str, ParamValue] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    stepped_metrics: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    undefined: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[Dataset, ...] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    map: AffineMap | None = None
    is_model: bool = True
    map_run: str | None = None
    description: str = ""
    started_ms: int | None = None
    ended_ms: int | None = None

    def __post_init__(self) -> None:
        for what, text in (("kind", self.kind), ("name", self.name)):
            if not text.strip():
                raise MechdiffError(f"The {what} of a run is empty; say what the run is.")
        for key in (*self.params, *self.metrics, *self.stepped_metrics, *self.undefined, *self.tags):
            check_key(key)
        for key, value in self.params.items():
            param_text(key, value)
        for key, number in self.metrics.items():
            _check_number(key, number)
        for key, curve in self.stepped_metrics.items():
            for number in curve.values():
                _check_number(key, number)
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
        _check_artifact_paths([*self.tables, *self.texts, *self.files])
        for path in self.tables:
            if not path.endswith(".json"):
                raise MechdiffError(f"Table {path!r} must end in .json, the form that MLflow shows.")
        if self.map is not None and self.map_run is not None:
            raise MechdiffError(f"Run {self.name!r} both fits a map and evaluates run {self.map_run}'s.")


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


def _check_number(key: str, value: object) -> None:
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise MechdiffError(f"Metric {key!r} is {value!r}, which is no number; store it as a param or tag.")


def _check_artifact_paths(paths: list[str]) -> None:
    for path in paths:
        pure = PurePosixPath(path)
        leaves = pure.is_absolute() or ".." in pure.parts
        if not path or leaves or str(pure) != path or re.search(r"[\\:]", path):
            raise MechdiffError(
                f"Artifact path {path!r} is not plain and relative; write e.g. tables/rows.json."
            )
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise MechdiffError(f"Artifact {twice!r} is given twice in one run; give each its own path.")
