"""Checkpoints: models, adapters and tokenizers on disk or on the hub, and how they are loaded."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import torch
import transformers
from torch import nn

from mechdiff_mlflow.engine import ModuleNames
from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.load_report import load_whole
from mechdiff_mlflow.models.planted import plant_in
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.digests import file_sha256
from mechdiff_mlflow.spec.model_files import GGUF, adapter_parts, check_model
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.plant import Plant


@dataclass(frozen=True)
class Checkpoint:
    """A causal LM on disk or on the hub; its weights are read by `load` alone."""

    spec: PairSpec
    reference: str  # Hugging Face id, or path relative to the spec file
    commit: str | None  # of a repository on the hub, see `with_commits`
    device: str  # unless the spec has a device map
    plant: Plant | None = None  # a change that is made to it once loaded

    @cached_property
    def place(self) -> str:
        """Path, or hub id."""
        place = self.spec.locate(self.reference)
        if os.path.isabs(place):
            check_model(Path(place))
        if self.spec.trust_remote_code:
            warnings.warn(f"Code from {place} runs on this machine: trust_remote_code is on.", stacklevel=2)
        return place

    @cached_property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.tokenizer_with({})

    def tokenizer_with(self, settings: dict[str, Any]) -> transformers.PreTrainedTokenizerBase:
        """Its tokenizer with some settings replaced, such as special tokens or the chat template."""
        with self._explained():
            return transformers.AutoTokenizer.from_pretrained(self.source, **self._options, **settings)

    @cached_property
    def revision(self) -> str:
        """Commit of the hub, or `sha256:` and the digest of local weights; with what is planted."""
        if self.gguf_file:
            found = f"sha256:{file_sha256(Path(self.place))[:16]}"
        elif Path(self.place).is_dir():
            found = folder_digest(Path(self.place), code=self.spec.trust_remote_code)
        else:
            found = f"{self.place}@{self.commit}"
        return found if self.plant is None else f"{found}+planted:{self.plant}"

    @property
    def n_layers(self) -> int:
        """Decoder blocks; as its configuration says where they are not found."""
        outline = self.outline()
        return len(outline.blocks) if outline else int(self._text_config.num_hidden_layers)

    @property
    def n_embeddings(self) -> int | None:
        """Tokens that it has embeddings for, as its configuration says; None where it does not."""
        found = getattr(self._text_config, "vocab_size", None)
        return found if isinstance(found, int) else None

    def load(self) -> nn.Module:
        """The model, in eval mode, without gradients.

        Raises:
            MechdiffError: Something of it is missing or malformed, or a library that it needs.
        """
        quantized = self._quantization()
        device_map: Any = self.spec.device_map
        if quantized and device_map is None:
            device_map = {"": self.device}  # such weights cannot be moved later
        bars = (
            io.StringIO() if self.gguf_file else sys.stderr
        )  # transformers cannot be told to leave that one out
        with self._explained(), quiet_transformers(), contextlib.redirect_stderr(bars):
            options = {"dtype": getattr(torch, self.spec.dtype), "device_map": device_map}
            model = load_whole(self._auto, self.source, self._name, **options, **quantized, **self._options)
        if device_map is None:
            model.to(self.device)
        if self.plant is not None:
            decoder = Decoder.of(model, module_names(self.spec))
            decoder.check(self.plant.site)
            plant_in(self.plant, decoder.module(self.plant.site))
        loaded: nn.Module = model.eval().requires_grad_(False)
        return loaded

    def n_bytes(self) -> int:
        """Size of the weights once loaded, from the configuration alone; 0 where it does not say."""
        if self._skeleton_if_any is None:
            return 0
        number = {"8bit": 1.0, "4bit": 0.5}.get(self.spec.quantization or "")
        number = number or getattr(torch, self.spec.dtype).itemsize
        return int(number * sum(weight.numel() for weight in self._skeleton_if_any.parameters()))

    def outline(self) -> Decoder | None:
        """Its blocks without any weights; None where they are not found without loading it."""
        model = self._skeleton_if_any
        try:
            return None if model is None else Decoder.of(model, module_names(self.spec))
        except MechdiffError:  # the loaded model may be of another class; if not, it is said then
            return None

    @cached_property
    def _skeleton_if_any(self) -> nn.Module | None:
        try:
            return self.skeleton
        except Exception:  # any model's own code; what is wrong is said when it is loaded
            return None

    @cached_property
    def config(self) -> Any:
        """Its configuration."""
        with self._explained():
            found = transformers.AutoConfig.from_pretrained(self.source, **self._options)
            known = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
            own = "AutoModelForCausalLM" in (getattr(found, "auto_map", None) or {})
            if found.is_encoder_decoder or not (own or any(type(found) in a._model_mapping for a in known)):
                kind = "an encoder with a decoder" if found.is_encoder_decoder else "no causal language model"
                raise MechdiffError(
                    f"{self._name} is {kind} ({found.model_type}), where prompts are continued by a decoder "
                    "alone; name a decoder-only model."
                )
            return found

    @property
    def width(self) -> int:
        """Dimensions of its residual stream, as its configuration says."""
        return int(self._text_config.hidden_size)

    @property
    def _text_config(self) -> Any:
        return self.config.get_text_config()

    @property
    def max_tokens(self) -> int | None:
        """Length of the longest prompt that it has positions for; None where there is no bound."""
        config = self._text_config
        most = getattr(config, "max_position_embeddings", None)
        scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
        factor = scaling.get("factor") if isinstance(scaling, dict) else None
        return int(most * max(1.0, factor or 1.0)) if isinstance(most, int) and most > 0 else None

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model without weights, on no device, from the configuration alone."""
        with torch.device("meta"), quiet_transformers():
            model: nn.Module = self._auto.from_config(
                self.config, trust_remote_code=self.spec.trust_remote_code
            )
        return model

    @property
    def _auto(self) -> Any:
        """The class that loads it; a multimodal model is loaded whole, and its language model reads text."""
        whole = transformers.AutoModelForImageTextToText
        return whole if type(self.config) in whole._model_mapping else transformers.AutoModelForCausalLM

    @cached_property
    def _options(self) -> dict[str, Any]:
        for name in ("config.json", "tokenizer_config.json") if self.spec.trust_remote_code else ():
            with self._explained():
                path = transformers.utils.cached_file(
                    self.place, name, revision=self.commit, _raise_exceptions_for_missing_entries=False
                )
                content = json.loads(untrusted.read_text(Path(path), 64 << 20, "Model file")) if path else {}
            if "--" in str(content.get("auto_map")):
                raise MechdiffError(
                    f"{self._name} takes code from another repository, of which no commit is pinned; put the "
                    "code into a local copy of the model."
                )
        options = {"revision": self.commit, "trust_remote_code": self.spec.trust_remote_code}
        return options | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    @property
    def gguf_file(self) -> str:
        """Name of its one file where that is GGUF, which holds weights, configuration and tokenizer."""
        return Path(self.place).name if self.place.endswith(GGUF) else ""

    @property
    def source(self) -> str:
        """What transformers is given: a hub id, or the folder that its files are in."""
        return str(Path(self.place).parent) if self.gguf_file else self.place

    def _quantization(self) -> dict[str, Any]:
        bits = self.spec.quantization
        if bits is None:
            return {}
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MechdiffError(
                f"Pair {self.spec.name!r} asks for {bits} weights and bitsandbytes is not installed; install "
                "mechdiff-mlflow[quantized], or remove quantization from the spec."
            )
        config = transformers.BitsAndBytesConfig(
            load_in_8bit=bits == "8bit",
            load_in_4bit=bits == "4bit",
            bnb_4bit_compute_dtype=getattr(torch, self.spec.dtype),
        )
        return {"quantization_config": config}

    @property
    def _name(self) -> str:
        return f"Model {self.place} of pair {self.spec.name!r}"

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(self._name, self.place)


