"""RQ3: which cells a rank sweep has, and the smallest rank that reaches a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
class LeastRank:
    """The smallest rank that reaches a target drop at one site and α.

    Args:
        site: Where.
        solver: Of the maps.
        family: What their rank bounds.
        alpha: The scale.
        width: As what the full rank counts.
        found: Estimate, interval and probability.
    """

    site: Site
    solver: str
    family: str
    alpha: float
    width: int
    found: stats.MinK

    def __str__(self) -> str:
        least, low, high, sure = (
            self._rank(k) for k in (self.found.k, self.found.low, self.found.high, self.found.conservative_k)
        )
        return (
            f"min k for {self.found.target_pct:g} % @ {self.site} (α={self.alpha:g}): {least}, "
            f"interval [{low}, {high}], reached in {100 * self.found.p_reached:.0f} % of resamples, "
            f"conservative k {sure}"
        )

    def _rank(self, k: int | None) -> str:
        return "not reached" if k is None else "full" if k == self.width else str(k)


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


def least_ranks(patches: Sequence[PatchRecord], targets: Sequence[float], *, seed: int) -> list[LeastRank]:
    """The least rank per site and α, where the drop is defined.

    Args:
        patches: Of a sweep.
        targets: Drops in percent: one for all, or one per site in order.
        seed: Of the bootstrap.

    Raises:
        MechdiffError: There are neither one target nor as many as sites.
    """
    curves: dict[tuple[Site, float], list[PatchRecord]] = {}
    for patch in patches:
        curves.setdefault((patch.cell.site, patch.map.alpha), []).append(patch)
    sites = list(dict.fromkeys(site for site, _ in curves))
    if len(targets) not in (1, len(sites)):
        raise MechdiffError(
            f"{len(targets)} targets were given for {len(sites)} sites; give --targets one, or one a site."
        )
    least = []
    for (site, alpha), curve in curves.items():
        if any(patch.drop_pct is None for patch in curve):
            continue
        width = min(curve[0].map.d_in, curve[0].map.d_out)
        found = stats.min_k(
            [patch.cell.rank.k or width for patch in curve],
            curve[0].per_prompt["KL_raw"],
            [patch.per_prompt["KL_mapped"] for patch in curve],
            target_pct=targets[0] if len(targets) == 1 else targets[sites.index(site)],
            bootstrap=stats.Bootstrap(seed=seed, groups=tuple(curve[0].per_prompt.get("group", ()))),
        )
        if found is not None:
            least.append(LeastRank(site, curve[0].cell.solver, curve[0].cell.family, alpha, width, found))
    return least
