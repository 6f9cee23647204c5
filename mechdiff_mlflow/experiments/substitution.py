"""The base model's attention heads in place of the tuned model's, before the output projection."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from mechdiff_mlflow.engine import VariantGroup
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.rows import patchable
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Hook, Site

Heads = tuple[int, ...]

_KEPT: weakref.WeakKeyDictionary[Pair, dict[tuple[int, str, Position], Substitution]]


class Substitution:
    """Base's z in place of the tuned model's, for any set of heads of a layer, on some prompts.

    Args:
        pair: The models.
        layer: Whose attention.
        prompts: n prompts.
        position: Which token.

    Raises:
        MechdiffError: The heads of the two models cannot be told apart or differ in number or width.
    """

    def __init__(self, pair: Pair, layer: int, prompts: PromptSet, position: Position) -> None:
        self._site = Site(layer, Hook.ATTN_OUT)
        self._prompts, self._position = prompts, position
        z = {}
        for role, side in (("base", pair.base), ("tuned", pair.tuned)):
            with side.engine() as engine:
                z[role] = engine.heads(layer).capture(pair.tokens(role, prompts, position))
        self._base, self._tuned = z["base"], z["tuned"]
        if self._base.shape != self._tuned.shape:
            shapes = [list(x.shape[1:]) for x in (self._base, self._tuned)]
            raise MechdiffError(
                f"Base and tuned have heads of {shapes[0]} and {shapes[1]} (number, width) in layer {layer}; "
                "heads can be substituted only where they correspond."
            )
        self.n_heads = self._tuned.shape[1]

    @classmethod
    def of(cls, pair: Pair, layer: int, prompts: PromptSet, position: Position) -> Substitution:
        """That of the pair, made once: a greedy search asks for the same prompts again and again."""
        kept = _KEPT.setdefault(pair, {})
        key = (layer, prompts.digest, position)
        if key not in kept:
            if any(known != layer for known, *_ in kept):
                kept.clear()
            kept[key] = cls(pair, layer, prompts, position)
        return kept[key]

    def score(self, pair: Pair, sets: Sequence[Heads]) -> Tensor:
        """KL(patched ‖ clean) in nats of every set of heads, [n, sets]; none gives the noise floor."""
        chosen = torch.zeros(len(sets), self.n_heads, 1, dtype=torch.bool)
        for row, heads in enumerate(sets):
            chosen[row, list(heads)] = True
        # Asked for many times: the tuned model's own run is kept.
        with patchable(pair, "tuned", self._prompts, self._position) as (engine, recorded):
            projection = engine.heads(self._site.layer)

            def replaced(index: Tensor, clean: Tensor) -> Tensor:
                base, tuned = self._base[index].unsqueeze(1), self._tuned[index].unsqueeze(1)
                return projection.project(torch.where(chosen, base, tuned)).to(clean.device)

            group = VariantGroup(self._site, replaced, n_variants=len(sets))
            (found,) = engine.score(recorded([self._site]), [group]).divergences
        return found.kl_patched_clean


_KEPT = weakref.WeakKeyDictionary()
