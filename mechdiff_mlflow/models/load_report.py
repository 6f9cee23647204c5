"""Loading a model with all its weights or not at all.

transformers fills missing weights with random numbers and drops unexpected ones, with a table in the log.
Here that table is read, and such a model refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mechdiff_mlflow.errors import MechdiffError

_NO_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|masked_bias$|\.[qkv]_(scale|zero_point)$|(^|\.)mtp[._]")
"""Buffers of old releases, scales of quantized caches, and heads that guess further tokens."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """Names of weights that a model lacks, has no place for, or has in another shape."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, report: dict[str, Any]) -> Misfit:
        """The misfit in transformers' own report, but for weights that are tied, declared or buffers."""
        buffers = tuple(name for name, _ in model.named_buffers())
        spare = [
            key
            for key in report["unexpected_keys"]
            if not _NO_WEIGHTS.search(key) and not any(f".{name}".endswith(f".{key}") for name in buffers)
        ]
        placed = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
        missing = {*report["missing_keys"]}
        if not placed & {"cpu", "disk"}:  # nothing is offloaded, so these were in the index and in no file
            missing |= {name for name, weight in model.named_parameters() if weight.is_meta}
        wrong = sorted(item if isinstance(item, str) else item[0] for item in report["mismatched_keys"])
        return cls(untied(model, missing), tuple(sorted(spare)), tuple(wrong))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = (
            ("lacks {} of its weights ({})", self.missing),
            ("is given {} that it has no place for ({})", self.unexpected),
            ("is given {} in another shape ({})", self.mismatched),
        )
        return ", ".join(text.format(len(names), _few(names)) for text, names in parts if names)

    @property
    def remedy(self) -> str:
        """Advice for the user."""
        prefixes = {key.removesuffix(name) for name in self.missing[:1] for key in self.unexpected}
        for prefix in prefixes:
            if {prefix + name for name in self.missing} == {*self.unexpected}:
                return f"remove {prefix[:80]!r} from the names in its files"
        return (
            "download it again, or put the config.json beside it that these weights were saved with; "
            "save_pretrained writes both"
        )


def load_whole(auto: Any, place: str, what: str, **options: Any) -> nn.Module:
    """The model at `place`, a hub id or folder, with all its weights; errors call it `what`.

    Raises:
        MechdiffError: Weights are missing, left over or of another shape, or it is an adapter.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    model, report = auto.from_pretrained(place, **options)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise MechdiffError(
            f"{what} is a PEFT adapter of another model; name it as tuned: {{adapter: …}} in the spec."
        )
    if misfit := Misfit.of(model, report):
        raise MechdiffError(f"{what} does not fit its weights: it {misfit}; {misfit.remedy}.")
    loaded: nn.Module = model
    return loaded


def untied(model: nn.Module, missing: Iterable[str]) -> tuple[str, ...]:
    """The missing weights that are not tied to one that is there."""
    missing = frozenset(missing)
    named = dict(model.named_parameters(remove_duplicate=False))
    there = {id(weight) for name, weight in named.items() if name not in missing}
    return tuple(sorted(name for name in missing if name not in named or id(named[name]) not in there))


def _few(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:120] for name in names[:5]) + more
