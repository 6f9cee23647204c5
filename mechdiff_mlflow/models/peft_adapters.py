"""PEFT adapters: only kinds that can be patched, with all their weights, on a base that they leave alone."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import torch
from torch import Tensor, nn

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.load_report import Misfit, untied
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.model_files import check_folder

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_OUTSIDE = re.compile("(MULTITASK_)?PROMPT_TUNING|P_TUNING|PREFIX_TUNING|CPT|ADAPTION_PROMPT|XLORA|POLY")
"""Kinds that put tokens, keys or values before the prompt, or that weigh adapters by what they read."""

_BY_INPUT = ("alora_invocation_tokens", "arrow_config", "layer_replication")

_MAX_CONFIG = 1 << 24
_MATCH_SECONDS = 5.0
_MATCH = (
    "import json, re, sys\n"
    "patterns, names = json.load(sys.stdin)\n"
    "for pattern in patterns:\n"
    "    for name in names:\n"
    "        re.fullmatch(pattern, name), re.match(rf'(.*\\.)?({pattern})$', name)\n"
)

_MERGE = "merge it into its base (merge_and_unload, then save_pretrained) and name that as tuned: {model: …}"


def adapter_folder(place: str, revision: str | None, also: tuple[str, ...] = ()) -> Path:
    """The local folder of an adapter; from the hub it is downloaded, with the files named in `also`.

    Raises:
        MechdiffError: What is there is damaged or a pickle.
    """
    folder = Path(place)
    if not folder.is_dir():
        found = huggingface_hub.snapshot_download(
            place, revision=revision, allow_patterns=[*ADAPTER_FILES, *also]
        )
        folder = Path(found)
    if not (folder / ADAPTER_FILES[0]).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_FILES[0]}"))
        remedy = "name the folder that PEFT saved" + (f", e.g. {place}/{inner[0][:80]}" if inner else "")
        if (folder / "config.json").is_file():
            remedy = "it is a whole model, so write tuned: {model: …}"
        raise MechdiffError(f"Adapter {place} has no adapter_config.json; {remedy}.")
    check_folder(folder)
    return folder


def check_config(folder: Path, width: int, names: Iterator[str]) -> None:
    """Refuse an adapter that cannot be measured or would take forever, before any weight is read.

    Args:
        folder: The adapter's.
        width: Dimensions of the base model's residual stream.
        names: Modules of the base model; read only if patterns have to be matched.

    Raises:
        MechdiffError: Its effect is not in the layers alone, its rank is beyond reason, a number is infinite,
            or a pattern of module names is malformed or slow.
    """
    path = folder / ADAPTER_FILES[0]
    config = json.loads(untrusted.read_text(path, _MAX_CONFIG, "Adapter configuration"))
    kind = str(config.get("peft_type"))[:40]
    by_input = next((key for key in _BY_INPUT if config.get(key)), None)
    if _OUTSIDE.fullmatch(kind) or by_input:
        what = f"{kind} with {by_input}" if by_input else kind
        raise MechdiffError(
            f"Adapter {folder} is of kind {what}, which does more than change the layers of its base, so it "
            "cannot be patched; use a plain LoRA or a whole model."
        )
    ranks = {key: config.get(key) for key in ("r", "init_r", "target_r", "num_vectors")}
    scales = {"lora_alpha": config.get("lora_alpha"), "alpha": config.get("alpha")}
    for field, values in (("rank_pattern", ranks), ("alpha_pattern", scales)):
        own = config.get(field)
        values |= own if isinstance(own, dict) else {}
    most = max(4 * width, 1024)
    for key, rank in ranks.items():
        if rank is not None and not (type(rank) is int and 0 <= rank <= most):
            raise MechdiffError(
                f"Adapter {folder} has rank {str(rank)[:40]} ({key[:80]}), which is no whole number up to "
                f"{most}, for a base of width {width}; train it with a rank of at most {width}."
            )
    for key, scale in {**scales, **config}.items():
        if isinstance(scale, float) and not math.isfinite(scale):
            raise MechdiffError(f"Adapter {folder} has {key[:80]}={scale}, which is not finite; correct it.")
    _check_patterns(folder, config, names)


def _check_patterns(folder: Path, config: Mapping[str, Any], names: Iterator[str]) -> None:
    """Match patterns as peft does, in a process that can be stopped: some take exponential time."""
    layers = config.get("layers_pattern")
    patterns = [config.get("target_modules"), config.get("exclude_modules")]
    patterns += layers if isinstance(layers, list) else [layers]
    patterns += [key for field in ("rank_pattern", "alpha_pattern") for key in config.get(field) or {}]
    patterns = [pattern for pattern in patterns if isinstance(pattern, str) and pattern != "all-linear"]
    if not patterns:
        return
    asked = json.dumps([patterns, list(names)])
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    shown = ", ".join(repr(str(pattern)[:80]) for pattern in patterns[:3])
    try:
        subprocess.run(
            command, input=asked, text=True, capture_output=True, check=True, timeout=_MATCH_SECONDS
        )
    except subprocess.TimeoutExpired:
        reason = f"take more than {_MATCH_SECONDS:g} s to match"
    except subprocess.CalledProcessError:
        reason = "are no regular expressions"
    else:
        return
    raise MechdiffError(
        f"The module patterns of adapter {folder} ({shown}) {reason}; list the modules by name in "
        "target_modules of its adapter_config.json."
    ) from None


def put_on(model: nn.Module, folder: Path) -> Any:
    """Peft's wrapper of `model` with the adapter in `folder`, which switched off leaves `model` as it was.

    Raises:
        MechdiffError: Weights do not fit, or the adapter changes the base, the prompt, or is random.
    """
    import peft

    with safetensors.safe_open(folder / ADAPTER_FILES[1], "pt") as file:
        keys = frozenset(name.removeprefix("base_model.model.") for name in file.keys())  # noqa: SIM118
    own = {name: weight for name, weight in model.named_parameters() if not weight.is_meta}
    kept = {name: own[name].detach().clone() for name in own.keys() & keys}
    before, again = _outputs(model), _outputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is looked at here
        adapted = peft.PeftModel.from_pretrained(model, str(folder))
        report = adapted.load_adapter(str(folder), "default", is_trainable=False)
        adapted.eval().requires_grad_(False)
        misfit = Misfit(untied(adapted, report.missing_keys), tuple(sorted(report.unexpected_keys)))
        if misfit:
            raise MechdiffError(
                f"Adapter {folder} does not fit its weights: it {misfit}; save it again with PEFT's "
                "save_pretrained, from a model that no wrapper is around."
            )
        on, inner = _outputs(adapted), _outputs(model)
        with adapted.disable_adapter():
            off = _outputs(model)
    config = adapted.peft_config["default"]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if getattr(config, "bias", "none") not in (None, "none"):
        kind += f" with bias: {config.bias}"
    exact = _same(before, again)  # some kernels of GPUs are not
    changed = [name for name, weight in kept.items() if not torch.equal(weight, own[name])]
    if changed or not _same(before, off, exact=exact):
        where = f" ({', '.join(changed[:3])})" if changed else ""
        raise MechdiffError(
            f"Adapter {folder} of kind {kind} changes its base{where}, so that without it base is another "
            f"model; {_MERGE}."
        )
    if not all(bool(x.isfinite().all()) for x in on):
        raise MechdiffError(
            f"Adapter {folder} of kind {kind} makes numbers NaN or infinite; copy it again from where it was "
            "made, or train it again."
        )
    if not _same(on, inner, exact=exact):
        raise MechdiffError(
            f"Adapter {folder} of kind {kind} gives other numbers the second time or outside of its wrapper, "
            "so it cannot be patched; use a plain LoRA or a whole model."
        )
    return adapted


@torch.no_grad()
def _outputs(model: nn.Module) -> tuple[Tensor, ...]:
    """Hidden states and logits of a few tokens."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    weight = embeddings.weight
    n = len(weight)
    device = next((w.device for w in model.parameters() if not w.is_meta), torch.device("cpu"))
    ids = torch.tensor([[(n * i) // 8 for i in range(8)]], device=device)
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    return (*(out.hidden_states or ()), out.logits)


def _same(some: tuple[Tensor, ...], others: tuple[Tensor, ...], *, exact: bool = True) -> bool:
    def close(x: Tensor, y: Tensor) -> bool:
        return torch.equal(x, y) if exact else torch.allclose(x.float(), y.float(), rtol=1e-2, atol=1e-2)

    return len(some) == len(others) and all(
        x.shape == y.shape and close(x, y) for x, y in zip(some, others, strict=True)
    )
