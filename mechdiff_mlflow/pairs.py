"""A pair made ready: both models, their tokenizers and engines, the prompts, and a fingerprint of it all."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mechdiff_mlflow.engine import ModuleNames, PatchEngine
from mechdiff_mlflow.engine.architecture import Decoder
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.planted import Plant, plant_in
from mechdiff_mlflow.prompts import PromptSet, TokenizedPrompts, check_disjoint, read_prompts, tokenize
from mechdiff_mlflow.spec import SPLITS, PairSpec, Position


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine holds at a time.

    Args:
        batch_size: Prompts a chunk.
        max_rows: Patched rows that go up the layers together.
        head_rows: Rows whose logits exist together.
    """

    batch_size: int = 32
    max_rows: int = 8192
    head_rows: int = 2048


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models.

    Args:
        role: `base` or `tuned`.
        model: The causal LM, in eval mode.
        tokenizer: Its tokenizer.
        revision: Commit of the hub, or `sha256:` and the digest of local weights; with an adapter, both.
        switch: Context in which `model` is this side; two sides may share one module and switch its adapter.
        make_engine: Builds the patch engine, inside `switch`.
    """

    role: str
    model: nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    revision: str
    switch: Callable[[], contextlib.AbstractContextManager[object]]
    make_engine: Callable[[nn.Module], PatchEngine]

    @cached_property
    def _engine(self) -> PatchEngine:
        return self.make_engine(self.model)

    @contextlib.contextmanager
    def engine(self) -> Iterator[PatchEngine]:
        """The patch engine, while the model is this side."""
        with self.switch():
            yield self._engine

    def unembedding(self) -> Tensor:
        """The matrix from what the last norm leaves to logits, [vocabulary, width], without that norm.

        Raises:
            MechdiffError: The model has no output embeddings of its own.
        """
        with self.switch():
            head: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor):
            raise MechdiffError(
                f"The {self.role} model {type(self.model).__name__} has no output embeddings, which "
                "logit_subspace is restricted by; use another solver."
            )
        return weight.detach()

    @cached_property
    def tokenizer_digest(self) -> str:
        """16 hex digits over the vocabulary and the chat template."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return _digest(vocabulary, str(self.tokenizer.chat_template))


