"""Commands that load a pair and measure: run, fit, patch, sweep."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.cli.session import AS_MANY, session
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import PatchRecord, Study
from mechdiff_mlflow.experiments.sweep import SweepSite, cells_of, least_ranks
from mechdiff_mlflow.maps import AffineMap
from mechdiff_mlflow.report.curves import curve_figures
from mechdiff_mlflow.report.evidence import of_record
from mechdiff_mlflow.report.figures import write_figures
from mechdiff_mlflow.sites import Site
from mechdiff_mlflow.spec import Alpha, Cell, PairSpec, Position, Rank
from mechdiff_mlflow.tracking import fields
from mechdiff_mlflow.tracking.fetch import load_map
from mechdiff_mlflow.tracking.names import check_alias
from mechdiff_mlflow.tracking.parents import report_pass_run
from mechdiff_mlflow.tracking.promotion import demand_may_promote, promote
from mechdiff_mlflow.tracking.registry import winners_of
from mechdiff_mlflow.tracking.store import open_store

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
@options.tracking
def run_command(**given: Any) -> None:
    """Fit a map at one site, patch with it, and report: the main job.

    One parent run with a fit and a patch run under it.

    \b
    Example:
      mechdiff run --layer 26 --hook attn_out --k 8 --alpha 0.3 --promote
    """
    cell = _cell(given)
    if given["promote"] != "none":
        check_alias(given["promote"])  # not after the work
        name = PairSpec.load(given["pair"]).name
        demand_may_promote(open_store(given["tracking_uri"]), name, cell.site)
    with session("run", str(cell), given) as now:
        (fit,) = now.study.fit([cell])
        fit_id = now.run.log(fields.fit_run(fit, now.study))
        (patch,) = now.study.patch([fit.to_patch])
        now.run.log(fields.patch_run(patch, now.study, map_run=fit_id))
        now.run.add(fields.headline(patch))
        _demand_signal([patch])
        fetch = f"Keep:  mechdiff promote {fit_id}"
        if given["promote"] != "none":
            version = promote(now.store, fit_id, alias=given["promote"], read=fit.map)
            fetch = f"Fetch: mechdiff fetch {version.name}@{given['promote']} -o map.pt"
    show.patches([patch], now.study)
    show.where_to_look(now.store, now.run.experiment_id, fetch)


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
    with session("fit", f"fit {cell}", given) as now:
        (fit,) = now.study.fit([cell])
        fit_id = now.place(fields.fit_run(fit, now.study))
    show.fits([fit], now.study)
    show.where_to_look(now.store, now.run.experiment_id, f"Patch: mechdiff patch --map runs:/{fit_id}")


@click.command("patch")
@click.option("--map", "map", required=True, help="models:/NAME@ALIAS, NAME@ALIAS, runs:/RUN or a file.")
@options.pair
@click.option(
    "--alpha",
    type=options.Text("alpha", lambda text: None if text == "map" else options.one_alpha(text)),
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
    map_ = load_map(given["map"], store=open_store(given["tracking_uri"]))
    map_ = map_ if given["alpha"] is None else map_.with_alpha(given["alpha"])
    given["position"] = Position(str(map_.meta["position"]))
    cell = _cell_of(map_, given["map"])
    with session("patch", f"patch {given['map']}", given) as now:
        _check_same_pair(map_, given["map"], now.study.pair.fingerprint, allowed=given["allow_pair_mismatch"])
        (patch,) = now.study.patch([(cell, map_, ())])
        now.place(fields.patch_run(patch, now.study, map_name=given["map"]))
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
    type=options.Text("targets", options.listed(float)),
    default="30,12",
    show_default=True,
    help="Drop in percent whose smallest rank is sought, one a site (or one for all).",
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
    with session("sweep", f"sweep of {len(cells)} cells", given) as now:
        fits = now.study.fit(cells)
        # Maps, then numbers, are stored while the next are computed.
        now.run.prepare(fields.planned_cell(fit, now.study) for fit in fits)
        patches = now.study.patch(
            [fit.to_patch for fit in fits],
            lambda i, patch: now.run.log_soon(lambda: fields.cell_run(fits[i], patch, now.study)),
        )
        with now.study.stage("logging runs", len(fits)) as advance:
            now.run.wait(advance)
        found = least_ranks(patches, given["targets"], seed=given["seed"])
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
        "count", lambda text: text if text == AS_MANY else options.count("--n").convert(text, None, None)
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
    with session("report_pass", f"report pass of {len(versions)} winners", given) as now:
        pair, protocol = now.study.pair, now.study.protocol
        if given["n"] == AS_MANY:
            protocol = replace(protocol, n=min(SEED_N, len(pair.prompts_of(protocol.split))))
            show.lines([f"{protocol.n} {protocol.split} prompts (of the {SEED_N} aimed at)."])
        studies: dict[Position, Study] = {}
        patches = []
        for version in versions:
            map_ = load_map(version.uri, store=store)
            map_ = map_.with_alpha(float(version.tags.get("alpha", map_.alpha)))
            _check_same_pair(map_, str(version), pair.fingerprint, allowed=given["allow_pair_mismatch"])
            position = Position(str(map_.meta["position"]))
            if position not in studies:
                at = replace(protocol, position=position)
                studies[position] = Study(pair, at, now.study.stage, now.study.workers)
            study = studies[position]
            (patch,) = study.patch([(_cell_of(map_, str(version)), map_, ())])
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


def _check_same_pair(map_: AffineMap, name: str, fingerprint: str, *, allowed: bool = False) -> None:
    """Refuse, or where that is allowed say, that a map is of another pair; the run's tags say it too."""
    fitted_on = map_.meta.get("fingerprint", "unknown")
    if fitted_on == fingerprint:
        return
    if not allowed:
        raise MechdiffError(
            f"Map {name} was fitted on pair {fitted_on} and this is {fingerprint} "
            "(other weights, tokenizer, template, dtype or prompts); fit again or --allow-pair-mismatch."
        )
    show.warn(f"map {name} was fitted on pair {fitted_on} and patches {fingerprint}; the run says so")


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
