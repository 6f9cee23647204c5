"""Asks workers everything that experiments ask, and compares answers to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechdiff_mlflow.experiments.workers import Workers
from mechdiff_mlflow.experiments.workers.tasks import Gradients, HeadPatches, Swap
from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.sites import Hook, Site

SITES = (Site(3, Hook.RESID_POST), Site(2, Hook.ATTN_OUT), Site(0, Hook.RESID_PRE))


def some_map(seed: int, alpha: float = 1.0, width: int = 16) -> AffineMap:
    generator = torch.Generator().manual_seed(seed)
    weight, mean = (torch.randn(*s, generator=generator).double() for s in ((width, width), (width,)))
    return AffineMap(mean, -mean, Weight.from_dense(weight), alpha)


def replacements() -> dict[Site, dict[str, AffineMap]]:
    first = some_map(0)
    return {
        SITES[0]: {"one": first, "the same at 0.3": first.with_alpha(0.3), "another": some_map(1)},
        SITES[1]: {},
        SITES[2]: {"one": some_map(2, 0.7)},
    }


def answers(workers: Workers, split: str = "val", position: Position = Position.DECISION) -> dict[str, Any]:
    """Arrays and tensors by name."""
    prompts = workers.pair.prompts_of(split)
    found: dict[str, Any] = {}
    for role in ("base", "tuned"):
        captured = workers.capture(role, prompts, position, list(SITES))
        found |= {f"{role} {site}": captured[site] for site in SITES}
    for site, rows in workers.score(prompts, position, replacements()).items():
        found |= {f"scored base {site}": rows.base, f"scored tuned {site}": rows.tuned}
        for label, patched in rows.patched.items():
            found |= {f"{site} {label} {name}": value for name, value in vars(patched).items()}
    for task in (
        Swap(prompts, position, "base", SITES),
        Gradients(prompts, position, SITES, seed=3),
        HeadPatches(prompts, position, 2, ((0,), (1,), (0, 1), ())),
    ):
        whole = workers.whole(task)
        found |= {f"{type(task).__name__} {name}": rows for name, rows in whole.items()}
    return found


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        if isinstance(value, Tensor):
            assert other.dtype == value.dtype, name
            assert torch.equal(other, value), name
        else:
            assert other.dtype == value.dtype, name
            assert np.array_equal(other, value), name
