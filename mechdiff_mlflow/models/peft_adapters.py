"""PEFT adapters: only kinds that can be patched, with all their weights, on a base that they leave alone."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import torch
import transformers
from torch import Tensor, nn

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models import bounded
from mechdiff_mlflow.models.checkpoints import (
    Checkpoint,
    explained,
    folder_digest,
    quiet_transformers,
    refuse_several,
)
from mechdiff_mlflow.models.load_report import Misfit, untied
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.model_files import adapter_parts, check_folder
from mechdiff_mlflow.spec.pair_spec import PairSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")
_TOKENIZER_SETTINGS = ("*token*.json", "merges.txt", "chat_template*")

_OUTSIDE = re.compile("(MULTITASK_)?PROMPT_TUNING|P_TUNING|PREFIX_TUNING|CPT|ADAPTION_PROMPT|XLORA|POLY")
"""Kinds that put tokens, keys or values before the prompt, or that weigh adapters by what they read."""

_BY_INPUT = ("alora_invocation_tokens", "arrow_config", "layer_replication")
_MAX_CONFIG = 1 << 24


@dataclass(frozen=True)
class Adapter:
    """The adapter that a pair's tuned side names; the spec has its revision as a commit."""

    spec: PairSpec
    base: Checkpoint

    @cached_property
    def folder(self) -> Path:
        """Where it is, downloaded if need be; raises `MechdiffError` where it is damaged or names code."""
        place, name = self._place
        folder = Path(place)
        with self._explained():
            if not folder.is_dir():
                files = [CONFIG_FILE, WEIGHTS_FILE, *_VOCABULARIES, *_TOKENIZER_SETTINGS]
                wanted = [f"{name}/{file}" if name else file for file in files]
                revision = self.spec.tuned.revision
                whole = huggingface_hub.snapshot_download(place, revision=revision, allow_patterns=wanted)
                folder = Path(whole, name)
            if not (folder / CONFIG_FILE).is_file():
                refuse_several(str(folder))
                remedy = "name the folder that PEFT saved"
                if (folder / "config.json").is_file():
                    remedy = "it is a whole model, so write tuned: {model: …}"
                raise MechdiffError(f"Adapter {place} has no adapter_config.json; {remedy}.")
            check_folder(folder)
            return folder

    @property
    def revision(self) -> str:
        """Id and commit, or `sha256:` and the digest of its files."""
        if str(self.folder) == self._place[0]:
            return folder_digest(self.folder)
        return f"{self.spec.tuned.adapter}@{self.spec.tuned.revision}"

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """Its own tokenizer, or the base's with the adapter's special tokens and chat template."""
        folder, base = self.folder, self.base
        with explained(f"Tokenizer of adapter {folder} of pair {self.spec.name!r}", str(folder)):
            if any(any(folder.glob(name)) for name in _VOCABULARIES):
                own = transformers.AutoTokenizer.from_pretrained(
                    folder, config=base.config, trust_remote_code=self.spec.trust_remote_code
                )
                own.chat_template = own.chat_template or base.tokenizer.chat_template
                return own
            settings: dict[str, Any] = {}
            for file in folder.glob("tokenizer_config.json"):
                for name, value in json.loads(file.read_text("utf-8")).items():
                    if name == "chat_template" or name.endswith("_token"):
                        settings[name] = value["content"] if isinstance(value, dict) else value
            for file in folder.glob("chat_template.jinja"):
                settings["chat_template"] = file.read_text("utf-8")
        return base.tokenizer_with(settings) if settings else base.tokenizer

    def check(self) -> None:
        """Refuse it, where its configuration says enough, before any weights are loaded.

        Raises:
            MechdiffError: peft is not installed, or it is missing, malformed or cannot be patched.
        """
        if importlib.util.find_spec("peft") is None:
            raise MechdiffError(
                f"Pair {self.spec.name!r} has a PEFT adapter and peft is not installed; install "
                "mechdiff-mlflow[peft]."
            )
        with self._explained():
            _check_config(self.folder, self.base)

    def apply(self, model: nn.Module) -> Any:
        """Peft's wrapper of a base model with the adapter in it, see `apply_adapter`."""
        with self._explained(), quiet_transformers():
            return apply_adapter(model, self.folder)

    @property
    def _place(self) -> tuple[str, str]:
        """Path or hub id, and the adapter's name there, see `adapter_parts`."""
        place, name = adapter_parts(self.spec.tuned.adapter or "", self.spec.root)
        return self.spec.locate(place), name

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        place, _ = self._place
        return explained(f"Adapter {place} of pair {self.spec.name!r}", place)


