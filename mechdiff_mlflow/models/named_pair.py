"""A pair from the names of its models and its prompts, without a spec file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from pydantic import ValidationError

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.checkpoints import explained, refuse_several
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.model_files import adapter_parts, read_json
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.prompt_files import PromptFiles

_MAX_JSON = 1 << 24


def named_pair(
    tuned: str, prompts: PromptFiles, *, base: str | None = None, name: str | None = None
) -> PairSpec:
    """The spec that the names of two models and of prompts amount to.

    Args:
        tuned: A hub id, or the path from the working directory of a model, an adapter or a GGUF file; with
            `:NAME` one of several adapters there.
        prompts: Likewise.
        base: Likewise; None for what the tuned model says of itself: `base_model_name_or_path` of an adapter,
            else `base_model` of its card.
        name: Of the pair; None for one after the tuned model.

    Raises:
        MechdiffError: The tuned model does not say what it was tuned from, or a name is malformed.
    """
    place, adapter_name = adapter_parts(tuned)
    adapter = _adapter_config(place, adapter_name)
    if adapter is None and _file_of(place, "config.json") is None:
        refuse_several(place)
    base = base or _stated_base(place, adapter)
    if base is None:
        raise MechdiffError(
            f"{tuned} does not say what it was tuned from (no base_model_name_or_path in its "
            "adapter_config.json, no base_model in its README.md); name that with --base."
        )
    files = prompts.model_dump(exclude_none=True)
    for key in ("train", "val", "test", "file"):
        if key in files:
            files[key] = os.path.abspath(files[key])
    kind = "model" if adapter is None else "adapter"
    fields = {
        "name": name or pair_name_of(tuned),
        "base": {"model": _place(base)},
        "tuned": {kind: tuned if adapter_name else _place(place)},
        "prompts": files,
        "root": Path(os.path.abspath(os.sep)),
    }
    try:
        return PairSpec.model_validate(fields)
    except ValidationError as error:
        raise MechdiffError(f"This pair is not valid: {untrusted.explain(error)}.") from None


def pair_name_of(model: str) -> str:
    """A pair's name after its tuned model's: letters, digits, `_` and `-`."""
    stem = Path(model.rstrip("/")).name.removesuffix(".gguf")
    return re.sub("[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:64] or "pair"


def _place(model: str) -> str:
    """A path as an absolute one; a hub id, or what an installed package holds, as it is."""
    path = Path(model).expanduser()
    return os.path.abspath(path) if untrusted.is_there(path) else model


def _adapter_config(model: str, name: str) -> dict[str, Any] | None:
    """The configuration of an adapter, or of the one of that name; None for what is none."""
    path = _file_of(model, f"{name}/adapter_config.json" if name else "adapter_config.json")
    if path is None:
        return None
    config = read_json(path, _MAX_JSON)
    return config if isinstance(config, dict) else {}


def _stated_base(model: str, adapter: dict[str, Any] | None) -> str | None:
    """What a model says it was tuned from; a path beside an adapter counts from there."""
    stated = (adapter or {}).get("base_model_name_or_path")
    if not stated and (card := _file_of(model, "README.md")) is not None:
        with explained(f"The card of {model}", model):
            stated = (huggingface_hub.metadata_load(card) or {}).get("base_model")
        stated = stated[0] if isinstance(stated, list) and stated else stated
    if not isinstance(stated, str) or not stated.strip():
        return None
    beside = Path(model).expanduser() / stated
    return str(beside) if untrusted.is_there(beside) else stated


def _file_of(model: str, name: str) -> Path | None:
    """A small file of a model's folder or repository; None where it has no such file."""
    folder = Path(model).expanduser()
    if untrusted.is_there(folder) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        return folder / name if (folder / name).is_file() else None
    with explained(f"Model {model}", model):
        try:
            return Path(huggingface_hub.hf_hub_download(model, name))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None


def write_pair(spec: PairSpec, out: Path) -> list[Path]:
    """Write a spec as YAML, with the prompts of each split beside it; the files, the spec first.

    Raises:
        MechdiffError: One of them exists already or cannot be written, or the prompts cannot be read.
    """
    prompts = spec.read_prompts()
    paths = {split: out.with_name(f"{out.stem}-{split}.jsonl") for split in prompts}
    if there := [path for path in (out, *paths.values()) if path.exists()]:
        raise MechdiffError(f"{there[0]} exists already; remove it, or name another file with --out.")
    files = PromptFiles.model_validate({split: path.name for split, path in paths.items()})
    texts = {out: spec.model_copy(update={"prompts": files, "system": None}).to_yaml()}
    for split, one in prompts.items():
        lines = []
        for prompt in one.prompts:
            more = {"group": prompt.group, "answer": prompt.answer}
            said = {"messages": [*prompt.messages]} if len(prompt.messages) > 1 else {"text": prompt.text}
            line = said | {key: value for key, value in more.items() if value is not None}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        texts[paths[split]] = "".join(lines)
    for path, text in texts.items():
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise MechdiffError(f"Cannot write {path} ({error.strerror}); choose another place.") from error
    return list(texts)
