"""The prompts of a pair by split: from a file a split, or one file or data set that a seed splits."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.duplicates import near_duplicates
from mechdiff_mlflow.spec.prompts import (
    MAX_FILE_BYTES,
    SPLITS,
    PromptSet,
    prompt_of,
    prompt_set,
    read_prompts,
)

SHARES = {"train": 0.6, "val": 0.15, "test": 0.25}
"""How a seed shares out the prompts of one file."""
_LEAST = 8

NonEmpty = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class PromptFiles(BaseModel):
    """Where prompts are: `train`, `val` and perhaps `test` files, or one `file` or `dataset` to be split.

    Paths are relative to the spec file. Files are JSONL, CSV or Parquet.

    Args:
        train: File of the prompts that maps are fitted on.
        val: File of those that choices are made on.
        test: File of those that are reported; without it, only val can be.
        file: One file instead of these, which `seed` splits.
        dataset: Name of a data set on the Hugging Face hub, or path of one, instead of a file.
        part: Which part of the data set is read, in the data set's own words.
        column: Of a table: which column holds the prompts; `text`, `prompt` or `messages` by default.
        seed: Decides which prompt goes into which split.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: NonEmpty | None = None
    val: NonEmpty | None = None
    test: NonEmpty | None = None
    file: NonEmpty | None = None
    dataset: NonEmpty | None = None
    part: NonEmpty = "train"
    column: NonEmpty | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 53)] = 0

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return {"file": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_of(self) -> PromptFiles:
        splits = (self.train, self.val, self.test)
        is_split = self.train is not None and self.val is not None
        if (is_split, self.file is not None, self.dataset is not None).count(True) != 1 or (
            not is_split and any(splits)
        ):
            raise ValueError("give train and val (and test), or one file, or one dataset")
        return self

    @property
    def is_one(self) -> bool:
        """Whether a seed splits them."""
        return self.file is not None or self.dataset is not None

    @classmethod
    def parse(cls, text: str) -> PromptFiles:
        """Read `p.jsonl`, `p.csv:COLUMN`, or `train.jsonl,val.jsonl,test.jsonl`.

        Raises:
            MechdiffError: It names one file, or two or three, and nothing else.
        """
        parts = [part.strip() for part in text.split(",")]
        if not all(parts) or len(parts) > len(SPLITS):
            raise MechdiffError(
                f"Prompts {text[:200]!r} are neither one file nor train, val and test with commas between; "
                "pass e.g. prompts.jsonl."
            )
        if len(parts) == 1:
            path, column = _with_column(parts[0])
            return cls(file=path, column=column)
        return cls.model_validate(dict(zip(SPLITS, parts, strict=False)))

    @classmethod
    def parse_dataset(cls, text: str) -> PromptFiles:
        """Read `NAME`, `NAME:COLUMN` or `NAME:COLUMN:PART`.

        Raises:
            MechdiffError: It has more parts, or an empty one.
        """
        parts = [part.strip() for part in text.split(":")]
        if not all(parts) or len(parts) > 3:
            raise MechdiffError(
                f"Data set {text[:200]!r} is not NAME, NAME:COLUMN or NAME:COLUMN:PART; pass e.g. "
                "org/name:question."
            )
        return cls.model_validate(dict(zip(("dataset", "column", "part"), parts, strict=False)))


def read_splits(
    files: PromptFiles, path_of: Callable[[str], Path], system: str | None
) -> dict[str, PromptSet]:
    """The prompts of a pair, by split.

    Args:
        files: Where they are.
        path_of: Gives the file of a split, or the one that is to be split.
        system: Goes before every text.

    Raises:
        MechdiffError: A file cannot be read or is malformed, or there are too few prompts to split.
    """
    if not files.is_one:
        given = [split for split in SPLITS if getattr(files, split)]
        return {
            split: read_file(path_of(split), split, system=system, column=files.column) for split in given
        }
    if files.dataset is not None:
        return split_prompts(_read_dataset(files, system), files.seed, files.dataset)
    path = path_of("train")
    return split_prompts(read_file(path, "all", system=system, column=files.column), files.seed, str(path))


def read_file(path: Path, split: str, *, system: str | None = None, column: str | None = None) -> PromptSet:
    """The prompts of a JSONL, CSV or Parquet file.

    Raises:
        MechdiffError: It cannot be read, has no such column, or a line is malformed; see `read_prompts`.
    """
    if path.suffix not in (".csv", ".parquet"):
        return read_prompts(path, split, system=system, column=column)
    try:
        untrusted.size_of(path, MAX_FILE_BYTES)
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
        else:
            table = pd.read_parquet(path)
    except (OSError, ValueError, UnicodeError) as error:  # pandas' and pyarrow's own are among these
        reason = " ".join(str(error).split())[:200]
        raise MechdiffError(f"Prompt file {path} cannot be read ({reason}); check the file.") from None
    return _of_table(table, path, split, system, column)


def _read_dataset(files: PromptFiles, system: str | None) -> PromptSet:
    if importlib.util.find_spec("datasets") is None:
        raise MechdiffError(
            f"Prompts of the data set {files.dataset} need the package datasets, which is not installed; "
            "pip install datasets."
        )
    import datasets  # an optional package, and slow to import

    try:
        table = datasets.load_dataset(files.dataset, split=files.part).to_pandas()
    except Exception as error:  # of the hub, of files, of builders
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MechdiffError(
            f"The data set {files.dataset} cannot be read ({reason}); check its name and part."
        ) from None
    return _of_table(table, f"{files.dataset} ({files.part})", "all", system, files.column)


def _of_table(
    table: pd.DataFrame, path: Path | str, split: str, system: str | None, column: str | None
) -> PromptSet:
    """The prompts of a table, one a row; empty cells are left out."""
    columns = list(map(str, table.columns))
    known = [column] if column is not None else ["text", "prompt", "messages"]
    if not set(known) & set(columns):
        raise MechdiffError(
            f"{path} has no column {' or '.join(known)} among {', '.join(columns)[:300]}; name the one with "
            "the prompts, as in prompts.csv:COLUMN."
        )
    prompts = {}
    for number, row in enumerate(table.to_dict("records"), 2):  # the first line of a file has the names
        entry = {str(key): _plain(value) for key, value in row.items()}
        entry = {key: value for key, value in entry.items() if value is not None}
        if entry:
            prompts[number] = prompt_of(entry, f"{path}, row {number}", system, column)
    if not prompts:
        raise MechdiffError(f"{path} has no rows; give at least {_LEAST} prompts.")
    return prompt_set(path, split, prompts)


def _plain(value: Any) -> Any:
    """A cell as JSON would have it: lists of messages as lists, numbers as text, nothing as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | dict | str) or value is None:
        return value
    return None if value != value else str(value)  # NaN


def split_prompts(every: PromptSet, seed: int, source: str) -> dict[str, PromptSet]:
    """Prompts shared out by `SHARES`; what is of one group, or nearly the same question, stays together.

    Raises:
        MechdiffError: There are too few that are independent.
    """
    prompts = every.prompts
    first: dict[str, int] = {}
    together = [(i, first.setdefault(p.group, i)) for i, p in enumerate(prompts) if p.group is not None]
    while True:
        rows, columns = np.array(together, dtype=np.int64).reshape(-1, 2).T
        edges = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(prompts), len(prompts)))
        n, cluster = connected_components(edges, directed=False)
        split_of = _shared_out([p.text for p in prompts], cluster, seed)
        order = [i for split in range(len(SPLITS)) for i in np.flatnonzero(split_of == split).tolist()]
        near = list(near_duplicates([prompts[i].text for i in order], split_of[order].tolist()))
        if not near:
            break
        together += [(order[a], order[b]) for a, b in near]
    if n < _LEAST:
        raise MechdiffError(
            f"{source} has {n} independent prompts, too few to split into train, val and test; give at least "
            f"{_LEAST}, better some hundreds, or a file for each."
        )
    return {
        name: PromptSet(name, tuple(prompts[i] for i in np.flatnonzero(split_of == split)))
        for split, name in enumerate(SPLITS)
    }


def split_remark(prompts: Mapping[str, PromptSet], seed: int) -> str:
    """How a seed split prompts."""
    n = sum(map(len, prompts.values()))
    sizes = ", ".join(f"{len(one)} {split}" for split, one in prompts.items())
    return f"{n} prompts were split by seed {seed}: {sizes}"


def _shared_out(texts: Sequence[str], cluster: NDArray[np.int32], seed: int) -> NDArray[np.int64]:
    """The split of each text, those of a cluster together; by the seed and what they say, not their order."""
    clusters: dict[int, list[int]] = {}
    for i, number in enumerate(cluster.tolist()):
        clusters.setdefault(number, []).append(i)
    drawn = {
        hashlib.sha256(f"{seed} {min(texts[i] for i in members)}".encode()).digest(): members
        for members in clusters.values()
    }
    wanted = np.array([SHARES[name] for name in SPLITS]) * len(texts)
    room, found = wanted.copy(), np.empty(len(texts), dtype=np.int64)
    for _, members in sorted(drawn.items()):
        split = int(np.argmax(room / wanted))
        found[members] = split
        room[split] -= len(members)
    return found


def _with_column(text: str) -> tuple[str, str | None]:
    """A path or name, and the column after a colon; a Windows drive is none."""
    name, colon, column = text.rpartition(":")
    return (name, column) if colon and len(name) > 1 and not set(column) & {"/", "\\"} else (text, None)
