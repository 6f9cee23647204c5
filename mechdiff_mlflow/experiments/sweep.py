"""Rank sweeps: which cells they have, and the smallest rank that reaches a target drop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.records import PatchRecord
from mechdiff_mlflow.measures import stats
from mechdiff_mlflow.measures.bootstrap import Bootstrap
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, Rank
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.text import number_in, text_of

MAX_CELLS = 100_000
"""Each has a run of its own."""


@dataclass(frozen=True, slots=True)
class SweepSite:
    """A site of a sweep, with its own α or without: `L26/attn_out:0.3`, `L26/attn_out`."""

    site: Site
    alpha: float | None

    def __str__(self) -> str:
        return str(self.site) if self.alpha is None else f"{self.site}:{text_of(self.alpha)}"

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
class Targets:
    """Drops in percent whose smallest rank is sought: `30`, `30,12`, `L26/attn_out:30,12` or `auto`."""

    by_site: tuple[tuple[Site, float], ...]
    others: tuple[float, ...]  # one for all other sites, or one for each in order

    def __str__(self) -> str:
        if self == AUTO:
            return "auto"
        return ",".join([*(f"{site}:{text_of(x)}" for site, x in self.by_site), *map(text_of, self.others)])

    @classmethod
    def parse(cls, text: str) -> Targets:
        """Read targets, each a percentage or a site, a colon and a percentage; or `auto`.

        Raises:
            MechdiffError: One is malformed, or a site has two.
        """
        if text == "auto":
            return AUTO
        by_site: dict[Site, float] = {}
        others = []
        for part in text.split(","):
            where, colon, percent = part.strip().rpartition(":")
            try:
                target = number_in(percent)
            except ValueError:
                target = math.nan
            if not 0 < target <= 100:
                raise MechdiffError(
                    f"Target {part[:80]!r} is not a drop in percent above 0 and up to 100; pass e.g. 30, or "
                    "L26/attn_out:30."
                )
            if not colon:
                others.append(target)
            elif (site := Site.parse(where)) in by_site:
                raise MechdiffError(f"Site {site} has two targets; give it one.")
            else:
                by_site[site] = target
        return cls(tuple(by_site.items()), tuple(others))

    def at(self, sites: Sequence[Site]) -> tuple[float, ...]:
        """The target of each site.

        Raises:
            MechdiffError: Targets and sites do not go together.
        """
        if self == AUTO:
            original = set(sites) == set(_ORIGINAL_TARGETS)
            return tuple(_ORIGINAL_TARGETS[site] if original else 30.0 for site in sites)
        known = dict(self.by_site)
        rest = [site for site in sites if site not in known]
        if absent := [str(site) for site in known if site not in sites]:
            raise MechdiffError(
                f"--targets names {', '.join(absent)}, which the sweep does not visit; its sites are "
                f"{', '.join(map(str, sites))}."
            )
        if len(self.others) not in ({1, len(rest)} if rest else {0, 1}):
            raise MechdiffError(
                f"{len(self.others)} targets were given for {len(rest)} sites; give --targets one for all, "
                "one a site in order, or by site, e.g. L26/attn_out:30."
            )
        each = dict(zip(rest, self.others if len(self.others) > 1 else self.others * len(rest), strict=True))
        return tuple((known | each)[site] for site in sites)


AUTO = Targets((), ())
"""The original experiment's targets at its two sites, and 30 % at any others."""

_ORIGINAL_TARGETS = {Site(26, Hook.ATTN_OUT): 30.0, Site(24, Hook.RESID_POST): 12.0}


@dataclass(frozen=True, slots=True)
class LeastRank:
    """The smallest rank that reaches a target drop at one site and α."""

    site: Site
    solver: str
    family: str
    alpha: float
    width: int  # as what the full rank counts
    found: stats.MinK

    def __str__(self) -> str:
        found = self.found
        return (
            f"min k for {text_of(found.target_pct)} % @ {self.site} (α={text_of(self.alpha)}): "
            f"{rank_text(found.k, self.width)}, interval [{rank_text(found.low, self.width)}, "
            f"{rank_text(found.high, self.width)}], reached in {100 * found.p_reached:.0f} % of resamples, "
            f"conservative k {rank_text(found.conservative_k, self.width)}"
        )


def rank_text(k: float | None, width: int) -> str:
    """A least rank as users write it."""
    return "not reached" if k is None or math.isnan(k) else "full" if k == width else str(int(k))


def cells_of(
    sites: Sequence[SweepSite], ranks: Sequence[Rank], alphas: Sequence[float], solver: str, family: str
) -> list[Cell]:
    """Every site × α × rank; a MechdiffError where a cell stands twice."""
    cells = [
        Cell(sweep.site, solver, family, rank, Alpha((alpha,)))
        for sweep in sites
        for alpha in ((sweep.alpha,) if sweep.alpha is not None else alphas)
        for rank in ranks
    ]
    if len(set(cells)) < len(cells):
        twice = next(cell for cell, n in Counter(cells).items() if n > 1)
        raise MechdiffError(f"The sweep has {twice} more than once; list each site, rank and α once.")
    if len(cells) > MAX_CELLS:
        raise MechdiffError(
            f"The sweep has {len(cells)} cells and takes {MAX_CELLS}; list fewer sites, ranks or α."
        )
    return cells


def least_ranks(patches: Sequence[PatchRecord], targets: Sequence[float], *, seed: int) -> list[LeastRank]:
    """The least rank of each site and α of a sweep at which every drop is defined.

    `targets` are drops in percent, one for all or one per site in order; `seed` is the bootstrap's.
    """
    curves: dict[tuple[Site, float], list[PatchRecord]] = {}
    for patch in patches:
        curves.setdefault((patch.cell.site, patch.map.alpha), []).append(patch)
    sites = list(dict.fromkeys(site for site, _ in curves))
    assert len(targets) in (1, len(sites)), "Targets.at gives one a site"
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
            bootstrap=Bootstrap(seed=seed, groups=tuple(curve[0].per_prompt.get("group", ()))),
        )
        if found is not None:
            least.append(LeastRank(site, curve[0].cell.solver, curve[0].cell.family, alpha, width, found))
    return least
