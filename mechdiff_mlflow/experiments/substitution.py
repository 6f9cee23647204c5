"""The base model's attention heads in place of the tuned model's, before the output projection."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

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

HeadOutputs = tuple[Tensor, Tensor]
"""What each head of base and of tuned gives, [n, heads, width]."""

_OUTPUTS: WeakKeyDictionary[Pair, dict[tuple[int, str, Position], HeadOutputs]] = WeakKeyDictionary()
"""Those of one layer: a greedy search asks for the same prompts again and again."""


def head_patches(
    pair: Pair, layer: int, prompts: PromptSet, position: Position, sets: Sequence[Heads]
) -> Tensor:
    """KL(patched ‖ clean) in nats of every set of heads, [n, sets]; no heads give the noise floor.

    Raises:
        MechdiffError: The heads of the two models cannot be told apart or differ in number or width.
    """
    site = Site(layer, Hook.ATTN_OUT)
    base, tuned = _head_outputs(pair, layer, prompts, position)
    chosen = torch.zeros(len(sets), tuned.shape[1], 1, dtype=torch.bool)
    for row, heads in enumerate(sets):
        chosen[row, list(heads)] = True
    with patchable(pair, "tuned", prompts, position, [site]) as (engine, recorded):
        projection = engine.heads(layer)

        def replaced(index: Tensor, clean: Tensor) -> Tensor:
            mixed = torch.where(chosen, base[index].unsqueeze(1), tuned[index].unsqueeze(1))
            return projection.project(mixed).to(clean.device)

        (found,) = engine.score(recorded, [VariantGroup(site, replaced, n_variants=len(sets))]).divergences
    return found.kl_patched_clean


def _head_outputs(pair: Pair, layer: int, prompts: PromptSet, position: Position) -> HeadOutputs:
    known = _OUTPUTS.setdefault(pair, {})
    key = (layer, prompts.digest, position)
    if key not in known:
        if any(other != layer for other, *_ in known):
            known.clear()
        base, tuned = (_captured_heads(pair, role, layer, prompts, position) for role in ("base", "tuned"))
        if base.shape != tuned.shape:
            raise MechdiffError(
                f"Base and tuned have heads of {list(base.shape[1:])} and {list(tuned.shape[1:])} (number, "
                f"width) in layer {layer}; heads can be substituted only where they correspond."
            )
        known[key] = base, tuned
    return known[key]


def _captured_heads(pair: Pair, role: str, layer: int, prompts: PromptSet, position: Position) -> Tensor:
    with (pair.base if role == "base" else pair.tuned).engine() as engine:
        return engine.heads(layer).capture(pair.tokens(role, prompts, position))
