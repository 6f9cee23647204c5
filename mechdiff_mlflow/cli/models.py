"""Commands that look at whole models and layers: atlas, layers, heads."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.cli.session import session
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol
from mechdiff_mlflow.experiments.atlas import atlas
from mechdiff_mlflow.experiments.possible import check_cells, check_pair, check_sites
from mechdiff_mlflow.experiments.profiles import heads_of, layer_profile
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.report.figures import write_figures
from mechdiff_mlflow.report.profiles import (
    atlas_figures,
    first_difference,
    heads_figures,
    heads_sentence,
    layer_figures,
    layers_sentence,
)
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, Rank
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.tracking.content import fields
from mechdiff_mlflow.tracking.content.names import check_alias
from mechdiff_mlflow.tracking.content.parents import atlas_run, heads_run, layers_run
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.registry.promotion import PromotionRefused, promote

ALL_HOOKS = ",".join(map(str, Hook))


@click.command("atlas")
@options.pair
@click.option(
    "--hooks",
    type=options.Text("hooks", options.listed(Hook.parse)),
    default=ALL_HOOKS,
    show_default=True,
    help="Hooks to visit at every layer.",
)
@click.option(
    "--alpha",
    type=options.Text("alpha", options.one_alpha),
    default="1",
    show_default=True,
    help="Scale of every map.",
)
@click.option(
    "--promote-best",
    type=options.whole("--promote-best", 3, most=100_000),
    default="0",
    show_default=True,
    help="Register the maps of this many sites, those with the highest drop on val.",
)
@click.option("--alias", default="champion", show_default=True, help="Alias of what is registered.")
@options.force
@options.solver
@options.position
@options.reported
@options.n_train
@options.seed
@options.models
@options.engine
@options.tracking
def atlas_command(**given: Any) -> None:
    """Patch every layer at every hook, raw and mapped: where do the models differ, and how transportably?

    Maps have full rank. Sites whose raw patch stays below the noise floor get no map and no run of their own,
    only their row in the table.

    \b
    Example:
      mechdiff atlas --hooks attn_out,resid_post --promote-best 1
    """
    check_alias(given["alias"])

    def check(protocol: Protocol, pair: Pair) -> None:
        how = (given["solver"], given["family"], Rank(None), Alpha((given["alpha"],)))
        sites = [Site(layer, hook) for layer in range(pair.n_layers) for hook in given["hooks"]]
        check_cells([Cell(site, *how) for site in sites], protocol, pair)

    promotes = [rf"L\d+-{hook}" for hook in given["hooks"]] if given["promote_best"] else []
    with session("atlas", f"atlas of {given['pair']}", given, check, promotes=promotes) as now:
        found = atlas(
            now.study,
            hooks=given["hooks"],
            solver=given["solver"],
            family=given["family"],
            alpha=given["alpha"],
            best=given["promote_best"],
        )
        lines: list[str] = []
        refused: list[str] = []
        with now.study.stage("logging runs", len(found.patches)) as advance:
            for site in (site for site in found.patches if site in found.best):
                child = now.run.log(fields.cell_run(found.fits[site], found.patches[site], now.study))
                try:
                    policy = PromotionPolicy(force=given["force"])
                    version = promote(
                        now.store,
                        child,
                        alias=given["alias"],
                        policy=policy,
                        say=lines.append,
                        here=now.run,
                        read=found.fits[site].map,
                    )
                    name = f"{version.name}@{given['alias']}"
                    lines.append(f"Fetch: {show.command('fetch', name, '-o', 'map.pt')}")
                except PromotionRefused as refusal:
                    refused.append(str(refusal))
                advance(1)
            others = [patch for site, patch in found.patches.items() if site not in found.best]
            now.run.log_all([fields.patch_run(patch, now.study) for patch in others], advance)
        sentence = first_difference(found.table)
        with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
            title = f"Atlas of {now.study.pair.name}"
            files = write_figures(atlas_figures(found.table), title, Path(folder))
            now.run.add(atlas_run(found, sentence, files))
    if found.patches:
        show.patches(list(found.patches.values()), now.study)
    show.lines([sentence])
    show.where_to_look(now.store, now.run.experiment_id, *lines)
    if refused:
        raise MechdiffError(" ".join(refused))


@click.command("layers")
@options.pair
@options.position
@options.reported
@options.seed
@options.models
@options.engine
@options.tracking
def layers_command(**given: Any) -> None:
    """Compare base and tuned layer by layer: CKA, and unmapped layer patches both ways (RQ1).

    \b
    Example:
      mechdiff layers --pair cultural-demo
    """
    with session("layers", f"layers of {given['pair']}", given) as now:
        table = layer_profile(now.study)
        sentence = layers_sentence(table)
        with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
            files = write_figures(layer_figures(table), f"Layers of {now.study.pair.name}", Path(folder))
            now.run.add(layers_run(table, sentence, files))
    show.frame(table)
    show.lines([sentence])
    show.where_to_look(now.store, now.run.experiment_id)


@click.command("heads")
@options.pair
@click.option(
    "--layer",
    type=options.whole("Layer", 26, most=99_999),
    default="26",
    show_default=True,
    help="Whose attention.",
)
@click.option(
    "--n-random",
    type=options.whole("--n-random", 20, least=2, most=10_000),
    default="20",
    show_default=True,
    help="Random sets of every size, to compare the greedy ones with.",
)
@options.position
@options.reported
@options.seed
@options.models
@options.engine
@options.tracking
def heads_command(**given: Any) -> None:
    """Find the heads of a layer that carry the difference: coverage KL_S / KL_all of sets S (RQ4).

    Heads get the base model's values before the output projection. val chooses sets greedily.

    \b
    Example:
      mechdiff heads --layer 26
    """

    def check(protocol: Protocol, pair: Pair) -> None:
        check_pair(protocol, pair)
        check_sites([Site(given["layer"], Hook.ATTN_OUT)], pair)

    with session("heads", f"heads of layer {given['layer']}", given, check) as now:
        record = heads_of(now.study, given["layer"], n_random=given["n_random"])
        sentence = heads_sentence(record.table)
        with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
            files = write_figures(heads_figures(record.table), f"Heads of {record.site}", Path(folder))
            now.run.add(heads_run(record, sentence, files))
    show.frame(record.table.drop(columns=["site", "n_heads", "KL_all"]))
    show.lines([sentence])
    show.where_to_look(now.store, now.run.experiment_id)