@dataclass(frozen=True, eq=False)
class Pair:
    """Base and tuned model with their prompts.

    Args:
        spec: What was asked for, with the dtype in force.
        base: The base side.
        tuned: The tuned side.
        prompts: The splits that the spec names; disjoint.
        device: Where the models are.
    """

    spec: PairSpec
    base: Side
    tuned: Side
    prompts: Mapping[str, PromptSet]
    device: str
    _tokens: dict[tuple[str, str, Position], TokenizedPrompts] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The spec's name."""
        return self.spec.name

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over weights, tokenizers, templates, dtype and prompts."""
        return _digest(
            self.base.revision,
            self.tuned.revision,
            self.base.tokenizer_digest,
            self.tuned.tokenizer_digest,
            f"{self.spec.template} {self.spec.system!r} {self.spec.dtype}",
            *(f"{split} {prompts.digest}" for split, prompts in sorted(self.prompts.items())),
        )

    def prompts_of(self, split: str, n: int | None = None, *, option: str = "--n") -> PromptSet:
        """The first n prompts of a split; all when n is None.

        Raises:
            MechdiffError: The pair has no such split, or fewer prompts.
        """
        if split not in self.prompts:
            self.spec.prompt_path(split)
            raise AssertionError(f"{split} is in the spec and was not read")
        return self.prompts[split].first(n, option=option)

    def tokens(self, role: str, prompts: PromptSet, position: Position) -> TokenizedPrompts:
        """Prompts as one side sees them.

        Raises:
            MechdiffError: A template fails, doubles BOS, or leaves no tokens.
        """
        key = (role, prompts.digest, position)
        if key not in self._tokens:
            reader = {"own": role, "none": role}.get(self.spec.template, self.spec.template)
            tokenizer = (self.base if reader == "base" else self.tuned).tokenizer
            self._tokens[key] = tokenize(
                tokenizer, prompts, chat=self.spec.template != "none", position=position
            )
        return self._tokens[key]

    def check_same_tokens(self, prompts: PromptSet, position: Position) -> None:
        """Make sure that both sides read the same where their tokenizers are the same.

        Raises:
            MechdiffError: They do not; or as `tokens`.
        """
        base, tuned = (self.tokens(role, prompts, position) for role in ("base", "tuned"))
        if self.tokenizers_agree and base != tuned:
            differ = [
                i for i, pair in enumerate(zip(base.ids, tuned.ids, strict=False), 1) if pair[0] != pair[1]
            ]
            where = f"{len(differ)} {prompts.split} prompts, first {differ[0]}" if differ else "positions"
            raise MechdiffError(
                f"The tokenizers of {self.name} are the same and base and tuned see different tokens "
                f"({where}); their special tokens differ, so set template: base in the spec."
            )

    @property
    def modules(self) -> ModuleNames | None:
        """Module names that the spec sets for models that are not recognised."""
        return _module_names(self.spec)

    @property
    def tokenizers_agree(self) -> bool:
        """Whether both sides must see the same token ids."""
        return (
            self.spec.template in ("tuned", "base")
            or self.base.tokenizer_digest == self.tuned.tokenizer_digest
        )

    def first_changed_layer(self) -> int | None:
        """The first decoder layer whose weights differ, n_layers when none does.

        None when the weights cannot be compared tensor by tensor: other architectures, or one shared module.
        """
        if self.base.model is self.tuned.model:
            return None
        names = _module_names(self.spec)
        base, tuned = (Decoder.of(side.model, names).blocks for side in (self.base, self.tuned))
        if len(base) != len(tuned):
            return None
        for layer, (block, other) in enumerate(zip(base, tuned, strict=True)):
            weights, others = block.module.state_dict(), other.module.state_dict()
            if weights.keys() != others.keys():
                return None
            if not all(torch.equal(weights[name], others[name]) for name in weights):
                return layer
        return len(base)


def load_pair(
    spec: PairSpec, *, dtype: str | None = None, device: str = "auto", options: EngineOptions | None = None
) -> Pair:
    """Read the prompts, then load both models.

    Args:
        spec: The pair.
        dtype: Instead of the spec's.
        device: `auto` is CUDA where there is one, otherwise the CPU; ignored with a device map.
        options: Memory bounds of the engines.

    Raises:
        MechdiffError: Prompts, weights or tokenizers are missing or malformed.
    """
    if dtype is not None:
        spec = PairSpec.model_validate({**spec.model_dump(), "root": spec.root, "dtype": dtype})
    # Cheap things first: nobody should wait for 16 GB of weights to hear of a typing error in line 3.
    prompts = {
        split: read_prompts(spec.prompt_path(split), split, system=spec.system)
        for split in SPLITS
        if getattr(spec.prompts, split)
    }
    check_disjoint(prompts.values())
    plant = spec.tuned.plant
    device = _existing_device(device)

    def make_engine(model: nn.Module) -> PatchEngine:
        bounds = options or EngineOptions()
        return PatchEngine(
            model,
            overrides=_module_names(spec),
            batch_size=bounds.batch_size,
            max_rows=bounds.max_rows,
            head_rows=bounds.head_rows,
        )

    with _quiet_transformers():
        model, tokenizer, revision = _load_model(spec, spec.base.model, spec.base.revision, device)
        unadapted: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
        if plant is not None:
            tuned_parts = _planted(spec, model, plant), tokenizer, f"{revision}+planted:{plant}"
        elif spec.tuned.model is not None:
            tuned_parts = _load_model(spec, spec.tuned.model, spec.tuned.revision, device)
        else:
            assert spec.tuned.adapter is not None
            adapted, adapter_revision = _load_adapter(spec, model, spec.tuned.adapter, spec.tuned.revision)
            unadapted = adapted.disable_adapter
            tuned_parts = model, tokenizer, f"{revision}+{adapter_revision}"
    base = Side("base", model, tokenizer, revision, unadapted, make_engine)
    tuned = Side("tuned", *tuned_parts, contextlib.nullcontext, make_engine)
    return Pair(spec, base, tuned, prompts, device)


def load_base(pair: Pair) -> nn.Module:
    """Another copy of the pair's base model, without any adapter, on the pair's device.

    Raises:
        MechdiffError: It cannot be read any more.
    """
    with _quiet_transformers():
        return _load_model(pair.spec, pair.spec.base.model, pair.spec.base.revision, pair.device)[0]


def _existing_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise MechdiffError(
            f"Device {name!r} cannot be used here; pass --device cpu, cuda or auto."
        ) from error
    return name


def _module_names(spec: PairSpec) -> ModuleNames | None:
    return ModuleNames(**spec.modules.model_dump()) if spec.modules else None


def _load_model(
    spec: PairSpec, reference: str, revision: str | None, device: str
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase, str]:
    place = spec.locate(reference)
    if spec.trust_remote_code:
        warnings.warn(f"Code from {place} runs on this machine: trust_remote_code is on.", stacklevel=3)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": spec.trust_remote_code}
    try:
        # use_safetensors: a .bin checkpoint is a pickle, which runs code when it is read.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            place,
            dtype=getattr(torch, spec.dtype),
            device_map=spec.device_map,
            use_safetensors=True,
            **options,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **options)
    except MechdiffError:
        raise
    except Exception as error:  # configurations and weights of strangers fail in every way
        reason = " ".join(str(error).split())[:300]
        raise MechdiffError(
            f"Model {place} of pair {spec.name!r} cannot be loaded ({reason}); correct the id or path, "
            "download it first, or log in to the hub."
        ) from error
    if spec.device_map is None:
        model.to(device)
    return model.eval().requires_grad_(False), tokenizer, _resolved_revision(place, model)


def _planted(spec: PairSpec, base: nn.Module, plant: Plant) -> nn.Module:
    """A copy of the base with the change in it."""
    model = copy.deepcopy(base)
    decoder = Decoder.of(model, _module_names(spec))
    decoder.check(plant.site)
    plant_in(plant, decoder.module(plant.site))
    return model


def _load_adapter(spec: PairSpec, model: nn.Module, reference: str, revision: str | None) -> tuple[Any, str]:
    try:
        import peft
    except ImportError:
        raise MechdiffError(
            f"Pair {spec.name!r} has a PEFT adapter and peft is not installed; install mechdiff-mlflow[peft]."
        ) from None
    place = spec.locate(reference)
    try:
        adapted = peft.PeftModel.from_pretrained(model, place, revision=revision)
    except Exception as error:  # as above
        reason = " ".join(str(error).split())[:300]
        raise MechdiffError(f"Adapter {place} of pair {spec.name!r} cannot be loaded ({reason}).") from error
    adapted.eval().requires_grad_(False)
    return adapted, _folder_digest(Path(place)) if Path(place).is_dir() else f"{place}@{revision or 'main'}"


def _resolved_revision(place: str, model: nn.Module) -> str:
    if Path(place).is_dir():
        return _folder_digest(Path(place))
    commit = getattr(model.config, "_commit_hash", None)
    return f"{place}@{commit or 'unknown'}"


def _folder_digest(folder: Path) -> str:
    """`sha256:` and 16 hex digits over the configuration and the weights of a local checkpoint."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name in ("config.json", "adapter_config.json"):
            total.update(f"{path.name} {_file_digest(path)}\n".encode())
    return f"sha256:{total.hexdigest()[:16]}"


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
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
