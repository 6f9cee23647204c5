"""Requests, validated before any model is loaded: ranks, scales, cells and pairs, with their text forms."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.model_files import PACKAGED, check_folder, packaged_file
from mechdiff_mlflow.spec.plant import Plant
from mechdiff_mlflow.spec.prompt_files import NonEmpty, PromptFiles, read_splits
from mechdiff_mlflow.spec.prompts import SPLITS as SPLITS
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Position as Position
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.text import number_in, text_of

MAX_SPEC_BYTES = 1 << 16
PLANTED = "planted:"

ALPHA_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""What `alpha=auto` chooses from, on val."""


@dataclass(frozen=True, slots=True)
class Rank:
    """How many directions a map may use; None is full, no limit."""

    k: int | None

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise MechdiffError(f"Rank {self.k} is not at least 1; pass a whole number, or full.")

    def __str__(self) -> str:
        return "full" if self.k is None else str(self.k)

    @classmethod
    def parse(cls, text: str) -> Rank:
        """Read a whole number, `full`, or 0 (full); raises `MechdiffError` for anything else."""
        if text in ("full", "0"):
            return cls(None)
        if re.fullmatch("-?[0-9]{1,9}", text) is None:
            raise MechdiffError(f"Rank k={text[:80]!r} is not a whole number; pass e.g. 8, or full.")
        return cls(int(text))


