"""Requests that look at whole models and layers: atlas, layers, heads."""

from __future__ import annotations

from mechdiff_mlflow.experiments import Protocol
from mechdiff_mlflow.experiments import atlas as measured_atlas
from mechdiff_mlflow.experiments.preflight import check_cells, check_pair, check_sites
from mechdiff_mlflow.experiments.profiles import heads_of, layer_profile
from mechdiff_mlflow.experiments.requests import AtlasRequest, HeadsRequest, LayersRequest
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.report.evidence import of_record
from mechdiff_mlflow.report.experiment import answering, how
from mechdiff_mlflow.report.profiles import (
    atlas_figures,
    heads_figures,
    heads_sentence,
    layer_figures,
    layers_sentence,
    where,
)
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, Rank
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.tracking.commands.session import PYTHON, Caller, Result, session
from mechdiff_mlflow.tracking.content import fields
from mechdiff_mlflow.tracking.content.names import check_alias
from mechdiff_mlflow.tracking.content.parents import atlas_run, heads_run, layers_run


def atlas(request: AtlasRequest, caller: Caller = PYTHON) -> Result:
    """Patch every layer at every hook, raw and mapped, and promote the best sites if that is asked for.

    Raises:
        MechdiffError: The request is impossible.
    """
    check_alias(request.alias)

    def check(protocol: Protocol, pair: Pair) -> None:
        how = (request.solver, request.family, Rank(None), Alpha((request.alpha,)))
        sites = [Site(layer, hook) for layer in range(pair.n_layers) for hook in request.hooks]
        check_cells([Cell(site, *how) for site in sites], protocol, pair)

    promotes = [rf"L\d+-{hook}" for hook in request.hooks] if request.promote_best else []
    with session(request, f"atlas of {request.pair}", caller, check, promotes=promotes) as now:
        found = measured_atlas.atlas(
            now.study,
            hooks=request.hooks,
            solver=request.solver,
            family=request.family,
            alpha=request.alpha,
            best=request.promote_best,
            min_effect_nats=request.min_effect,
        )
        with now.study.stage("logging runs", len(found.patches)) as advance:
            for site in (site for site in found.patches if site in found.best):
                measured, map_ = found.patches[site], found.fits[site].map
                child = now.run.log(fields.cell_run(found.fits[site], measured, now.study))
                now.promote(child, map_, request.alias, force=request.force)
                advance(1)
            for site in (site for site in found.patches if site not in found.best):
                now.run.log_soon(fields.patch_run(found.patches[site], now.study))
            now.run.wait(advance)
        said = where(found.table, request.min_effect)
        measured_at = answering([of_record(patch) for patch in found.patches.values()], request.min_effect)
        sentence = "\n".join([*said, *how(measured_at, request.min_effect)])
        figures = atlas_figures(found.table, request.min_effect)
        now.add_with_figures(
            figures,
            f"Atlas of {now.study.pair.name}",
            lambda files: atlas_run(found, sentence, files, request.min_effect),
        )
    fits, patches = list(found.fits.values()), list(found.patches.values())
    return now.result(fits=fits, patches=patches, profile=found.table, sentence=sentence, figures=figures)


def layers(request: LayersRequest, caller: Caller = PYTHON) -> Result:
    """Compare base and tuned layer by layer: CKA, and unmapped layer patches both ways.

    Raises:
        MechdiffError: The request is impossible.
    """
    with session(request, f"layers of {request.pair}", caller) as now:
        table = layer_profile(now.study)
        sentence, figures = layers_sentence(table), layer_figures(table)
        now.add_with_figures(
            figures, f"Layers of {now.study.pair.name}", lambda files: layers_run(table, sentence, files)
        )
    return now.result(profile=table, sentence=sentence, figures=figures)


def heads(request: HeadsRequest, caller: Caller = PYTHON) -> Result:
    """Find the heads of a layer that carry the difference.

    Raises:
        MechdiffError: The request is impossible.
    """

    def check(protocol: Protocol, pair: Pair) -> None:
        check_pair(protocol, pair)
        check_sites([Site(request.layer, Hook.ATTN_OUT)], pair)

    with session(request, f"heads of layer {request.layer}", caller, check) as now:
        table = heads_of(now.study, request.layer, n_random=request.n_random)
        sentence, figures = heads_sentence(table), heads_figures(table)
        title = f"Heads of {table['site'].iloc[0]}"
        now.add_with_figures(figures, title, lambda files: heads_run(table, sentence, files))
    return now.result(profile=table, sentence=sentence, figures=figures)
