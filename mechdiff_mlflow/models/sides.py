"""One side of a pair: a model that is loaded when needed, its tokenizer and its patch engine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import transformers
from torch import Tensor, nn

from mechdiff_mlflow.engine import CleanRunCache, PatchEngine
from mechdiff_mlflow.engine.memory.oom_retry import release_memory
from mechdiff_mlflow.engine.model.sums import sites_of
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.models.checkpoints import Checkpoint, layer_digests, module_names
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.sites import Site


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine holds at a time."""

    batch_size: int = 32  # prompts in a chunk
    max_rows: int | None = None  # patched rows that go up the layers together; None: 8192, 32768 on a GPU
    head_rows: int | None = None  # rows whose logits exist together; None: 2048, 8192 on a GPU
    memory_budget: int | None = None  # bytes beside the weights, to which the others are lowered
    sequential: str = "auto"  # `yes` holds one model at a time, `no` both; `auto` one where two do not fit


class ModelCache:
    """Holds models and their engines by name; one at a time, with its clean runs, where that is asked for."""

    def __init__(self, *, one_at_a_time: bool) -> None:
        self.one_at_a_time = one_at_a_time
        self._models: dict[str, nn.Module] = {}
        self._engines: dict[str, PatchEngine] = {}
        self._busy: list[str] = []

    def model(self, name: str, load: Callable[[], nn.Module]) -> nn.Module:
        """The model called `name`, loaded if it is not there."""
        if name not in self._models:
            if self.one_at_a_time and self._models:
                assert not self._busy, f"{name} is asked for while {self._busy} is at work"
                while self._engines:  # none may be left in a variable, which would keep its model
                    self._engines.popitem()[1].give_up()
                self._models.clear()
                release_memory()
            self._models[name] = load()
        return self._models[name]

    @contextlib.contextmanager
    def engine(
        self, name: str, model: nn.Module, make: Callable[[nn.Module], PatchEngine]
    ) -> Iterator[PatchEngine]:
        """The engine called `name`, made once for as long as its model is held."""
        if name not in self._engines:
            self._engines[name] = make(model)
        self._busy.append(name)
        engine = self._engines[name]
        try:
            # A caller's variable outlives the context and would keep the model in memory.
            yield weakref.proxy(engine) if self.one_at_a_time else engine
        finally:
            self._busy.pop()


class AdaptedModel:
    """A model with a PEFT adapter that can be switched off, held in a cache under `key`."""

    def __init__(
        self, key: str, load: Callable[[], nn.Module], adapt: Callable[[nn.Module], Any], cache: ModelCache
    ) -> None:
        self._key, self._load, self._adapt, self._cache = key, load, adapt, cache
        self._wrapper: Any = None

    def load(self) -> nn.Module:
        """The model with the adapter in it."""
        model = self._load()
        self._wrapper = self._adapt(model)
        return model

    def disabled(self) -> Any:
        """A context in which the model is itself alone; loaded if it is not there."""
        self._cache.model(self._key, self.load)
        return self._wrapper.disable_adapter()


@dataclass(eq=False)
class Side:
    """One of the two models, `base` or `tuned`; `switch` is the context in which the model is this side."""

    role: str
    checkpoint: Checkpoint  # of an adapter, its base's
    tokenizer: transformers.PreTrainedTokenizerBase
    revision: str  # commit on the hub, or `sha256:` and the digest of local weights; with an adapter, both
    load: Callable[[], nn.Module]
    key: str  # in the cache; two sides may share one and switch its adapter
    make_engine: Callable[[nn.Module], PatchEngine]  # inside `switch`
    model_cache: ModelCache
    switch: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    _digests: list[str] | None = field(default=None, init=False)
    _sites: frozenset[Site] | None = field(default=None, init=False)

    @property
    def model(self) -> nn.Module:
        """The causal LM in eval mode; loaded, and the other one freed, if only one is held at a time."""
        return self.model_cache.model(self.key, self.load)

    @cached_property
    def n_layers(self) -> int:
        """Decoder blocks."""
        return self.checkpoint.n_layers

    @contextlib.contextmanager
    def engine(self) -> Iterator[PatchEngine]:
        """The patch engine, while the model is this side."""
        with self.switch(), self.model_cache.engine(self.role, self.model, self.make_engine) as engine:
            if self.model_cache.one_at_a_time and self._digests is None:
                self._digests = layer_digests(engine.forward.decoder)  # now: loading it again costs more
            if self._sites is None:
                self._sites = frozenset(sites_of(engine.forward.decoder))
            yield engine

    @property
    def sites(self) -> frozenset[Site]:
        """Where the model can be read and patched; loads it the first time."""
        if self._sites is None:
            with self.engine():
                pass
        return self._sites or frozenset()

    def unembedding(self) -> Tensor:
        """The matrix from what the last norm leaves to logits, [vocabulary, width], if it is in memory."""
        with self.switch():
            head: Any = getattr(self.model, "get_output_embeddings", lambda: None)()
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
            raise MechdiffError(
                f"The {self.role} model has no output embeddings that can be read (it has none, or they are "
                "offloaded or quantized), which logit_subspace is restricted by; use another solver."
            )
        return weight.detach().clone() if self.model_cache.one_at_a_time else weight.detach()

    def layer_digests(self) -> list[str]:
        """A digest of each decoder block's weights; empty where they are not in memory."""
        if self._digests is None:
            with self.engine() as engine:
                self._digests = layer_digests(engine.forward.decoder)
        return self._digests

    @cached_property
    def tokenizer_digest(self) -> str:
        """16 hex digits over the vocabulary and the chat template."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return digest(vocabulary, str(self.tokenizer.chat_template))


def engine_maker(spec: PairSpec, bounds: EngineOptions) -> Callable[[nn.Module], PatchEngine]:
    """A function that makes the patch engines of both sides, which share one memory budget."""
    cache = CleanRunCache(bounds.memory_budget)

    def make_engine(model: nn.Module) -> PatchEngine:
        # A GPU is kept busy by larger matrices; where memory runs out, the engine takes less.
        times = 4 if next(model.parameters()).is_cuda else 1
        return PatchEngine(
            model,
            overrides=module_names(spec),
            batch_size=bounds.batch_size,
            max_rows=bounds.max_rows or 8192 * times,
            head_rows=bounds.head_rows or 2048 * times,
            cache=cache,
        )

    return make_engine


def digest(*parts: str) -> str:
    """16 hex digits that identify texts in order."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