def _check_config(folder: Path, base: Checkpoint) -> None:
    """Refuse an adapter whose effect is not in the layers alone, or whose numbers are beyond reason."""
    config = json.loads(untrusted.read_text(folder / CONFIG_FILE, _MAX_CONFIG, "Adapter configuration"))
    kind = str(config.get("peft_type"))[:40]
    by_input = next((key for key in _BY_INPUT if config.get(key)), None)
    if _OUTSIDE.fullmatch(kind) or by_input:
        what = f"{kind} with {by_input}" if by_input else kind
        raise MechdiffError(
            f"Adapter {folder} is of kind {what}, which does more than change the layers of its base, so it "
            "cannot be patched; use a plain LoRA or a whole model."
        )
    ranks = {key: config.get(key) for key in ("r", "init_r", "target_r", "num_vectors")}
    ranks |= config.get("rank_pattern") or {}
    most = max(4 * base.width, 1024)
    for key, rank in ranks.items():
        if rank is not None and not (type(rank) is int and 0 <= rank <= most):
            raise MechdiffError(
                f"Adapter {folder} has rank {str(rank)[:40]} ({key[:80]}), which is no whole number up to "
                f"{most}, for a base of width {base.width}; train it with a rank of at most {base.width}."
            )
    for key, scale in {**config, **(config.get("alpha_pattern") or {})}.items():
        if isinstance(scale, float) and not math.isfinite(scale):
            raise MechdiffError(f"Adapter {folder} has {key[:80]}={scale}, which is not finite; correct it.")
    _check_patterns(folder, config, base)


def _check_patterns(folder: Path, config: Mapping[str, Any], base: Checkpoint) -> None:
    """Match patterns as peft does, in a process that can be stopped: some take exponential time."""
    layers = config.get("layers_pattern")
    found = [config.get("target_modules"), config.get("exclude_modules")]
    found += layers if isinstance(layers, list) else [layers]
    found += [key for field in ("rank_pattern", "alpha_pattern") for key in config.get(field) or {}]
    patterns = [pattern for pattern in found if isinstance(pattern, str) and pattern != "all-linear"]
    if not patterns:
        return
    names = [name for name, _ in base.skeleton.named_modules()]

    def match() -> None:
        for pattern in patterns:
            for name in names:
                re.fullmatch(pattern, name)
                re.match(rf"(.*\.)?({pattern})$", name)

    shown = ", ".join(repr(pattern[:80]) for pattern in patterns[:3])
    bounded.run_bounded(
        f"Matching the module patterns of adapter {folder} ({shown})",
        match,
        remedy="list the modules by name in target_modules of its adapter_config.json",
    )


def apply_adapter(model: nn.Module, folder: Path) -> Any:
    """Peft's wrapper of `model` with the adapter in `folder`, which switched off leaves `model` as it was.

    Raises:
        MechdiffError: Weights do not fit, or the adapter changes the base, the prompt, or is random.
    """
    import peft

    with safetensors.safe_open(folder / WEIGHTS_FILE, "pt") as file:
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
    fault = ""
    if changed or not _same(before, off, exact=exact):
        where = f" ({', '.join(changed[:3])})" if changed else ""
        fault = (
            f"changes its base{where}, so that without it base is another model; merge it into its base "
            "(merge_and_unload, then save_pretrained) and name that as tuned: {model: …}"
        )
    elif not all(bool(x.isfinite().all()) for x in on):
        fault = "makes numbers NaN or infinite; copy it again from where it was made, or train it again"
    elif not _same(on, inner, exact=exact):
        fault = (
            "gives other numbers the second time or outside of its wrapper, so it cannot be patched; use a "
            "plain LoRA or a whole model"
        )
    if fault:
        raise MechdiffError(f"Adapter {folder} of kind {kind} {fault}.")
    return adapted


@torch.no_grad()
def _outputs(model: nn.Module) -> tuple[Tensor, ...]:
    """Hidden states and logits of a few tokens."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    n = len(embeddings.weight)
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
