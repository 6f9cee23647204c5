"""A pair made ready: both models, their tokenizers and engines, the prompts, and a fingerprint of it all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from mechdiff_mlflow.engine import CleanRunCache, MemoryBudget, ModuleNames, PatchEngine
from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.engine.model.sums import sites_of
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.chat import Readers, read
from mechdiff_mlflow.models.checkpoints import (
    Checkpoint,
    adapter_revision,
    adapter_tokenizer,
    check_adapter,
    layer_digests,
    load_adapter,
    module_names,
    pinned,
    quiet_transformers,
)
from mechdiff_mlflow.models.model_cache import Adapted, Residence
from mechdiff_mlflow.models.recordings import Recordings
from mechdiff_mlflow.spec.pair_spec import SPLITS, PairSpec, Position
from mechdiff_mlflow.spec.prompts import PromptSet, TokenizedPrompts, check_disjoint, read_prompts
from mechdiff_mlflow.spec.sites import Site

_T = TypeVar("_T")

_FILLED = 0.8
"""Share of a device's memory that two models may take before one is held at a time."""


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine holds at a time.

    Args:
        batch_size: Prompts a chunk.
        max_rows: Patched rows that go up the layers together; None is 8192, and 32768 on a GPU.
        head_rows: Rows whose logits exist together; None is 2048, and 8192 on a GPU.
        memory_budget: Bytes beside the weights, which the others are lowered to; None bounds nothing more.
        sequential: `yes` holds one model at a time, `no` both; `auto` one where two do not fit.
    """

    batch_size: int = 32
    max_rows: int | None = None
    head_rows: int | None = None
    memory_budget: int | None = None
    sequential: str = "auto"


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models.

    Args:
        role: `base` or `tuned`.
        tokenizer: Its tokenizer.
        revision: Commit of the hub, or `sha256:` and the digest of local weights; with an adapter, both.
        n_layers: Decoder blocks.
        load: Loads the model.
        key: What the model is held as; two sides may share one and switch its adapter.
        switch: Context in which the model is this side.
        make_engine: Builds the patch engine, inside `switch`.
        residence: Where models are held.
        n_embeddings: Tokens that the model has embeddings for; None if unknown.
        max_tokens: Of the longest prompt that it has positions for; None for no bound.
        outline: Gives the model without weights; None where it cannot be made.
    """

    role: str
    tokenizer: transformers.PreTrainedTokenizerBase
    revision: str
    n_layers: int
    load: Callable[[], nn.Module]
    key: str
    switch: Callable[[], contextlib.AbstractContextManager[object]]
    make_engine: Callable[[nn.Module], PatchEngine]
    residence: Residence
    n_embeddings: int | None = None
    max_tokens: int | None = None
    outline: Callable[[], Decoder | None] = lambda: None
    _digests: list[list[str] | None] = field(default_factory=list)
    _sites: list[frozenset[Site]] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        """The causal LM in eval mode; loaded, and the other one freed, if only one is held at a time."""
        return self.residence.model(self.key, self.load)

    @contextlib.contextmanager
    def engine(self) -> Iterator[PatchEngine]:
        """The patch engine, while the model is this side."""
        with self.switch(), self.residence.engine(self.role, self.model, self.make_engine) as engine:
            if self.residence.one_at_a_time and not self._digests:
                self._keep_digests(engine)  # while it is here: to load it again costs more
            if not self._sites:
                self._sites.append(frozenset(sites_of(engine.forward.decoder)))
            yield engine

    @property
    def sites(self) -> frozenset[Site]:
        """Where the model, once it was loaded, can be read and patched."""
        if not self._sites:
            with self.engine():
                pass
        return self._sites[0]

    def unembedding(self) -> Tensor:
        """The matrix from what the last norm leaves to logits, [vocabulary, width], without that norm.

        Raises:
            MechdiffError: The model has no output embeddings of its own, or not in memory.
        """
        with self.switch():
            head: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
            raise MechdiffError(
                f"The {self.role} model has no output embeddings that can be read (it has none, or they are "
                "offloaded or quantized), which logit_subspace is restricted by; use another solver."
            )
        return weight.detach().clone() if self.residence.one_at_a_time else weight.detach()

    def layer_digests(self) -> list[str] | None:
        """For each decoder block a digest of its weights; None where they are not in memory."""
        if not self._digests:
            with self.engine() as engine:
                self._keep_digests(engine)
        return self._digests[0]

    def _keep_digests(self, engine: PatchEngine) -> None:
        self._digests.append(layer_digests([block.module for block in engine.forward.decoder.blocks]))

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
        recordings: What was recorded of the models so far.
        options: Memory bounds of the engines, as asked for.
    """

    spec: PairSpec
    base: Side
    tuned: Side
    prompts: Mapping[str, PromptSet]
    device: str
    recordings: Recordings = field(default_factory=Recordings)
    options: EngineOptions = EngineOptions()

    @property
    def name(self) -> str:
        """The spec's name."""
        return self.spec.name

    @property
    def n_layers(self) -> int:
        """Layers that both models have."""
        return min(self.base.n_layers, self.tuned.n_layers)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over all that changes numbers: weights, code, dtype, modules, tokens of the prompts.

        Raises:
            MechdiffError: As `tokens`.
        """
        sides = (self.base, self.tuned)
        settings = {"template", "system", "dtype", "quantization", "modules", "trust_remote_code"}
        ids = [t.ids for side in sides for t in self.readers.all_of(side.role, Position.DECISION).sets]
        return _digest(
            *(side.revision for side in sides),
            *(side.tokenizer_digest for side in sides),
            *(json.dumps(side.tokenizer.special_tokens_map, default=str) for side in sides),
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
        """Prompts as one side sees them.

        Raises:
            MechdiffError: A template fails, doubles BOS, or leaves no tokens; see `chat.tokenize`.
        """
        tokens = self.readers.tokens(role, prompts, position)
        most = (self.base if role == "base" else self.tuned).max_tokens
        lengths = [len(ids) for ids in tokens.ids]
        if most is not None and max(lengths, default=0) > most:
            longest = lengths.index(max(lengths))
            raise MechdiffError(
                f"Prompt {longest + 1} of {prompts.split} has {lengths[longest]} tokens and {role} has "
                f"positions for {most}; shorten or remove it, and any other that is as long."
            )
        return tokens

    @cached_property
    def readers(self) -> Readers:
        """The tokenizers and chat templates of both sides."""
        sides = (self.base, self.tuned)
        tokenizers = {side.role: side.tokenizer for side in sides}
        n_embeddings = {side.role: side.n_embeddings for side in sides}
        return Readers(self.name, tokenizers, n_embeddings, self.spec.template, self.prompts)

    def recorded_base(self, prompts: PromptSet, position: Position) -> Mapping[Site, Tensor]:
        """Every activation of the base model on some prompts, recorded the first time.

        So that a model of which one is held at a time need not be loaded again for every question.
        """
        key = ("base", prompts.digest, position)
        if not self.recordings.everything(key):
            tokens = self.tokens("base", prompts, position)
            with self.base.engine() as engine:
                captured = engine.capture(tokens, sites_of(engine.forward.decoder))
            self.recordings.add(key, captured)
        return self.recordings.everything(key)

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
        if self.one_at_a_time:
            base, tuned = self.base.layer_digests(), self.tuned.layer_digests()
            return None if base is None or tuned is None else _first_difference(base, tuned, operator.eq)
        names = module_names(self.spec)
        weights, others = (
            [block.module.state_dict() for block in Decoder.of(side.model, names).blocks]
            for side in (self.base, self.tuned)
        )
        if any(x.is_meta for block in (*weights, *others) for x in block.values()):
            return None
        return _first_difference(weights, others, _same_weights)

    @property
    def one_at_a_time(self) -> bool:
        """Whether only the model in use is held in memory."""
        return self.base.residence.one_at_a_time


def _first_difference(a: list[_T], b: list[_T], same: Callable[[_T, _T], bool]) -> int | None:
    """Index of the first unequal items, their number where there are none; None for lists of two lengths."""
    if len(a) != len(b):
        return None
    return next((i for i, pair in enumerate(zip(a, b, strict=True)) if not same(*pair)), len(a))


def _same_weights(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name].to(a[name].device)) for name in a)


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
        lazily: Load a model only once it is touched: where others compute, this process needs tokenizers,
            prompts and digests alone, and no device.
        check: Called with the pair before any weights are loaded, to refuse what is asked of it.

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
    spec = pinned(spec)
    device = device if lazily and device not in ("auto", "meta") else _existing_device(device)
    for part in spec.device_map.values() if isinstance(spec.device_map, dict) else [spec.device_map]:
        if str(part) == "meta":
            _existing_device("meta")
    bounds = options or EngineOptions()
    base_weights = Checkpoint(spec, spec.base.model, spec.base.revision, device)
    tuned_weights = _tuned_weights(spec, base_weights)
    one_at_a_time = (
        not lazily and tuned_weights is not None and _one_at_a_time(bounds, base_weights, tuned_weights)
    )
    residence = Residence(one_at_a_time=one_at_a_time)
    make_engine = _engine_maker(spec, bounds)
    with quiet_transformers():
        # A tokenizer may be as hostile as a template: loaded within bounds first.
        own = partial(adapter_tokenizer, spec, base_weights)
        tokenizers = {
            "base": lambda: base_weights.tokenizer,
            "tuned": own if tuned_weights is None else lambda: tuned_weights.tokenizer,
        }
        for role, load_tokenizer in tokenizers.items():
            read(load_tokenizer, [], what=f"Loading the {role} tokenizer of {spec.name}")
        if tuned_weights is not None:
            base, tuned = (
                Side(
                    role,
                    c.tokenizer,
                    c.revision,
                    c.n_layers,
                    c.load,
                    role,
                    nullcontext,
                    make_engine,
                    residence,
                    c.n_embeddings,
                    c.max_tokens,
                    c.outline,
                )
                for role, c in (("base", base_weights), ("tuned", tuned_weights))
            )
        else:
            check_adapter(spec, base_weights)
            load = Adapted("base", base_weights.load, partial(load_adapter, spec), residence)
            base = Side(
                "base",
                base_weights.tokenizer,
                base_weights.revision,
                base_weights.n_layers,
                load,
                load.name,
                load.disabled,
                make_engine,
                residence,
                base_weights.n_embeddings,
                base_weights.max_tokens,
                base_weights.outline,
            )
            both = f"{base.revision}+{adapter_revision(spec)}"
            tuned = replace(
                base,
                role="tuned",
                tokenizer=tokenizers["tuned"](),
                revision=both,
                switch=nullcontext,
                _digests=[],
                _sites=[],
            )
        pair = Pair(spec, base, tuned, prompts, device, options=bounds)
        for remark in pair.readers.remarks:  # all prompts are read, so what is wrong with them is said now
            warnings.warn(remark, stacklevel=2)
        for side in (base, tuned):
            for one in prompts.values():
                pair.tokens(side.role, one, Position.DECISION)
        if check is not None:
            check(pair)
        if not one_at_a_time and not lazily:
            for side in (base, tuned):
                residence.model(side.key, side.load)
    return pair


def _tuned_weights(spec: PairSpec, base: Checkpoint) -> Checkpoint | None:
    """The tuned side's checkpoint; None for an adapter, which is no model of its own."""
    if spec.tuned.plant is not None:
        return replace(base, plant=spec.tuned.plant)
    if spec.tuned.model is None:
        return None
    return Checkpoint(spec, spec.tuned.model, spec.tuned.revision, base.device)


def _one_at_a_time(options: EngineOptions, base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether that was asked for, or both models leave too little memory on their device."""
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


def _engine_maker(spec: PairSpec, bounds: EngineOptions) -> Callable[[nn.Module], PatchEngine]:
    budget = None if bounds.memory_budget is None else MemoryBudget(bounds.memory_budget)
    cache = CleanRunCache(budget)

    def make_engine(model: nn.Module) -> PatchEngine:
        # A GPU is kept busy by larger matrices; where memory runs out, the engine takes less.
        times = 4 if next(model.parameters()).is_cuda else 1
        return PatchEngine(
            model,
            overrides=module_names(spec),
            batch_size=bounds.batch_size,
            max_rows=bounds.max_rows or 8192 * times,
            head_rows=bounds.head_rows or 2048 * times,
            budget=budget,
            cache=cache,
        )

    return make_engine


def load_base(pair: Pair) -> nn.Module:
    """Another copy of the pair's base model, without any adapter, on the pair's device.

    Raises:
        MechdiffError: It cannot be read any more.
    """
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


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
