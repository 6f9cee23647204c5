"""What is put in place of the model's own activations, the rows to run for each chunk, and their scores."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from operator import itemgetter

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.chunks import Chunk
from mechdiff_mlflow.engine.model.forward import Recording
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.metrics import Divergences
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

Replace = Callable[[Tensor, Tensor], Tensor]
"""From prompt indices [n] (on the CPU) and the model's own activations [n, width] there to [n, v, width].

Where each token of a span is replaced, the vectors of its tokens lie one after another in place of `width`,
here and below; what is beyond the end of a prompt's span is cut off.
"""


@dataclass(frozen=True, slots=True)
class VariantGroup:
    """v replacement vectors at one site for each of N prompts."""

    site: Site
    # [N, v, width] of any floating dtype and device, cast to the model's when applied; or a function called
    # for one chunk at a time, so that N prompts of v variants are never in memory together
    replacements: Tensor | Replace
    n_variants: int | None = None  # v; needed for a function only
    always_run: bool = False  # also what equals the model's own activation, which else gets an exact 0

    @classmethod
    def identity(cls, site: Site) -> VariantGroup:
        """The identity patch: the model's own activation put back and run. Its KL is the noise floor."""
        return cls(site, lambda index, clean: clean.unsqueeze(1), n_variants=1, always_run=True)

    def count(self) -> int:
        """The number of variants v."""
        if isinstance(self.replacements, Tensor):
            return self.replacements.shape[1]
        assert self.n_variants is not None
        return self.n_variants


@dataclass(frozen=True, slots=True)
class Variants:
    """The vectors of one group that are run for one chunk."""

    site: Site
    values: Tensor  # [n, v, width] in the model's dtype, on the site's device
    columns: Sequence[int]  # for each of the v the column of the score that it fills


def moved(span: Tensor, value: Tensor, clean: Tensor) -> Tensor:
    """A span's tokens [..., span, width] with the mean `value` in place of `clean`, [..., width] each.

    A vector for each token, [..., span * width], replaces it; a mean moves all by the same vector. Of all
    changes that give the span a certain mean that is the smallest, and tokens keep their differences.
    """
    if value.shape[-1] == span.shape[-2] * span.shape[-1]:
        return value.to(span.device).reshape(*value.shape[:-1], *span.shape[-2:])
    return span + (value - clean).to(span.device).unsqueeze(-2)


@dataclass(frozen=True, slots=True)
class Rows:
    """Logits of patched runs."""

    owner: Tensor  # which row of the chunk's clean logits each belongs to [r], ascending, on the CPU
    column: Tensor  # which column of the score it fills [r], on the CPU
    logits: Tensor  # [r, vocabulary]


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """What became of N prompts under every variant."""

    # One for each group, in order; fields [N, v] in float64 on the CPU; with answers of up to T tokens
    # [N, v, T], NaN after the end of each.
    divergences: tuple[Divergences, ...]
    clean: Mapping[Site, Tensor]  # own activations [N, width] at the groups' sites


def in_parts(
    n_prompts: int, variants: Sequence[Variants], at_once: int
) -> Iterator[tuple[slice, list[Variants]]]:
    """Prompts and variants that are run together: `at_once` pairs of them, and at least one."""
    at_once = max(1, at_once)
    parts: list[list[Variants]] = [[]]
    room = at_once
    for group in sorted(variants, key=lambda group: group.site):  # so that those entering late stay together
        start = 0
        while start < len(group.columns):
            if room == 0:
                parts.append([])
                room = at_once
            some = slice(start, start + room)
            parts[-1].append(Variants(group.site, group.values[:, some], group.columns[some]))
            start += len(parts[-1][-1].columns)
            room -= len(parts[-1][-1].columns)
    for part in filter(None, parts):
        step = max(1, at_once // sum(len(group.columns) for group in part))
        for start in range(0, n_prompts, step):
            yield slice(start, min(start + step, n_prompts)), part


class ScoreBoard:
    """Scores of N prompts under all variants: every group owns a range of columns."""

    def __init__(self, groups: Sequence[VariantGroup], prompts: TokenizedPrompts) -> None:
        self._groups = groups
        self._ends = list(accumulate(group.count() for group in groups))
        self._starts = [0, *self._ends[:-1]] if groups else []
        shape = (len(prompts), max(prompts.steps, default=1), self.n_columns)
        empty = (torch.full(shape, torch.nan, dtype=torch.float64) for _ in fields(Divergences))
        self._scores = Divergences(*empty)  # [N, T, columns]

    @property
    def n_columns(self) -> int:
        """Patched runs of each prompt."""
        return self._ends[-1] if self._ends else 0

    def variants(self, recording: Recording) -> tuple[list[Variants], Tensor]:
        """The vectors to run for a chunk, and which of [n, columns] are clean activations and need no run.

        Refuses a recording or replacements that are not finite.
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
            prompt, name, site = self._first(~finite_values, index)
            raise MechdiffError(
                f"{name} of prompt {prompt} at {site} is NaN or beyond the range of "
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
        self,
        chunk: Chunk,
        same: Tensor,
        unchanged: Divergences,
        scored: Sequence[tuple[Tensor, Tensor, Divergences]],
    ) -> None:
        """Put a chunk's scored rows (owner, column, divergences), which must be finite, in their places.

        What is the `same` as the clean run, [n, columns], is `unchanged`.
        """
        index, steps = chunk.index, chunk.steps
        same = same.repeat_interleave(steps, 0)
        for field in fields(Divergences):
            exact = getattr(unchanged, field.name)[:, None].expand(same.shape)
            values = exact.clone()
            for owner, column, found in scored:
                values[owner, column] = getattr(found, field.name).cpu().double()
            values[same] = exact[same]
            finite = torch.isfinite(values)
            if not finite.all():
                prompt, name, site = self._first(~finite, index.repeat_interleave(steps))
                raise MechdiffError(
                    f"{name} at {site} makes the logits of prompt {prompt} NaN or infinite; load the "
                    "model in bfloat16 or float32, or look at the map that made the replacement."
                )
            getattr(self._scores, field.name)[index, :steps] = values.view(len(index), steps, -1)

    def result(self, clean: Mapping[Site, Tensor]) -> ScoreResult:
        """Everything, group by group."""
        scores = self._scores.map(lambda x: x[:, 0] if x.shape[1] == 1 else x.transpose(1, 2))
        ranges = zip(self._starts, self._ends, strict=True)
        divergences = tuple(scores.map(itemgetter((slice(None), slice(*ends)))) for ends in ranges)
        return ScoreResult(divergences, clean)

    def _first(self, where: Tensor, index: Tensor) -> tuple[int, str, Site]:
        """Prompt, name and site of the first replacement at which `where` [n, columns] is true."""
        row, column = (int(i) for i in where.nonzero()[0])
        group = bisect_right(self._ends, column)
        return int(index[row]), f"Replacement {column - self._starts[group]}", self._groups[group].site

    def _values(self, group: VariantGroup, recording: Recording) -> Tensor:
        clean, index = recording.clean[group.site], recording.chunk.index
        if isinstance(group.replacements, Tensor):
            values = group.replacements[index.to(group.replacements.device)]
        else:
            values = group.replacements(index, clean)
        return values[..., : clean.shape[-1]].to(device=clean.device, dtype=clean.dtype)
