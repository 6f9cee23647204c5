"""What is put in place of the model's own activations, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.metrics import Divergences
from mechdiff_mlflow.spec.sites import Site

Replace = Callable[[Tensor, Tensor], Tensor]
"""From prompt indices [n] (on the CPU) and the model's own activations [n, width] there to [n, v, width]."""


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

    def count(self, n_prompts: int, width: int) -> int:
        """The number of variants v.

        Raises:
            MechdiffError: The replacements are not [n_prompts, v, width] with v >= 1.
        """
        if isinstance(self.replacements, Tensor):
            shape = tuple(self.replacements.shape)
            if len(shape) != 3 or shape[0] != n_prompts or shape[1] < 1 or shape[2] != width:
                raise MechdiffError(
                    f"The replacements at {self.site} have the shape {shape}, not (prompts {n_prompts}, "
                    f"variants, width {width}); give one vector for each prompt and variant."
                )
            return shape[1]
        if self.n_variants is None or self.n_variants < 1:
            raise MechdiffError(
                f"The variants at {self.site} are a function and n_variants is {self.n_variants}; say how "
                "many vectors it returns for each prompt."
            )
        return self.n_variants


@dataclass(frozen=True, slots=True)
class Variants:
    """The vectors of one group that are run for one chunk."""

    site: Site
    values: Tensor  # [n, v, width] in the model's dtype, on the site's device
    columns: Sequence[int]  # for each of the v the column of the score that it fills


def moved(span: Tensor, value: Tensor, clean: Tensor) -> Tensor:
    """A span's tokens [..., span, width] with the mean `value` in place of `clean`, [..., 1, width] each.

    One token is replaced; several all move by the same vector. Of all changes that give the span a certain
    mean that is the smallest, and tokens keep their differences.
    """
    if span.shape[-2] == 1:
        return value.to(span.device)
    return span + (value - clean).to(span.device)


@dataclass(frozen=True, slots=True)
class Rows:
    """Logits of patched runs."""

    owner: Tensor  # which prompt of the chunk each row belongs to [r], ascending, on the CPU
    column: Tensor  # which column of the score it fills [r], on the CPU
    logits: Tensor  # [r, vocabulary]


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """What became of N prompts under every variant."""

    divergences: tuple[Divergences, ...]  # one for each group, in order; fields [N, v] in float64 on the CPU
    clean: Mapping[Site, Tensor]  # own activations [N, width] at the groups' sites, on the CPU


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