@contextlib.contextmanager
def explained(what: str, place: str) -> Iterator[None]:
    """Turns errors of loading `what` from `place`, a folder or a hub id, into a `MechdiffError`."""
    try:
        yield
    except MechdiffError:
        raise
    except Exception as error:  # configurations and weights of strangers fail in every way
        said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(said.split()) or type(error).__name__
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


def with_commits(spec: PairSpec) -> PairSpec:
    """The spec with its revisions as commits, so that everything is loaded from the same ones.

    Raises:
        MechdiffError: A commit cannot be found, here or on the hub.
    """
    sides: dict[str, Any] = {"base": spec.base, "tuned": spec.tuned}
    for role, side in sides.items():
        adapter = side.adapter if role == "tuned" else None
        reference, name = adapter_parts(adapter, spec.root) if adapter else (side.model, "")
        if reference is not None and not os.path.isabs(place := spec.locate(reference)):
            what, file = ("Adapter", "adapter_config.json") if adapter else ("Model", "config.json")
            with explained(f"{what} {place} of pair {spec.name!r}", place):
                try:
                    commit = commit_of(place, side.revision, f"{name}/{file}" if name else file)
                except huggingface_hub.errors.EntryNotFoundError:
                    if adapter and not name:
                        refuse_several(place, side.revision)
                    raise
            sides[role] = side.model_copy(update={"revision": commit})
    return spec.model_copy(update=sides)


