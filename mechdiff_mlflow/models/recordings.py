"""Prompts that were run through a pair's models, shared so that each runs over each split once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mechdiff_mlflow.engine import CleanRuns, PatchEngine
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

Key = tuple[str, str, Position]
"""Role, digest of the prompts, position."""


@dataclass(frozen=True, eq=False)
class RecordedPrompts:
    """Clean runs that patches need, and activations that are asked for again.

    The engine keeps the clean runs that fit beside the models, and drops them when memory runs out or its
    model is freed.
    """

    _recorded: dict[Key, CleanRuns] = field(default_factory=dict)
    _captured: dict[Key, dict[Site, Tensor]] = field(default_factory=dict)
    _top: dict[Key, Tensor] = field(default_factory=dict)

    def recorded(
        self, engine: PatchEngine, key: Key, tokens: TokenizedPrompts, sites: Sequence[Site]
    ) -> CleanRuns:
        """A recording of prompts, run at the first score or completion, that can be patched at `sites`.

        Raises:
            MechdiffError: A site does not exist.
        """
        found = self._recorded.get(key)
        if found is None or not engine.owns(found) or not found.has(sites):
            # Whoever asked before may ask again.
            both = [*sites, *(found.sites if found is not None else ())]
            found = self._recorded[key] = engine.record(tokens, both, now=False)
        return found

    def captured(self, key: Key, sites: Sequence[Site]) -> Mapping[Site, Tensor] | None:
        """Activations at some sites, perhaps at others too; None where they are not known."""
        recorded = self._recorded.get(key)
        if recorded is not None and recorded.is_complete and recorded.has(sites):
            return recorded.activations
        found = self.everything(key)
        return found if found.keys() >= set(sites) else None

    def add(self, key: Key, captured: Mapping[Site, Tensor], top: Tensor | None = None) -> None:
        """Remember activations beside those at other sites of the same prompts, and their next tokens."""
        self._captured[key] = {**self.everything(key), **captured}
        if top is not None:
            self._top[key] = top

    def top(self, key: Key) -> Tensor:
        """The most probable next tokens of prompts that were run: see `top_tokens`."""
        return self._top[key] if key in self._top else self._recorded[key].top

    def everything(self, key: Key) -> Mapping[Site, Tensor]:
        """All activations that were added."""
        return self._captured.get(key, {})

    def forget(self) -> None:
        """Drop everything, for a process that goes on to other prompts."""
        self._recorded.clear()
        self._captured.clear()
        self._top.clear()
