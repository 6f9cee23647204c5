"""Loading a model with all its weights or not at all.

transformers fills missing weights with random numbers and drops unexpected ones, with a table in the log.
Here that table is read, and such a model refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors.torch
from torch import Tensor, nn

from mechdiff_mlflow.errors import MechdiffError

_WRAPPER = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module"
    r"|_forward_module|_dp_module|base_model\.model|pretrained_model|language_model)\."
)
"""What torch.compile, DDP, FSDP, checkpointing, Lightning, PEFT and others put into the names of weights."""

_NO_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|masked_bias$|\.[qkv]_(scale|zero_point)$|(^|\.)mtp[._]")
"""Buffers of old releases, scales of quantized caches, and heads that guess further tokens."""

_TOWERS = re.compile(r"(^|\.)(vision|visual|image|audio|multi_modal|language_model|text_model|llm)")


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
        if any(map(_TOWERS.search, self.unexpected)):
            return "these are weights of a multimodal model, so put that model's own config.json beside them"
        return (
            "download it again, or put the config.json beside it that these weights were saved with; "
            "save_pretrained writes both"
        )


def load_whole(auto: Any, place: str, what: str, **options: Any) -> nn.Module:
    """The model at `place`, a hub id or folder, with all its weights; errors call it `what`.

    Weights that carry the prefix of a wrapper, such as `_orig_mod.`, are loaded without it if then all fit.

    Raises:
        MechdiffError: Weights are missing, left over or of another shape, or it is an adapter.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    model, report = auto.from_pretrained(place, **options)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise MechdiffError(
            f"{what} is a PEFT adapter of another model; name it as tuned: {{adapter: …}} in the spec."
        )
    misfit = Misfit.of(model, report)
    if misfit:
        bare = _unwrapped(place, options.pop("revision", None))
        kind, config, generation = type(model), model.config, getattr(model, "generation_config", None)
        del model
        if bare is not None:
            options.pop("trust_remote_code", None)
            model, report = kind.from_pretrained(None, config=config, state_dict=bare, **options)
            model.generation_config = generation
            model.config._name_or_path = place
        if bare is None or Misfit.of(model, report):
            raise MechdiffError(f"{what} does not fit its weights: it {misfit}; {misfit.remedy}.")
    loaded: nn.Module = model
    return loaded


def untied(model: nn.Module, missing: Iterable[str]) -> tuple[str, ...]:
    """The missing weights that are not tied to one that is there."""
    missing = frozenset(missing)
    named = dict(model.named_parameters(remove_duplicate=False))
    there = {id(weight) for name, weight in named.items() if name not in missing}
    return tuple(sorted(name for name in missing if name not in named or id(named[name]) not in there))


def _unwrapped(place: str, revision: str | None) -> dict[str, Tensor] | None:
    """The weights without wrapper prefixes; None if there are none, or two names would become one."""
    folder = Path(place)
    if not folder.is_dir():
        kinds = ["*.safetensors", "*.safetensors.index.json"]
        found = huggingface_hub.snapshot_download(
            place, revision=revision, allow_patterns=kinds, local_files_only=True
        )
        folder = Path(found)
    files = {folder / "model.safetensors"}
    if not files <= set(folder.iterdir()):
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = {folder / name for name in index["weight_map"].values()}
    weights = [item for file in sorted(files) for item in safetensors.torch.load_file(file).items()]
    bare = {_WRAPPER.sub("", name): weight for name, weight in weights}
    return None if len(bare) < len(weights) or bare.keys() == dict(weights).keys() else bare


def _few(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(name[:120] for name in names[:5]) + more