def refuse_several(place: str, revision: str | None = None) -> None:
    """Refuse a folder or hub repository of several adapters, none of them in its top folder."""
    if os.path.isdir(place):
        files = [path.relative_to(place).as_posix() for path in Path(place).glob("**/adapter_config.json")]
    else:
        try:
            files = huggingface_hub.list_repo_files(place, revision=revision)
        except Exception:  # no network, or no such repository, which who loads it says
            return
    names = sorted(str(Path(file).parent) for file in files if Path(file).name == "adapter_config.json")
    if names and "." not in names:
        raise MechdiffError(
            f"{place} has no adapter_config.json of its own, but adapters below it "
            f"({', '.join(names)[:200]}); name one, e.g. {place}:{names[0][:80]}."
        )


def module_names(spec: PairSpec) -> ModuleNames | None:
    """The spec's names of modules, for models that are not recognised."""
    return ModuleNames(**spec.modules.model_dump()) if spec.modules else None


def layer_digests(decoder: Decoder) -> list[str]:
    """A digest of each decoder block's weights and their names; empty where weights are elsewhere."""
    digests = []
    for block in decoder.blocks:
        digest = hashlib.sha256()
        for name, weight in sorted(block.module.state_dict().items()):
            if weight.is_meta:
                return []
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        digests.append(digest.hexdigest())
    return digests


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' bars and notes while weights load: our own progress is shown."""
    log = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar()


@contextlib.contextmanager
def gguf_parsed_once(spec: PairSpec) -> Iterator[None]:
    """Keeps a parsed GGUF file, which transformers parses for tokenizer, configuration and weights anew."""
    is_gguf = any(str(model).endswith(GGUF) for model in (spec.base.model, spec.tuned.model))
    if not is_gguf or importlib.util.find_spec("gguf") is None:
        yield
        return
    gguf = importlib.import_module("gguf")
    with mock.patch.object(gguf, "GGUFReader", lru_cache(maxsize=2)(gguf.GGUFReader)):
        yield


def commit_of(repository: str, revision: str | None, file: str) -> str:
    """The commit that a branch, tag or (short) commit of a hub repository means now.

    The hub is asked as for any download of `file`, so the cache answers where the hub does not.

    Raises:
        MechdiffError: It cannot be found out; or as `huggingface_hub.hf_hub_download`.
    """
    asked = revision or "main"
    try:
        # Not named after its blob, which is a link's target, but by its place: snapshots/COMMIT/file.
        found = Path(huggingface_hub.hf_hub_download(repository, file, revision=asked))
        commit = found.parents[len(Path(file).parts) - 1].name
    except huggingface_hub.errors.LocalEntryNotFoundError:
        kept = Path(huggingface_hub.constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
        fits = [path.name for path in kept.glob("snapshots/*") if path.name.startswith(asked)]
        if len(fits) != 1 or not re.fullmatch("[0-9a-f]{7,40}", asked):
            raise
        commit = fits[0]
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise MechdiffError(
            f"Revision {asked[:80]!r} of {repository} is of no known commit ({commit[:80]!r} is none); "
            "download it again with huggingface_hub, or give the path of a folder."
        )
    return commit


def folder_digest(folder: Path, *, code: bool = False) -> str:
    """`sha256:` and 16 hex digits over configurations and weights, and with `code` the Python files.

    Tokenizers and templates are left out: the tokens that they make are in the pair's fingerprint.
    """
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or re.fullmatch(
            r"config\.json|adapter_config\.json|.*\.safetensors\.index\.json", path.name
        ):
            total.update(f"{path.name} {file_sha256(path)}\n".encode())
    for path in sorted(folder.rglob("*.py")) if code else ():
        total.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return f"sha256:{total.hexdigest()[:16]}"
