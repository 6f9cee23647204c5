"""Commands that load a pair and measure: run, fit, patch, sweep."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.cli.session import AS_MANY, session
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import PatchRecord, Protocol, Study
from mechdiff_mlflow.experiments.possible import check_cells, check_map, check_pair
from mechdiff_mlflow.experiments.sweep import SweepSite, Targets, cells_of, least_ranks
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.report.curves import curve_figures
from mechdiff_mlflow.report.evidence import of_record
from mechdiff_mlflow.report.figures import write_figures
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Position, Rank
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.tracking.content import fields
from mechdiff_mlflow.tracking.content.names import check_alias
from mechdiff_mlflow.tracking.content.parents import report_pass_run
from mechdiff_mlflow.tracking.flavour import maps_of_run
from mechdiff_mlflow.tracking.registry.fetch import load_map
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.registry.promotion import PromotionRefused, promote
from mechdiff_mlflow.tracking.registry.registry import winners_of
from mechdiff_mlflow.tracking.store.store import open_store

SEED_N = 500
"""Prompts that the seed experiment reports on."""

_pair_mismatch = click.option(
    "--allow-pair-mismatch",
    is_flag=True,
    help="Patch a pair that the map was not fitted on, or that an imported map does not name; recorded.",
)


@click.command("run")
@options.pair
@options.site
@options.solver
@options.rank_and_alpha
@options.position
@options.reported
@options.n_train
@options.permutations
@options.seed
@options.models
@options.engine
@options.promotion
@options.force
@options.tracking
def run_command(**given: Any) -> None:
    """Fit a map at one site, patch with it, and report: the main job.

    One parent run with a fit and a patch run under it.

    \b
    Example:
      mechdiff run --layer 26 --hook attn_out --k 8 --alpha 0.3 --promote
    """
    cell = _cell(given)
    alias = None if given["promote"] == "none" else check_alias(given["promote"])  # not after the work
    if alias and given["split"] == "val" and len(cell.alpha.values) > 1 and not given["force"]:
        raise MechdiffError(
            "α would be chosen on the val prompts that are reported, and such a map may not be promoted; "
            "report test, give one --alpha, or add --force."
        )
    promotes = [cell.site.slug] if alias else []
    told: list[str] = []
    refused = None
    with session("run", str(cell), given, partial(check_cells, [cell]), promotes=promotes) as now:
        (fit,) = now.study.fit([cell])
        fit_id = now.run.log(fields.fit_run(fit, now.study))
        (patch,) = now.study.patch([fit.to_patch])
        patch_id = now.run.log(fields.patch_run(patch, now.study, map_run=fit_id))
        now.run.add(fields.headline(patch))
        _demand_signal([patch])
        fetch = f"Keep:  {show.command('promote', fit_id)}"
        if alias:
            try:
                version = promote(
                    now.store,
                    patch_id,
                    alias=alias,
                    policy=PromotionPolicy(force=given["force"]),
                    say=told.append,
                    here=now.run,
                    read=fit.map,
                )
                fetch = f"Fetch: {show.command('fetch', f'{version.name}@{alias}', '-o', 'map.pt')}"
            except PromotionRefused as refusal:  # what was measured stays, and the run is a good one
                refused = refusal
    show.patches([patch], now.study)
    show.lines(told)
    show.where_to_look(now.store, now.run.experiment_id, fetch)
    if refused is not None:
        raise refused


@click.command("fit")
@options.pair
@options.site
@options.solver
@options.rank_and_alpha
@options.position
@options.n_train
@options.seed
@options.models
@options.engine
@options.tracking
def fit_command(**given: Any) -> None:
    """Fit a map at one site; val chooses what is left open.

    \b
    Example:
      mechdiff fit --layer 24 --hook resid_post --solver reduced_rank --k 8 --alpha 0.7
    """
    cell = _cell(given)
    with session("fit", f"fit {cell}", given, partial(check_cells, [cell])) as now:
        (fit,) = now.study.fit([cell])
        fit_id = now.place(fields.fit_run(fit, now.study))
    patch = show.command("patch", "--map", f"runs:/{fit_id}", "--pair", given["pair"])
    show.fits([fit], now.study)
    show.where_to_look(now.store, now.run.experiment_id, f"Patch: {patch}")


@click.command("patch")
@click.option("--map", "map", required=True, help="models:/NAME@ALIAS, NAME@ALIAS, runs:/RUN or a file.")
@options.pair
@click.option(
    "--alpha",
    type=options.Text("alpha", options.one_alpha, none="map"),
    default="map",
    show_default=True,
    help="Scale instead of the map's own; replaces it, does not multiply it.",
)
@options.reported
@options.n_train
@options.seed
@options.models
@options.engine
@options.tracking
@_pair_mismatch
def patch_command(**given: Any) -> None:
    """Patch with a map that exists, and report.

    \b
    Example:
      mechdiff patch --map cultural-demo-L26-attn_out@champion --alpha 0.3
    """
    store = open_store(given["tracking_uri"])
    map_ = load_map(given["map"], store=store)
    run_id = given["map"].removeprefix("runs:/")
    fit_id = run_id if re.fullmatch("[0-9a-f]{32}", run_id) and maps_of_run(store, run_id) else None
    map_ = map_ if given["alpha"] is None else map_.with_alpha(given["alpha"])
    cell = _cell_of(map_, given["map"])

    def check(protocol: Protocol, pair: Pair) -> None:
        check_pair(protocol, pair)
        _check_map(map_, given["map"], pair, given["allow_pair_mismatch"])

    given["position"] = Position.parse(str(map_.meta["position"]))
    with session("patch", f"patch {given['map']}"[:200], given, check) as now:
        now.run.pin("mechdiff.map_sha256", map_.sha256(), f"map {given['map']}")
        (patch,) = now.study.patch([(cell, map_)])
        now.place(fields.patch_run(patch, now.study, map_run=fit_id, map_name=given["map"]))
        _demand_signal([patch])
    show.patches([patch], now.study)
    show.where_to_look(now.store, now.run.experiment_id)


@click.command("sweep")
@options.pair
@click.option(
    "--sites",
    type=options.Text("sites", options.listed(SweepSite.parse)),
    default="L26/attn_out:0.3,L24/resid_post:0.7",
    show_default=True,
    help="Sites, each with its alpha after a colon; without one it takes every one of --alphas.",
)
@click.option(
    "--ranks",
    type=options.Text("ranks", options.listed(Rank.parse)),
    default="1,8,32,full",
    show_default=True,
    help="Ranks k.",
)
@click.option(
    "--alphas",
    type=options.Text("alphas", options.listed(options.one_alpha)),
    default="1",
    show_default=True,
    help="Scales for sites without one.",
)
@click.option(
    "--targets",
    type=options.Text("targets", Targets.parse),
    default="auto",
    show_default=True,
    help="Drop in percent whose smallest rank is sought: 30 for all sites, 30,12 one a site in order, or by "
    "site, L26/attn_out:30,L24/resid_post:12; auto: those for the default sites, 30 for others.",
)
@options.solver
@options.position
@options.reported
@options.n_train
@options.permutations
@options.seed
@options.models
@options.engine
@options.tracking
def sweep_command(**given: Any) -> None:
    """Sweep ranks (and scales) over sites: drop%(k) and the smallest rank that reaches a target (RQ3).

    \b
    Example:
      mechdiff sweep --sites L26/attn_out:0.3 --ranks 1,8,32,full --targets 30
    """
    cells = cells_of(given["sites"], given["ranks"], given["alphas"], given["solver"], given["family"])
    targets = given["targets"].at(list(dict.fromkeys(cell.site for cell in cells)))
    with session("sweep", f"sweep of {len(cells)} cells", given, partial(check_cells, cells)) as now:
        fits = now.study.fit(cells)
        # Maps, then numbers, are stored while the next are computed.
        now.run.begin_soon(fields.planned_cell(fit, now.study) for fit in fits)
        patches = now.study.patch(
            [fit.to_patch for fit in fits],
            lambda i, patch: now.run.log_soon(lambda: fields.cell_run(fits[i], patch, now.study)),
        )
        with now.study.stage("logging runs", len(fits)) as advance:
            now.run.wait(advance)
        found = least_ranks(patches, targets, seed=given["seed"])
        with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
            figures = curve_figures([of_record(patch) for patch in patches])
            files = write_figures(figures, f"Sweep of {now.study.pair.name}", Path(folder))
            now.run.add(replace(fields.sweep_headline(patches, found), files=files))
    show.patches(patches, now.study)
    show.lines([str(least) for least in found])
    show.where_to_look(now.store, now.run.experiment_id)


@click.command("report-pass")
@options.pair
@click.option("--alias", default="champion", show_default=True, help="Which winners: those of this alias.")
@click.option(
    "--n",
    type=options.Text(
        "count",
        lambda text: text if text == AS_MANY else options.count("--n").convert(text, None, None),
        none="all",
    ),
    default=AS_MANY,
    show_default=True,
    help="Reported prompts, all, or 500 where there are as many and else all.",
)
@click.option(
    "--split",
    type=options.one_of("Split", "test", "val"),
    default="test",
    show_default=True,
    help="Reported split.",
)
@options.n_train
@options.seed
@options.models
@options.engine
@options.tracking
@_pair_mismatch
def report_pass_command(**given: Any) -> None:
    """Measure the registered winners of a pair again, each with the α kept on its version (RQ2).

    One patch run a winner. Nothing is fitted or chosen, so no number is picked from several.

    \b
    Example:
      mechdiff report-pass --pair cultural-demo --alias champion
    """
    store = open_store(given["tracking_uri"])
    versions = winners_of(store, PairSpec.load(given["pair"]).name, given["alias"])
    maps = [load_map(version.uri, store=store) for version in versions]
    maps = [
        map_.with_alpha(foreign.number(version.tags, "alpha") if "alpha" in version.tags else map_.alpha)
        for version, map_ in zip(versions, maps, strict=True)
    ]
    cells = [_cell_of(map_, str(version)) for version, map_ in zip(versions, maps, strict=True)]

    def check(protocol: Protocol, pair: Pair) -> None:
        for version, map_ in zip(versions, maps, strict=True):
            check_pair(replace(protocol, position=Position.parse(str(map_.meta["position"]))), pair)
            _check_map(map_, str(version), pair, given["allow_pair_mismatch"])

    with session("report_pass", f"report pass of {len(versions)} winners", given, check) as now:
        pair, protocol = now.study.pair, now.study.protocol
        if given["n"] == AS_MANY:
            protocol = replace(protocol, n=min(SEED_N, len(pair.prompts_of(protocol.split))))
            show.lines([f"{protocol.n} {protocol.split} prompts (of the {SEED_N} aimed at)."])
        studies: dict[Position, Study] = {}
        patches = []
        for version, map_, cell in zip(versions, maps, cells, strict=True):
            position = Position.parse(str(map_.meta["position"]))
            if position not in studies:
                at = replace(protocol, position=position)
                studies[position] = Study(pair, at, now.study.stage, now.study.workers)
            study = studies[position]
            (patch,) = study.patch([(cell, map_)])
            now.run.log(fields.patch_run(patch, study, map_name=str(version)))
            patches.append(patch)
        now.run.add(report_pass_run(patches))
    show.patches(patches, now.study)
    show.where_to_look(now.store, now.run.experiment_id)


def _cell(given: dict[str, Any]) -> Cell:
    site = Site(given["layer"], given["hook"])
    return Cell(site, given["solver"], given["family"], given["k"], given["alpha"])


def _cell_of(map_: AffineMap, name: str) -> Cell:
    """The cell that a map says it belongs to."""
    meta = map_.meta
    missing = [key for key in ("site", "solver", "family", "k", "position") if key not in meta]
    if missing:
        raise MechdiffError(
            f"Map {name} does not say its {', '.join(missing)}; fit it again with mechdiff fit."
        )
    site, rank = Site.parse(str(meta["site"])), Rank.parse(str(meta["k"]))
    return Cell(site, str(meta["solver"]), str(meta["family"]), rank, Alpha((map_.alpha,)))


def _check_map(map_: AffineMap, name: str, pair: Pair, any_pair: bool) -> None:
    """Refuse, or where that is allowed say, that a map is of another pair; the run's tags say it too."""
    check_map(map_, name, Site.parse(str(map_.meta["site"])), pair, any_pair=any_pair)
    theirs = map_.meta.get("fingerprint", "unknown")
    if theirs != pair.fingerprint:
        show.warn(f"map {name} was fitted on pair {theirs} and patches {pair.fingerprint}; the run says so")


def _demand_signal(patches: list[PatchRecord]) -> None:
    """Fail where an effect could not be told from noise; what was measured is in the run already.

    That is a drop, or between models of different widths, which have no raw patch, a skill.
    """
    for patch in patches:
        name = "drop" if patch.kl_raw is not None else "skill"
        if f"{name}_pct" in patch.undefined:
            raise MechdiffError(
                f"No {name} at {patch.cell.site}: {patch.undefined[f'{name}_pct']}; choose a "
                "site where the models differ, e.g. a later layer."
            )
