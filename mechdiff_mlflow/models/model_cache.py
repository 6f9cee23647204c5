"""Which models are in memory: both of a pair, or the one that was used last."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from mechdiff_mlflow.engine import PatchEngine
from mechdiff_mlflow.engine.memory.oom_retry import release_memory


class ModelCache:
    """Holds models and their engines by name.

    Args:
        one_at_a_time: Free the model in memory, with all clean runs of it, before another is loaded.
    """

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
