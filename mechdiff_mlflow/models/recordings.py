"""Recordings of a pair's models, shared so that each runs over each split once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mechdiff_mlflow.engine import CleanRuns, PatchEngine
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import TokenizedPrompts
from mechdiff_mlflow.spec.sites import Site

Key = tuple[str, str, Position]
"""Role, digest of the prompts, position."""


@dataclass(frozen=True, eq=False)
class Recordings:
    """Clean runs that patches need, and activations that are asked for again.

    The engine keeps the clean runs that fit beside the models, and drops them when memory runs out or its
    model is freed.
    """

    _recorded: dict[Key, CleanRuns] = field(default_factory=dict)
    _captured: dict[Key, Mapping[Site, Tensor]] = field(default_factory=dict)

    def to_patch(
        self, engine: PatchEngine, key: Key, tokens: TokenizedPrompts, sites: Sequence[Site]
    ) -> CleanRuns:
        """A recording of prompts, run at the first score or completion, that can be patched at `sites`.

        Args:
            engine: The engine of the role's model.
            key: Role, prompts and position.
            tokens: The prompts as that model sees them.
            sites: Where it will be patched.

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
        """Activations at some sites; None where they are not known."""
        recorded = self._recorded.get(key)
        if recorded is not None and recorded.is_complete and recorded.has(sites):
            return Rows.of(recorded.activations, sites)
        found = self._captured.get(key)
        return Rows.of(found, sites) if found is not None and found.keys() >= set(sites) else None

    def add(self, key: Key, captured: Mapping[Site, Tensor]) -> None:
        """Remember activations beside those at other sites of the same prompts."""
        known = self._captured.get(key, {})
        self._captured[key] = Rows({**dict.fromkeys(known, known), **dict.fromkeys(captured, captured)})

    def everything(self, key: Key) -> Mapping[Site, Tensor]:
        """All activations that were added."""
        return self._captured.get(key, {})

    def forget(self) -> None:
        """Drop everything, for a process that goes on to other prompts."""
        self._recorded.clear()
        self._captured.clear()


class Rows(Mapping[Site, Tensor]):
    """Rows of sites, each read from its mapping, which may lie in files, when it is asked for."""

    def __init__(self, where: Mapping[Site, Mapping[Site, Tensor]]) -> None:
        self._where = where

    @classmethod
    def of(cls, rows: Mapping[Site, Tensor], sites: Iterable[Site]) -> Rows:
        """Some sites of a mapping."""
        return cls(dict.fromkeys(sites, rows))

    def __getitem__(self, site: Site) -> Tensor:
        return self._where[site][site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
