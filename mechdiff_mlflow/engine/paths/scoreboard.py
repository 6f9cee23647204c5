"""Turns variant groups into the rows of each chunk, and rows of logits into scores in their places."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import accumulate
from operator import itemgetter

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.forward import Recording
from mechdiff_mlflow.engine.paths.variants import ScoreResult, VariantGroup, Variants
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.metrics import Divergences
from mechdiff_mlflow.spec.sites import Site


class ScoreBoard:
    """Scores of N prompts under all variants: every group owns a range of columns.

    Raises:
        MechdiffError: The replacements of a group have the wrong shape.
    """

    def __init__(self, groups: Sequence[VariantGroup], n_prompts: int, width: int) -> None:
        self._groups = groups
        self._ends = list(accumulate(group.count(n_prompts, width) for group in groups))
        self._starts = [0, *self._ends[:-1]] if groups else []
        self._scores = Divergences.zeros(n_prompts, self._ends[-1] if groups else 0)

    @property
    def n_columns(self) -> int:
        """Patched runs of each prompt."""
        return self._ends[-1] if self._ends else 0

    def variants(self, recording: Recording) -> tuple[list[Variants], Tensor]:
        """The vectors to run for a chunk, and which of [n, columns] are clean activations and need no run.

        Raises:
            MechdiffError: The recording is not finite, or replacements have the wrong shape or are not.
        """
        index = recording.chunk.index
        values = [self._values(group, recording) for group in self._groups]
        clean = [recording.clean[group.site].unsqueeze(1) for group in self._groups]
        device = recording.logits.device
        finite = [torch.isfinite(x).all(-1).to(device) for x in values]
        same = [(x == y).all(-1).to(device) for x, y in zip(values, clean, strict=True)]
        recorded = recording.finite()
        # Asked once: every answer of a GPU is waited for.
        answers = torch.cat([recorded, *finite, *same], 1).cpu()
        n = self.n_columns
        recorded, finite_values, same_as_clean = torch.split(answers, [recorded.shape[1], n, n], 1)
        recording.check_finite(recorded)
        if not finite_values.all():
            row, column = (int(i) for i in (~finite_values).nonzero()[0])
            name, site = self._name(column)
            raise MechdiffError(
                f"{name} of prompt {int(index[row])} at {site} is NaN or beyond the range of "
                f"{recording.clean[site].dtype}; look at the map that made it."
            )
        variants = []
        for group, x, start, end in zip(self._groups, values, self._starts, self._ends, strict=True):
            if group.always_run:
                same_as_clean[:, start:end] = False
            run = (~same_as_clean[:, start:end]).any(0).nonzero().flatten().tolist()
            if run:
                x = x[:, run] if len(run) < end - start else x
                variants.append(Variants(group.site, x, [start + i for i in run]))
        return variants, same_as_clean

    def add(
        self, recording: Recording, same: Tensor, scored: Sequence[tuple[Tensor, Tensor, Divergences]]
    ) -> None:
        """Put a chunk's scored rows (owner, column, divergences) in their places.

        Raises:
            MechdiffError: The logits of a row were not finite.
        """
        index = recording.chunk.index
        chunk = Divergences.zeros(len(index), self._scores.top1_agrees.shape[1])
        exact = Divergences.zeros(1)
        for field in fields(Divergences):
            values = getattr(chunk, field.name)
            for owner, column, found in scored:
                values[owner, column] = getattr(found, field.name).cpu().double()
            values[same] = getattr(exact, field.name)
            self._check_finite(values, index)
            getattr(self._scores, field.name)[index] = values

    def result(self, clean: Mapping[Site, Tensor]) -> ScoreResult:
        """Everything, group by group."""
        ranges = zip(self._starts, self._ends, strict=True)
        divergences = tuple(self._scores.map(itemgetter((slice(None), slice(*ends)))) for ends in ranges)
        return ScoreResult(divergences, clean)

    def _check_finite(self, values: Tensor, index: Tensor) -> None:
        finite = torch.isfinite(values)
        if not finite.all():
            row, column = (int(i) for i in (~finite).nonzero()[0])
            name, site = self._name(column)
            raise MechdiffError(
                f"{name} at {site} makes the logits of prompt {int(index[row])} NaN or infinite; load the "
                "model in bfloat16 or float32, or look at the map that made the replacement."
            )

    def _name(self, column: int) -> tuple[str, Site]:
        group = bisect_right(self._ends, column)
        return f"Replacement {column - self._starts[group]}", self._groups[group].site

    def _values(self, group: VariantGroup, recording: Recording) -> Tensor:
        clean, index = recording.clean[group.site], recording.chunk.index
        if isinstance(group.replacements, Tensor):
            values = group.replacements[index.to(group.replacements.device)]
        else:
            values = group.replacements(index, clean)
            expected = (len(index), group.n_variants, clean.shape[-1])
            if tuple(values.shape) != expected:
                raise MechdiffError(
                    f"The function that makes the variants at {group.site} returned the shape "
                    f"{tuple(values.shape)}, not {expected}; return one vector for each prompt and variant."
                )
        return values.to(device=clean.device, dtype=clean.dtype)
