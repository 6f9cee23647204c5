"""Turns variant groups into the rows of each chunk, and rows of logits into scores in their places."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import accumulate

import torch
from torch import Tensor

from mechdiff_mlflow.engine.forward import Recording
from mechdiff_mlflow.engine.variants import ScoreResult, VariantGroup, Variants
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.metrics import Divergences
from mechdiff_mlflow.sites import Site


class ScoreBoard:
    """Scores of N prompts: every group owns a range of columns.

    Args:
        groups: The variants to be scored.
        n_prompts: N.
        width: Dimensions of the residual stream.

    Raises:
        MechdiffError: The replacements of a group have the wrong shape.
    """

    def __init__(self, groups: Sequence[VariantGroup], n_prompts: int, width: int) -> None:
        self._groups = groups
        self._ends = list(accumulate(group.count(n_prompts, width) for group in groups))
        self._starts = [0, *self._ends[:-1]] if groups else []
        self._scores = Divergences.zeros(n_prompts, self._ends[-1] if groups else 0)

    def variants(self, recording: Recording) -> tuple[list[Variants], Tensor]:
        """The vectors to run for a chunk, and which of [n, columns] are clean activations and need no run.

        Raises:
            MechdiffError: Replacements have the wrong shape or are not finite.
        """
        variants, same = [], []
        for group, start, end in zip(self._groups, self._starts, self._ends, strict=True):
            values = _values(group, recording, end - start)
            clean = (values == recording.clean[group.site].unsqueeze(1)).all(-1).cpu()  # [n, v]
            if group.always_run:
                clean = torch.zeros_like(clean)
            same.append(clean)
            run = (~clean).any(0).nonzero().flatten().tolist()
            if run:
                values = values[:, run] if len(run) < end - start else values
                variants.append(Variants(group.site, values, [start + i for i in run]))
        return variants, torch.cat(same, 1) if same else torch.zeros(
            len(recording.chunk), 0, dtype=torch.bool
        )

    def add(
        self, recording: Recording, same: Tensor, scored: Iterable[tuple[Tensor, Tensor, Divergences]]
    ) -> None:
        """Put a chunk's scored rows (owner, column, divergences) in their places.

        Raises:
            MechdiffError: The logits of a row were not finite.
        """
        index = recording.chunk.index
        chunk = Divergences.zeros(len(index), self._scores.top1_agrees.shape[1])
        for owner, column, found in scored:
            for field in fields(Divergences):
                values = getattr(found, field.name).cpu().double()
                getattr(chunk, field.name)[owner, column] = values
        exact = Divergences.zeros(1)
        for field in fields(Divergences):
            values = getattr(chunk, field.name)
            values[same] = getattr(exact, field.name)
            self._check_finite(values, index)
            getattr(self._scores, field.name)[index] = values

    def result(self, clean: dict[Site, Tensor], clean_top: Tensor) -> ScoreResult:
        """Everything, group by group."""
        ranges = zip(self._starts, self._ends, strict=True)
        divergences = tuple(self._scores.map(lambda x, s=s, e=e: x[:, s:e]) for s, e in ranges)  # type: ignore[misc]
        return ScoreResult(divergences, clean, clean_top)

    def _check_finite(self, values: Tensor, index: Tensor) -> None:
        finite = torch.isfinite(values)
        if not finite.all():
            row, column = (int(i) for i in (~finite).nonzero()[0])
            group = bisect_right(self._ends, column)
            raise MechdiffError(
                f"Replacement {column - self._starts[group]} at {self._groups[group].site} makes the logits "
                f"of prompt {int(index[row])} NaN or infinite; load the model in bfloat16 or float32, or "
                "look at the map that made the replacement."
            )


def _values(group: VariantGroup, recording: Recording, n_variants: int) -> Tensor:
    clean, index = recording.clean[group.site], recording.chunk.index
    if isinstance(group.replacements, Tensor):
        values = group.replacements[index.to(group.replacements.device)]
    else:
        values = group.replacements(index, clean)
        expected = (len(index), n_variants, clean.shape[-1])
        if tuple(values.shape) != expected:
            raise MechdiffError(
                f"The function that makes the variants at {group.site} returned the shape "
                f"{tuple(values.shape)}, not {expected}; return one vector for each prompt and variant."
            )
    values = values.to(device=clean.device, dtype=clean.dtype)
    finite = torch.isfinite(values).all(-1)
    if not finite.all():
        row, variant = (int(i) for i in (~finite).nonzero()[0])
        raise MechdiffError(
            f"Replacement {variant} of prompt {int(index[row])} at {group.site} is NaN or beyond the range "
            f"of {clean.dtype}; look at the map that made it."
        )
    return values
