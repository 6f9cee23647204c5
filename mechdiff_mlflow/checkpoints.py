"""Checkpoints: where a model's weights and tokenizer come from, and how they are loaded and told apart."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn

from mechdiff_mlflow.digests import file_sha256
from mechdiff_mlflow.engine import ModuleNames
from mechdiff_mlflow.engine.architecture import Decoder
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.load_report import load_whole
from mechdiff_mlflow.modelfiles import check_model
from mechdiff_mlflow.peft_adapters import adapter_folder, check_config, put_on
from mechdiff_mlflow.planted import Plant, plant_in
from mechdiff_mlflow.spec import PairSpec


@dataclass(frozen=True)
class Checkpoint:
    """A causal LM on disk or on the hub; its weights are read by `load` alone.

    Args:
        spec: The pair that it belongs to.
        reference: Hugging Face id, or path relative to the spec file.
        asked_revision: Branch, tag or commit.
        device: Where it is put, unless the spec has a device map.
        plant: A change that is made to it once loaded.
    """

    spec: PairSpec
    reference: str
    asked_revision: str | None
    device: str
    plant: Plant | None = None

    @cached_property
    def place(self) -> str:
        """Path, or id."""
        place = self.spec.locate(self.reference)
        if os.path.isabs(place):
            check_model(Path(place))
        if self.spec.trust_remote_code:
            warnings.warn(f"Code from {place} runs on this machine: trust_remote_code is on.", stacklevel=2)
        return place

    @cached_property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """Its tokenizer."""
        with self._explained():
            return transformers.AutoTokenizer.from_pretrained(self.place, **self._options)

    @cached_property
    def revision(self) -> str:
        """Commit of the hub, or `sha256:` and the digest of local weights; with what is planted."""
        if Path(self.place).is_dir():
            found = folder_digest(Path(self.place))
        else:
            found = f"{self.place}@{getattr(self._config, '_commit_hash', None) or 'unknown'}"
        return found if self.plant is None else f"{found}+planted:{self.plant}"

    @property
    def n_layers(self) -> int:
        """Decoder blocks, as its configuration says."""
        return int(self._config.get_text_config().num_hidden_layers)

    def load(self) -> nn.Module:
        """The model, in eval mode, without gradients.

        Raises:
            MechdiffError: Something of it is missing or malformed, or a library that it needs.
        """
        quantized = self._quantization()
        device_map: Any = self.spec.device_map
        if quantized and device_map is None:
            device_map = {"": self.device}  # such weights cannot be moved later
        with self._explained(), quiet_transformers():
            options = {"dtype": getattr(torch, self.spec.dtype), "device_map": device_map}
            what = f"Model {self.place} of pair {self.spec.name!r}"
            model = load_whole(self._auto, self.place, what, **options, **quantized, **self._options)
        if device_map is None:
            model.to(self.device)
        if self.plant is not None:
            plant_into(model, self.plant, self.spec)
        loaded: nn.Module = model.eval().requires_grad_(False)
        return loaded

    def n_bytes(self) -> int:
        """Of the weights once loaded, from the configuration alone; 0 where it does not say."""
        try:
            model = self.skeleton
        except Exception:  # any model's own code; an estimate is not worth an error
            return 0
        number = {"8bit": 1.0, "4bit": 0.5}.get(self.spec.quantization or "")
        number = number or getattr(torch, self.spec.dtype).itemsize
        return int(number * sum(weight.numel() for weight in model.parameters()))

    @cached_property
    def _config(self) -> Any:
        with self._explained():
            return transformers.AutoConfig.from_pretrained(self.place, **self._options)

    @property
    def width(self) -> int:
        """Dimensions of its residual stream, as its configuration says."""
        return int(self._config.get_text_config().hidden_size)

    @property
    def max_tokens(self) -> int | None:
        """Tokens of the longest prompt that it has positions for; None where there is no bound."""
        config = self._config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
        factor = scaling.get("factor") if isinstance(scaling, dict) else None
        return int(most * max(1.0, factor or 1.0)) if isinstance(most, int) and most > 0 else None

    @property
    def skeleton(self) -> nn.Module:
        """The model without weights."""
        with torch.device("meta"):
            model: nn.Module = self._auto.from_config(self._config)
        return model

    @property
    def _auto(self) -> Any:
        """The class that loads it: a multimodal model as a whole, of which text uses the language model."""
        whole = transformers.AutoModelForImageTextToText
        return whole if type(self._config) in whole._model_mapping else transformers.AutoModelForCausalLM

    @property
    def _options(self) -> dict[str, Any]:
        return {"revision": self.asked_revision, "trust_remote_code": self.spec.trust_remote_code}

    def _quantization(self) -> dict[str, Any]:
        bits = self.spec.quantization
        if bits is None:
            return {}
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MechdiffError(
                f"Pair {self.spec.name!r} asks for {bits} weights and bitsandbytes is not installed; install "
                "mechdiff-mlflow[quantized], or remove quantization from the spec."
            )
        if bits == "8bit":
            config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        else:
            compute = getattr(torch, self.spec.dtype)
            config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)
        return {"quantization_config": config}

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(f"Model {self.place} of pair {self.spec.name!r}", self.place)


@contextlib.contextmanager
def explained(what: str, place: str) -> Iterator[None]:
    """Errors of loading what is at `place`, a folder or an id, as one sentence.

    Raises:
        MechdiffError: In place of what libraries raise.
    """
    try:
        yield
    except MechdiffError:
        raise
    except Exception as error:  # configurations and weights of strangers fail in every way
        reason = " ".join(str(error).split()) or type(error).__name__
        is_local = os.path.isabs(place)
        if isinstance(error, ImportError) or "requires `accelerate`" in reason:
            remedy = "install what it needs, e.g. mechdiff-mlflow[multigpu] for a device map"
        elif is_local:
            reason = re.split(r"(?<=[a-z0-9'\")])[.!] |\. ?If | Please ", reason)[0]  # of the hub
            remedy = "check its files there, or copy them again from where they were made"
        elif huggingface_hub.constants.HF_HUB_OFFLINE:
            remedy = "HF_HUB_OFFLINE is set, so only what is on this machine was tried: download it first"
        else:
            remedy = "correct the id or path, download it first, or log in to the hub"
        raise MechdiffError(f"{what} cannot be loaded ({reason[:300]}); {remedy}.") from error


def plant_into(model: nn.Module, plant: Plant, spec: PairSpec) -> None:
    """Make a known change to a model.

    Raises:
        MechdiffError: The site does not exist, or nothing can be planted there.
    """
    decoder = Decoder.of(model, module_names(spec))
    decoder.check(plant.site)
    plant_in(plant, decoder.module(plant.site))


def load_adapter(spec: PairSpec, model: nn.Module) -> Any:
    """The spec's PEFT adapter on a model.

    Raises:
        MechdiffError: The adapter is missing or malformed, or cannot be switched off.
    """
    with _explained_adapter(spec), quiet_transformers():
        return put_on(model, _adapter_folder(spec))


def check_adapter(spec: PairSpec, base: Checkpoint) -> None:
    """Refuse the spec's adapter, where its configuration says enough, before the base is loaded.

    Raises:
        MechdiffError: peft is not installed, or the adapter is missing, malformed or of no use here.
    """
    if importlib.util.find_spec("peft") is None:
        raise MechdiffError(
            f"Pair {spec.name!r} has a PEFT adapter and peft is not installed; install mechdiff-mlflow[peft]."
        )
    with _explained_adapter(spec):
        check_config(_adapter_folder(spec), base.width, (name for name, _ in base.skeleton.named_modules()))


def _adapter_folder(spec: PairSpec) -> Path:
    assert spec.tuned.adapter is not None
    return adapter_folder(spec.locate(spec.tuned.adapter), spec.tuned.revision)


def _explained_adapter(spec: PairSpec) -> contextlib.AbstractContextManager[None]:
    assert spec.tuned.adapter is not None
    place = spec.locate(spec.tuned.adapter)
    return explained(f"Adapter {place} of pair {spec.name!r}", place)


def adapter_revision(spec: PairSpec) -> str:
    """The revision of the spec's PEFT adapter: of the hub, or `sha256:` and the digest of its files."""
    assert spec.tuned.adapter is not None
    place = spec.locate(spec.tuned.adapter)
    return folder_digest(Path(place)) if Path(place).is_dir() else f"{place}@{spec.tuned.revision or 'main'}"


def module_names(spec: PairSpec) -> ModuleNames | None:
    """The spec's names of modules, for models that are not recognised."""
    return ModuleNames(**spec.modules.model_dump()) if spec.modules else None


def folder_digest(folder: Path) -> str:
    """`sha256:` and 16 hex digits over the configuration and the weights of a local checkpoint."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name in ("config.json", "adapter_config.json"):
            total.update(f"{path.name} {file_sha256(path)}\n".encode())
    return f"sha256:{total.hexdigest()[:16]}"


def layer_digests(blocks: list[nn.Module]) -> list[str] | None:
    """For each decoder block a digest of its weights and their names; None where weights are elsewhere."""
    digests = []
    for block in blocks:
        digest = hashlib.sha256()
        for name, weight in sorted(block.state_dict().items()):
            if weight.is_meta:
                return None
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        digests.append(digest.hexdigest())
    return digests


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and notes while weights load: our own progress says what goes on."""
    log = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar()
