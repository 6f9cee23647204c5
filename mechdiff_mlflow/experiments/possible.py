"""Checks, before any weights are loaded, that a pair can give what is asked of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.fitting import wrong_layer_site
from mechdiff_mlflow.experiments.protocol import Protocol
from mechdiff_mlflow.experiments.study import Study
from mechdiff_mlflow.maps.affine import AffineMap, Family
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.solvers import OffSpan, check_possible
from mechdiff_mlflow.spec.pair_spec import Cell
from mechdiff_mlflow.spec.sites import Site


def check_pair(protocol: Protocol, pair: Pair) -> None:
    """Make sure that there are as many prompts as asked for, and that both sides can read them.

    Raises:
        MechdiffError: There are not, or they cannot; or what is planted does not fit the model.
    """
    study = Study(pair, protocol)
    if study.report_prompts.n_groups < 2:
        raise MechdiffError(
            f"{len(study.report_prompts)} {protocol.split} prompts, {study.report_prompts.n_groups} of them "
            "independent, give no interval; pass a larger --n, or add prompts of another group to the file."
        )
    for prompts in study.prompt_sets:
        pair.check_same_tokens(prompts, protocol.position)
    plant, widths = pair.spec.tuned.plant, _widths(pair)
    if plant is not None:
        check_sites([plant.site], pair)
        if widths is not None:
            plant.check_width(widths[0])


def check_sites(sites: Iterable[Site], pair: Pair) -> None:
    """Make sure that both models have some sites.

    Raises:
        MechdiffError: A layer or a hook does not exist.
    """
    outlines = pair.outlines()
    for site in dict.fromkeys(sites):
        if site.layer >= pair.n_layers:
            n = pair.n_layers
            raise MechdiffError(f"Layer {site.layer} does not exist: the model has {n} layers, 0 to {n - 1}.")
        for outline in outlines:
            outline.check(site)


def check_cells(cells: Sequence[Cell], protocol: Protocol, pair: Pair) -> None:
    """Make sure that maps can be fitted: sites, solvers, families, ranks and scales.

    Raises:
        MechdiffError: One cannot, or two ranks of a site are the same there.
    """
    check_pair(protocol, pair)
    sites = dict.fromkeys(cell.site for cell in cells)
    check_sites([*sites, *(wrong_layer_site(site, pair) for site in sites)], pair)
    n_train, widths = len(Study(pair, protocol).train_prompts), _widths(pair)
    if n_train < 2:
        raise MechdiffError(f"{n_train} train prompt is too little to fit on; give --n-train 2 or more.")
    if protocol.alpha_fit == "inside" and any(0 in cell.alpha.values for cell in cells):
        raise MechdiffError("α=0 cannot be taken inside a fit; pass α above 0, or --alpha-fit after.")
    if widths is None:  # the configuration does not say
        return
    for solver, family, rank in dict.fromkeys((c.solver, c.family, c.rank) for c in cells):
        check_possible(solver, family, *widths, rank.k)
        natural = OffSpan.natural(Family.parse(family))
        if protocol.off_span not in (None, natural) and rank.k is not None and n_train <= widths[0]:
            raise MechdiffError(
                f"{n_train} train prompts do not span {widths[0]} dimensions, and a rank-{rank} map of the "
                f"{family} family cannot treat the others as {protocol.off_span}; use {natural}, or the full "
                "map."
            )
        if solver == "logit_subspace" and protocol.directions > widths[1]:
            raise MechdiffError(
                f"{protocol.directions} output directions are more than the {widths[1]} dimensions that the "
                "tuned model has; lower --directions."
            )
    full = {(c.site, c.solver, c.family, c.alpha) for c in cells if c.rank.k is None}
    for cell in cells:
        if cell.rank.k == min(widths) and (cell.site, cell.solver, cell.family, cell.alpha) in full:
            raise MechdiffError(
                f"Rank {cell.rank} and full are the same at {cell.site}, whose width is {min(widths)}; leave "
                "one of them out."
            )


def check_map(map_: AffineMap, name: str, site: Site, pair: Pair, *, allow_pair_mismatch: bool) -> None:
    """Make sure that the map that the user calls `name` fits its site of a pair, and was fitted on the pair.

    Raises:
        MechdiffError: It does not; or it was not, and `allow_pair_mismatch` is false.
    """
    check_sites([site], pair)
    widths = _widths(pair)
    if widths is not None and (map_.d_in, map_.d_out) != widths:
        raise MechdiffError(
            f"Map {name} takes {map_.d_in} to {map_.d_out} dimensions and {site} of this pair needs "
            f"{widths[0]} to {widths[1]}; use a map that was fitted on this pair."
        )
    theirs = map_.meta.get("fingerprint", "unknown")
    if theirs != pair.fingerprint and not allow_pair_mismatch:
        raise MechdiffError(
            f"Map {name} was fitted on pair {theirs} and this is {pair.fingerprint} (other weights, "
            "tokenizer, template, dtype or prompts, or an earlier mechdiff); name its own pair, fit again, "
            "or --allow-pair-mismatch."
        )


def _widths(pair: Pair) -> tuple[int, int] | None:
    """The widths of base and tuned, as their configurations say."""
    outlines = pair.outlines()
    return (outlines[0].width, outlines[1].width) if len(outlines) == 2 else None