@dataclass(frozen=True, slots=True)
class Alpha:
    """The scale α of the mapped vector: one fixed value, or an increasing grid to choose from on val."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        for value in self.values:
            if not (math.isfinite(value) and value >= 0):
                raise MechdiffError(
                    f"α={text_of(value)} is not a finite number of at least 0; pass e.g. 0.3, or auto."
                )
        if not self.values or list(self.values) != sorted(set(self.values)):
            raise MechdiffError(
                f"α grid {self} must list different values in increasing order, e.g. 0.3,0.7,1."
            )

    def __str__(self) -> str:
        if self.values == ALPHA_GRID:
            return "auto"
        return ",".join(text_of(value) for value in self.values)

    @property
    def is_choice(self) -> bool:
        """Whether val has to choose."""
        return len(self.values) > 1

    @classmethod
    def parse(cls, text: str) -> Alpha:
        """Read `0.3`, a grid `0.3,0.7,1`, or `auto`; raises `MechdiffError` for anything else."""
        if text == "auto":
            return cls(ALPHA_GRID)
        try:
            return cls(tuple(number_in(part) for part in text.split(",")))
        except ValueError:
            raise MechdiffError(
                f"α={text[:80]!r} is not a number; pass e.g. 0.3, a grid 0.3,0.7,1, or auto."
            ) from None


@dataclass(frozen=True, slots=True)
class Cell:
    """One map to fit and patch; family `update` bounds rank(W − I), `content` rank(W)."""

    site: Site
    solver: str
    family: str
    rank: Rank
    alpha: Alpha

    def __str__(self) -> str:
        return f"{self.site} {self.solver} {self.family} k={self.rank} α={self.alpha}"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]


class BaseModelSpec(_Frozen):
    """The base side: a Hugging Face id, or a path relative to the spec file; a branch, tag or commit."""

    model: NonEmpty
    revision: NonEmpty | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        return {"model": given} if isinstance(given, str) else given


class TunedModelSpec(_Frozen):
    """The tuned side: a full model, a PEFT adapter on the base, or a known change planted in the base."""

    model: NonEmpty | None = None
    adapter: NonEmpty | None = None
    planted: NonEmpty | None = None
    revision: NonEmpty | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TunedModelSpec:
        if sum(way is not None for way in (self.model, self.adapter, self.planted)) != 1:
            raise ValueError("give one of model, adapter or planted")
        if self.planted is not None and self.revision is not None:
            raise ValueError("what is planted has no revision but the base's; remove it")
        return self

    @property
    def name(self) -> str:
        """What is tuned, in a few words."""
        return self.model or (f"adapter {self.adapter}" if self.adapter else f"planted {self.planted}")

    @property
    def plant(self) -> Plant | None:
        """The planted change; raises `MechdiffError` where it is malformed."""
        return None if self.planted is None else Plant.parse(self.planted)


class ModuleOverride(_Frozen):
    """Module names for an architecture that is not recognised, e.g. `layers: model.layers`."""

    layers: NonEmpty | None = None
    attention: NonEmpty | None = None
    attn_out: NonEmpty | None = None
    mlp_out: NonEmpty | None = None
    mlp: NonEmpty | None = None


class PairSpec(_Frozen):
    """A base and a tuned causal LM with the prompts to compare them on; a YAML file.

    Args:
        name: Experiment and registered models are called after it.
        dtype: Both models' parameters.
        device_map: As in transformers, e.g. `auto`, or a device for each module; default one device.
        quantization: Load weights in 8 or 4 bits, by bitsandbytes.
        template: `own` uses each model's tokenizer and chat template, `tuned` or `base` that side's for
            both, `none` no template.
        system: System prompt put before every `text` prompt.
        trust_remote_code: Run code from the models' repositories; recorded.
    """

    name: Name
    description: str = ""
    base: BaseModelSpec
    tuned: TunedModelSpec
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    device_map: str | dict[str, str | int] | None = None
    quantization: Literal["8bit", "4bit"] | None = None
    template: Literal["own", "tuned", "base", "none"] = "own"
    system: str | None = None
    prompts: PromptFiles
    modules: ModuleOverride | None = None
    trust_remote_code: bool = False
    root: Annotated[Path, Field(exclude=True)] = Path()
    """Folder of the spec, where relative paths start; set by `load`."""

    @model_validator(mode="after")
    def _plain_weights(self) -> PairSpec:
        if self.quantization is not None and self.tuned.planted is not None:
            raise ValueError("nothing can be planted in quantized weights; remove quantization")
        return self

    def locate(self, reference: str) -> str:
        """An existing path for `reference`, or itself as a Hugging Face id.

        Raises:
            MechdiffError: `reference` is written as a path and nothing is there, it is relative and leads
                out of the spec's folder, or what is there is damaged or claims more than it holds.
        """
        if reference.startswith(PACKAGED):
            path = packaged_file(reference)
            check_folder(path)
            return str(path)
        try:
            given = Path(reference).expanduser()
        except RuntimeError:  # ~ of nobody
            given = Path(reference)
        path = self.root / given
        if untrusted.is_there(path):
            if not given.is_absolute():
                what = f"Model (relative, so below the spec; else give an absolute path) of {self.name!r}"
                path = untrusted.inside(self.root, reference, what)
            check_folder(path)
            return str(path.resolve())
        if reference.startswith((".", "/", "~")) or reference.count("/") > 1 or os.path.islink(path):
            raise MechdiffError(f"{path} does not exist; correct the path in pair {self.name!r}.")
        return reference

    def prompt_path(self, split: str) -> Path:
        """The file that has the prompts of a split.

        Raises:
            MechdiffError: The spec names none, it is not there, or it is not below the spec's folder.
        """
        name: str | None = self.prompts.file or getattr(self.prompts, split)
        if name is None:
            raise MechdiffError(
                f"Pair {self.name!r} has no {split} prompts; add prompts.{split} or use --split val."
            )
        path = self.root / name
        if not untrusted.is_there(path):
            raise MechdiffError(
                f"Prompt file {path} does not exist; correct prompts.{split} of pair {self.name!r}."
            )
        untrusted.inside(self.root, name, f"prompts.{split} of pair {self.name!r}:")
        return path

    def prompt_source(self, split: str) -> str:
        """Where the prompts of a split are from: a file's path, or a data set's name.

        Raises:
            MechdiffError: As `prompt_path`.
        """
        return self.prompts.dataset or str(self.prompt_path(split))

    def read_prompts(self) -> dict[str, PromptSet]:
        """The prompts, by split.

        Raises:
            MechdiffError: As `prompt_path`, or a file is malformed, or has too few prompts to be split.
        """
        return read_splits(self.prompts, self.prompt_path, self.system)

    def to_yaml(self) -> str:
        """The spec as a YAML text that `parse` reads back."""
        return yaml.safe_dump(
            self.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True
        )

    @classmethod
    def parse(cls, text: str, *, root: Path, source: str = "pair spec") -> PairSpec:
        """Read a YAML text, called `source` in errors, whose relative paths start at `root`.

        Raises:
            MechdiffError: The text is not YAML, has unknown or missing keys, or values out of range.
        """
        if len(text) > MAX_SPEC_BYTES:
            raise MechdiffError(
                f"{source} has {len(text)} characters, over {MAX_SPEC_BYTES}; a spec is a page."
            )
        fields = untrusted.parse_yaml(text, source)
        if not isinstance(fields, dict):
            raise MechdiffError(f"{source} is not a mapping; it needs name, base, tuned and prompts.")
        if "root" in fields:
            raise MechdiffError(f"{source} is not valid: root: unknown key, remove it.")
        try:
            return cls(**{**fields, "root": root})
        except (ValidationError, TypeError) as error:
            raise MechdiffError(f"{source} is not valid: {untrusted.explain(error)}.") from None

    @classmethod
    def load(cls, pair: str) -> PairSpec:
        """The shipped pair of that name, the YAML file at that path, or a planted pair.

        `planted:attn_out:L14:r4:alpha0.7` is the base and the prompts of `cultural-demo`, with that change
        planted in the base in place of the tuned model.

        Raises:
            MechdiffError: There is none of these, or it is not a valid spec.
        """
        if pair.startswith(PLANTED):
            plant, demo = Plant.parse(pair.removeprefix(PLANTED)), cls.load("cultural-demo")
            about = f"The base of {demo.name}, and the same with a known change planted: {plant}."
            tuned = TunedModelSpec(planted=str(plant))
            changed = {"name": f"planted-{plant.slug}", "description": about, "tuned": tuned}
            return demo.model_copy(update=changed)
        shipped = shipped_pairs()
        path = shipped.get(pair, Path(pair))
        if not untrusted.is_there(path):
            raise MechdiffError(
                f"Pair {pair[:200]!r} is neither a YAML file nor a shipped pair ({', '.join(shipped)}), nor "
                "of the form planted:attn_out:L14:r4:alpha0.7."
            )
        text = untrusted.read_text(path, MAX_SPEC_BYTES, "Pair spec")
        return cls.parse(text, root=path.resolve().parent, source=f"Pair spec {os.fspath(path)}")


def shipped_pairs() -> dict[str, Path]:
    """The pairs that come with the package, by name."""
    folder = Path(str(resources.files("mechdiff_mlflow.spec") / "demo"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
