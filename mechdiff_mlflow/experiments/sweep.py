"""RQ3: which cells a rank sweep has, and the smallest rank that reaches a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechdiff_mlflow import stats
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.records import PatchRecord
from mechdiff_mlflow.sites import Site
from mechdiff_mlflow.spec import Alpha, Cell, Rank


@dataclass(frozen=True, slots=True)
class SweepSite:
    """A site of a sweep, with its own α or without: `L26/attn_out:0.3`, `L26/attn_out`."""

    site: Site
    alpha: float | None

    def __str__(self) -> str:
        return str(self.site) if self.alpha is None else f"{self.site}:{self.alpha:g}"

    @classmethod
    def parse(cls, text: str) -> SweepSite:
        """Read `L26/attn_out:0.3` or `L26/attn_out`.

        Raises:
            MechdiffError: The site or α is malformed.
        """
        site, colon, alpha = text.partition(":")
        value = Alpha.parse(alpha) if colon else None
        if value is not None and value.is_choice:
            raise MechdiffError(f"Site {text!r} has several α; write one after the colon, or use --alphas.")
        return cls(Site.parse(site), value.values[0] if value else None)


@dataclass(frozen=True, slots=True)
class MinRank:
    """The smallest rank that reaches a target at one site, α and solver.

    Args:
        label: Site and α.
        target_pct: The drop sought.
        ceiling: The full rank, as which `full` counts.
        result: Estimate, interval and probability.
    """

    label: str
    target_pct: float
    ceiling: int
    result: stats.MinRank


def cells_of(
    sites: Sequence[SweepSite], ranks: Sequence[Rank], alphas: Sequence[float], solver: str, family: str
) -> list[Cell]:
    """Every site × α × rank, once.

    Raises:
        MechdiffError: A cell stands twice.
    """
    cells = [
        Cell(sweep.site, solver, family, rank, Alpha((alpha,)))
        for sweep in sites
        for alpha in ((sweep.alpha,) if sweep.alpha is not None else alphas)
        for rank in ranks
    ]
    if len(set(cells)) < len(cells):
        twice = next(cell for cell in cells if cells.count(cell) > 1)
        raise MechdiffError(f"The sweep has {twice} more than once; list each site, rank and α once.")
    return cells


def min_ranks(patches: Sequence[PatchRecord], targets: Sequence[float], *, seed: int) -> list[MinRank]:
    """The smallest rank per site and α; `targets` are one for all, or one per site in order.

    Raises:
        MechdiffError: There are neither one target nor as many as sites.
    """
    curves: dict[tuple[Site, float], list[PatchRecord]] = {}
    for patch in patches:
        curves.setdefault((patch.cell.site, patch.map.alpha), []).append(patch)
    sites = list(dict.fromkeys(site for site, _ in curves))
    if len(targets) not in (1, len(sites)):
        raise MechdiffError(
            f"{len(targets)} targets for {len(sites)} sites; give one --targets value, or one a site."
        )
    found = []
    for (site, alpha), curve in curves.items():
        if any("drop_pct" in patch.undefined for patch in curve):
            continue
        ceiling = min(curve[0].map.d_in, curve[0].map.d_out)
        by_rank = {patch.cell.rank.k or ceiling: patch.per_prompt["KL_mapped"].to_numpy() for patch in curve}
        ranks = sorted(by_rank)
        target = targets[0] if len(targets) == 1 else targets[sites.index(site)]
        result = stats.min_k(
            curve[0].per_prompt["KL_raw"].to_numpy(),
            np.stack([by_rank[k] for k in ranks]),
            ranks,
            target_pct=target,
            seed=seed,
        )
        found.append(MinRank(f"{site} α={alpha:g}", target, ceiling, result))
    return found
