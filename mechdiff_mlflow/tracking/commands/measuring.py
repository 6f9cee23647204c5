"""Requests that fit and patch maps: run, fit, patch, sweep, report-pass."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import PatchRecord, Protocol, Study
from mechdiff_mlflow.experiments.preflight import check_cells, check_map, check_pair
from mechdiff_mlflow.experiments.requests import (
    ORIGINAL_N,
    FitRequest,
    PatchRequest,
    ReportPassRequest,
    RunRequest,
    SweepRequest,
)
from mechdiff_mlflow.experiments.sweep import least_ranks
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.report.evidence import of_record
from mechdiff_mlflow.report.figures import curve_figures
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, Position, Rank
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.tracking.commands.session import PYTHON, Caller, Result, session
from mechdiff_mlflow.tracking.content import fields
from mechdiff_mlflow.tracking.content.names import check_alias
from mechdiff_mlflow.tracking.content.parents import report_pass_run
from mechdiff_mlflow.tracking.flavour import maps_of
from mechdiff_mlflow.tracking.registry.fetch import load_map
from mechdiff_mlflow.tracking.registry.promotion import note_numbers
from mechdiff_mlflow.tracking.registry.versions import winners_of
from mechdiff_mlflow.tracking.store.store import open_store


def run(request: RunRequest, caller: Caller = PYTHON) -> Result:
    """Fit a map at one site, patch with it, and promote it if that is asked for.

    Raises:
        MechdiffError: The request is impossible, or the drop cannot be told from noise.
    """
    cell = request.cell
    if request.promote is not None:  # not after the work
        check_alias(request.promote)
        if request.split == "val" and cell.alpha.is_choice and not request.force:
            raise MechdiffError(
                "α would be chosen on the val prompts that are reported, and such a map may not be promoted; "
                "report test, give one --alpha, or add --force."
            )
    promotes = [] if request.promote is None else [cell.site.slug]
    with session(request, str(cell), caller, partial(check_cells, [cell]), promotes=promotes) as now:
        (fit,) = now.study.fit([cell])
        map_run = now.run.log(fields.fit_run(fit, now.study))
        (patch,) = now.study.patch([fit.to_patch])
        measured = now.run.log(fields.patch_run(patch, now.study, map_run=map_run))
        now.run.add(fields.headline(patch))
        _require_signal(patch)
        if request.promote is not None:
            now.promote(measured, fit.map, request.promote, force=request.force)
    return now.result(fits=[fit], patches=[patch], map_run=map_run)


def fit(request: FitRequest, caller: Caller = PYTHON) -> Result:
    """Fit a map at one site; val chooses what is left open.

    Raises:
        MechdiffError: The request is impossible.
    """
    cell = request.cell
    with session(request, f"fit {cell}", caller, partial(check_cells, [cell])) as now:
        (found,) = now.study.fit([cell])
        map_run = now.place(fields.fit_run(found, now.study))
    return now.result(fits=[found], map_run=map_run)


def patch(request: PatchRequest, caller: Caller = PYTHON) -> Result:
    """Patch with a map that exists.

    Raises:
        MechdiffError: There is no such map, it does not fit the pair, or the drop cannot be told from noise.
    """
    store = open_store(request.tracking_uri)
    map_ = load_map(request.map, store=store)
    fit_id = request.map.removeprefix("runs:/")
    map_run = fit_id if re.fullmatch("[0-9a-f]{32}", fit_id) and maps_of(store, fit_id) else None
    map_ = map_ if request.alpha is None else map_.with_alpha(request.alpha)
    cell = _cell_of(map_, request.map)

    def check(protocol: Protocol, pair: Pair) -> None:
        check_pair(protocol, pair)
        _check_map(map_, request.map, cell, pair, caller, allow_pair_mismatch=request.allow_pair_mismatch)

    name = f"patch {request.map}"[:200]
    with session(request, name, caller, check, position=_position_of(map_)) as now:
        now.run.pin("mechdiff.map_sha256", map_.sha256(), f"map {request.map}")
        (found,) = now.study.patch([(cell, map_)])
        run_id = now.place(fields.patch_run(found, now.study, map_run=map_run, map_name=request.map))
        _require_signal(found)
    now.notes.append(note_numbers(store, request.map, map_, run_id))
    return now.result(patches=[found], map_run=map_run or "")


def sweep(request: SweepRequest, caller: Caller = PYTHON) -> Result:
    """Sweep ranks and scales over sites: the drop at each rank, and the smallest rank that reaches a target.

    Raises:
        MechdiffError: The request is impossible.
    """
    cells = request.cells
    targets = request.targets.at(list(dict.fromkeys(cell.site for cell in cells)))
    with session(request, f"sweep of {len(cells)} cells", caller, partial(check_cells, cells)) as now:
        fits = now.study.fit(cells)
        patches = now.study.patch(
            [fit.to_patch for fit in fits],
            lambda i, patch: now.run.log_soon(fields.cell_run(fits[i], patch, now.study)),
        )
        with now.study.stage("logging runs", len(fits)) as advance:
            now.run.wait(advance)
        least = least_ranks(patches, targets, seed=request.seed)
        figures = curve_figures([of_record(patch) for patch in patches])
        headline = fields.sweep_headline(patches, least)
        now.add_with_figures(
            figures, f"Sweep of {now.study.pair.name}", lambda files: replace(headline, files=files)
        )
    return now.result(fits=fits, patches=patches, least_ranks=least, figures=figures)


def report_pass(request: ReportPassRequest, caller: Caller = PYTHON) -> Result:
    """Measure the registered winners of a pair again, each with the α kept on its version.

    Raises:
        MechdiffError: There is no winner, or one does not fit the pair.
    """
    store = open_store(request.tracking_uri)
    winners = []
    for version in winners_of(store, request.spec.name, request.alias):
        map_ = load_map(version.uri, store=store)
        if "alpha" in version.tags:
            map_ = map_.with_alpha(foreign.number(version.tags, "alpha"))
        winners.append((str(version), map_, _cell_of(map_, str(version))))

    def check(protocol: Protocol, pair: Pair) -> None:
        for name, map_, cell in winners:
            check_pair(replace(protocol, position=_position_of(map_)), pair)
            _check_map(map_, name, cell, pair, caller, allow_pair_mismatch=request.allow_pair_mismatch)

    with session(request, f"report pass of {len(winners)} winners", caller, check) as now:
        pair, protocol = now.study.pair, now.study.protocol
        if isinstance(request.n, str):
            protocol = replace(protocol, n=min(ORIGINAL_N, len(pair.prompts_of(protocol.split))))
        studies: dict[Position, Study] = {}
        patches = []
        for name, map_, cell in winners:
            at = replace(protocol, position=_position_of(map_))
            study = studies.setdefault(at.position, Study(pair, at, now.study.stage, now.study.workers))
            (found,) = study.patch([(cell, map_)])
            now.run.log(fields.patch_run(found, study, map_name=name))
            patches.append(found)
        now.run.add(report_pass_run(patches))
    return now.result(patches=patches)


def _position_of(map_: AffineMap) -> Position:
    return Position.parse(str(map_.meta["position"]))


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


def _check_map(
    map_: AffineMap, name: str, cell: Cell, pair: Pair, caller: Caller, *, allow_pair_mismatch: bool
) -> None:
    """Refuse, or where that is allowed say, that a map is of another pair; the run's tags say it too."""
    check_map(map_, name, cell.site, pair, allow_pair_mismatch=allow_pair_mismatch)
    theirs = map_.meta.get("fingerprint", "unknown")
    if theirs != pair.fingerprint:
        caller.warn(f"map {name} was fitted on pair {theirs} and patches {pair.fingerprint}; the run says so")


def _require_signal(patch: PatchRecord) -> None:
    """Fail where an effect cannot be told from noise; what was measured is in the run already.

    That is a drop, or between models of different widths, which have no raw patch, a skill.
    """
    name = "drop" if patch.kl_raw is not None else "skill"
    if why := patch.undefined.get(f"{name}_pct"):
        raise MechdiffError(
            f"No {name} at {patch.cell.site}: {why}; choose a site where the models differ, e.g. a later "
            "layer."
        )
