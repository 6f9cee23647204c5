"""A pair made ready: both models, their tokenizers and engines, the prompts, and a fingerprint of it all."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine import ModuleNames
from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.engine.model.sums import sites_of
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.checkpoints import (
    Checkpoint,
    gguf_parsed_once,
    module_names,
    quiet_transformers,
    with_commits,
)
from mechdiff_mlflow.models.peft_adapters import Adapter
from mechdiff_mlflow.models.readers import Readers, read
from mechdiff_mlflow.models.recordings import RecordedPrompts
from mechdiff_mlflow.models.sides import AdaptedModel, ModelCache, Side, digest, engine_maker
from mechdiff_mlflow.models.sides import EngineOptions as EngineOptions
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position
from mechdiff_mlflow.spec.prompt_files import split_remark
from mechdiff_mlflow.spec.prompts import PromptSet, check_disjoint
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

_FILLED = 0.8
"""Share of a device's memory that two models may take before one is held at a time."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Base and tuned model with their prompts."""

    spec: PairSpec  # with the dtype in force and revisions as commits
    base: Side
    tuned: Side
    prompts: Mapping[str, PromptSet]  # of the splits that the spec names; disjoint
    device: str
    recordings: RecordedPrompts = field(default_factory=RecordedPrompts)
    options: EngineOptions = field(default_factory=EngineOptions)

    @property
    def name(self) -> str:
        """The spec's name."""
        return self.spec.name

    @property
    def sides(self) -> tuple[Side, Side]:
        """Base and tuned."""
        return self.base, self.tuned

    def side(self, role: str) -> Side:
        """The side called `base` or `tuned`."""
        return {"base": self.base, "tuned": self.tuned}[role]

    @property
    def n_layers(self) -> int:
        """Layers that both models have."""
        return min(self.base.n_layers, self.tuned.n_layers)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over all that changes numbers: weights, code, dtype, modules, tokens of prompts."""
        settings = {"template", "system", "dtype", "quantization", "modules", "trust_remote_code"}
        readings = [self.readers.all_prompts(side.role, Position.DECISION) for side in self.sides]
        ids = [tokens.ids for reading in readings for tokens in reading.sets]
        return digest(
            *(side.revision for side in self.sides),
            *(side.tokenizer_digest for side in self.sides),
            *(json.dumps(side.tokenizer.special_tokens_map, default=str) for side in self.sides),
            self.spec.model_dump_json(include=settings),
            *(f"{split} {prompts.digest}" for split, prompts in self.prompts.items()),
            json.dumps(ids),
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
        """Prompts as one side sees them, see `Readers.tokens`."""
        return self.readers.tokens(role, prompts, position)

    @cached_property
    def readers(self) -> Readers:
        """The tokenizers and chat templates of both sides."""
        return Readers(self.spec, {side.role: side for side in self.sides}, self.prompts)

    def recorded_base(self, prompts: PromptSet, position: Position) -> Mapping[Site, Tensor]:
        """Every activation of the base model on some prompts, recorded once: loading it again costs more."""
        key = ("base", prompts.digest, position)
        if not self.recordings.everything(key):
            tokens = self.tokens("base", prompts, position)
            with self.base.engine() as engine:
                captured = engine.run_clean(tokens, sites_of(engine.forward.decoder))
            self.recordings.add(key, captured.activations, captured.top)
        return self.recordings.everything(key)

    def check_same_tokens(self, prompts: PromptSet, position: Position) -> None:
        """Check that both sides read the same tokens where their tokenizers are the same.

        Raises:
            MechdiffError: They do not; or as `tokens`.
        """
        base, tuned = (self.tokens(side.role, prompts, position) for side in self.sides)
        if self.tokenizers_agree and base != tuned:
            differ = [
                i for i, pair in enumerate(zip(base.ids, tuned.ids, strict=False), 1) if pair[0] != pair[1]
            ]
            where = f"{len(differ)} {prompts.split} prompts, first {differ[0]}" if differ else "positions"
            raise MechdiffError(
                f"The tokenizers of {self.name} are the same and base and tuned see different tokens "
                f"({where}); their special tokens differ, so set template: base in the spec."
            )

    def outlines(self) -> list[Decoder]:
        """The blocks of base and tuned without weights, as far as they are known."""
        return [found for side in self.sides if (found := side.checkpoint.outline()) is not None]

    @property
    def modules(self) -> ModuleNames | None:
        """Module names that the spec sets for models that are not recognised."""
        return module_names(self.spec)

    @property
    def tokenizers_agree(self) -> bool:
        """Whether both sides must see the same token ids."""
        return (
            self.spec.template in ("tuned", "base")
            or self.base.tokenizer_digest == self.tuned.tokenizer_digest
        )

    def first_changed_layer(self) -> int | None:
        """The first decoder layer whose weights differ, n_layers when none does.

        None when the weights cannot be compared block by block: other depths, offloaded weights, or one
        shared module.
        """
        if self.base.key == self.tuned.key:
            return None
        base, tuned = self.base.layer_digests(), self.tuned.layer_digests()
        if not base or len(base) != len(tuned):
            return None
        return next((i for i, (a, b) in enumerate(zip(base, tuned, strict=True)) if a != b), len(base))

    @property
    def one_at_a_time(self) -> bool:
        """Whether only the model in use is held in memory."""
        return self.base.model_cache.one_at_a_time


def load_pair(
    spec: PairSpec,
    *,
    dtype: str | None = None,
    device: str = "auto",
    options: EngineOptions | None = None,
    lazily: bool = False,
    check: Callable[[Pair], None] | None = None,
) -> Pair:
    """Read the prompts, then load both models.

    Args:
        spec: The pair.
        dtype: Instead of the spec's.
        device: `auto` is CUDA where there is one, otherwise the CPU; ignored with a device map.
        options: Memory bounds of the engines.
        lazily: Load a model only once it is touched: where workers compute, this process needs tokenizers,
            prompts and digests alone, and no device.
        check: Called with the pair before any weights are loaded, to refuse what is asked of it.

    Raises:
        MechdiffError: Prompts, weights or tokenizers are missing or malformed.
    """
    if dtype is not None:
        spec = PairSpec.model_validate({**spec.model_dump(), "root": spec.root, "dtype": dtype})
    # Cheap things first: nobody should wait for 16 GB of weights to hear of a typing error in line 3.
    prompts = spec.read_prompts()
    check_disjoint(prompts.values())
    if spec.prompts.is_one:
        warnings.warn(split_remark(prompts, spec.prompts.seed), stacklevel=2)
    spec = with_commits(spec)
    device = device if lazily and device not in ("auto", "meta") else _existing_device(device)
    for part in spec.device_map.values() if isinstance(spec.device_map, dict) else [spec.device_map]:
        if str(part) == "meta":
            _existing_device("meta")
    bounds = options or EngineOptions()
    base_weights = Checkpoint(spec, spec.base.model, spec.base.revision, device)
    tuned_source: Checkpoint | Adapter
    if spec.tuned.plant is not None:
        tuned_source = replace(base_weights, plant=spec.tuned.plant)
    elif spec.tuned.model is not None:
        tuned_source = Checkpoint(spec, spec.tuned.model, spec.tuned.revision, device)
    else:
        tuned_source = Adapter(spec, base_weights)
    one_at_a_time = not lazily and _one_at_a_time(bounds, base_weights, tuned_source)
    cache, make_engine = ModelCache(one_at_a_time=one_at_a_time), engine_maker(spec, bounds)

    def side(role: str, weights: Checkpoint) -> Side:
        return Side(
            role, weights, weights.tokenizer, weights.revision, weights.load, role, make_engine, cache
        )

    with quiet_transformers(), gguf_parsed_once(spec):
        # A tokenizer may be as hostile as a template: loaded within bounds first.
        read(lambda: base_weights.tokenizer, [], what=f"Loading the base tokenizer of {spec.name}")
        base = side("base", base_weights)  # now: an adapter may have the same tokenizer
        read(lambda: tuned_source.tokenizer, [], what=f"Loading the tuned tokenizer of {spec.name}")
        if isinstance(tuned_source, Checkpoint):
            tuned = side("tuned", tuned_source)
        else:
            tuned_source.check()
            adapted = AdaptedModel(base.key, base.load, tuned_source.apply, cache)
            base = replace(base, load=adapted.load, switch=adapted.disabled)
            tuned = replace(
                base,
                role="tuned",
                tokenizer=tuned_source.tokenizer,
                revision=f"{base.revision}+{tuned_source.revision}",
                switch=nullcontext,
            )
        pair = Pair(spec, base, tuned, prompts, device, options=bounds)
        for remark in pair.readers.remarks:  # all prompts are read, so what is wrong with them is said now
            warnings.warn(remark, stacklevel=2)
        if check is not None:
            check(pair)
        if not one_at_a_time and not lazily:
            for one in pair.sides:
                cache.model(one.key, one.load)
    return pair


def _one_at_a_time(options: EngineOptions, base: Checkpoint, tuned: Checkpoint | Adapter) -> bool:
    """Whether that was asked for, or both models leave too little memory on their device."""
    if isinstance(tuned, Adapter):
        return False  # there is one model
    if options.sequential != "auto":
        return options.sequential == "yes"
    if base.spec.device_map is not None:
        return False  # accelerate finds a place for every layer
    beside = options.memory_budget or 0
    return base.n_bytes() + tuned.n_bytes() + beside > _FILLED * _memory_of(base.device)


def _memory_of(device: str) -> int:
    """Bytes that are free on a GPU; of main memory, all of it, since caches give way."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on every system
        return sys.maxsize


def load_base(pair: Pair) -> nn.Module:
    """Another copy of the pair's base model, without any adapter, on the pair's device."""
    base = pair.spec.base
    return Checkpoint(pair.spec, base.model, base.revision, pair.device).load()


def _existing_device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=name).cpu()  # `meta` has places and no numbers
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise MechdiffError(
            f"Device {name!r} cannot be used here; pass --device cpu, cuda or auto."
        ) from error
    return name
