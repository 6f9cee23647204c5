"""Commands that work from runs alone, without any model: report, compare, runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.cli.recovery import list_stuck
from mechdiff_mlflow.cli.session import log_document
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.report.comparison import comparison, matches, needed_runs
from mechdiff_mlflow.report.document import check_out, joined
from mechdiff_mlflow.report.evidence import Evidence
from mechdiff_mlflow.report.experiment import caveats, report
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.tracking.content.parents import report_run
from mechdiff_mlflow.tracking.runs.mlflow_run import experiment_of
from mechdiff_mlflow.tracking.runs.results import summarised, tables_of
from mechdiff_mlflow.tracking.runs.search import find_runs
from mechdiff_mlflow.tracking.store.store import Store, open_store

TABLES = {"least_ranks.json": "sweep", "atlas.json": "atlas", "layers.json": "layers", "heads.json": "heads"}


@click.command("report")
@options.pair
@click.option(
    "--out",
    default="mechdiff-report.md",
    show_default=True,
    help="File to write; .md and .html are both written.",
)
@options.tracking
def report_command(**given: Any) -> None:
    """Write up what the runs of a pair show: results, tables, curves, controls, caveats.

    No model is loaded and nothing is measured again; deleting the report's run loses nothing.

    \b
    Example:
      mechdiff report --pair cultural-demo --out mechdiff-report.md
    """
    check_out(Path(given["out"]))
    name = PairSpec.load(given["pair"]).name
    store = open_store(given["tracking_uri"])
    experiment = experiment_of(store, given["experiment"], name)
    evidence = evidence_of(store, name, experiment)
    document = report(evidence)
    written = document.write(Path(given["out"]))
    show.lines([f"Wrote {path}" for path in written])
    doubts = caveats(evidence, evidence.quoted())
    record = report_run("report", document.title, Path(given["out"]), written, doubts)
    log_document(record, f"report of {name}", experiment, given, document.markdown(""))


@click.command("compare")
@click.argument("pairs", nargs=-1, required=True)
@click.option(
    "--out",
    default="mechdiff-compare.md",
    show_default=True,
    help="File to write; .md and .html are both written.",
)
@options.seed
@options.store
def compare_command(**given: Any) -> None:
    """Compare fine-tunes by their runs: where, how transportable, how low-rank, and how sure.

    PAIRS are two or more; each is compared with the first. Every pair's runs are those of its own experiment,
    or of the one that MLFLOW_EXPERIMENT_NAME names.
    Measure both the same way first: mechdiff sweep (and atlas) on each.

    \b
    Example:
      mechdiff compare cultural-demo cognitive-demo
    """
    names = [PairSpec.load(pair).name for pair in given["pairs"]]
    if len(names) < 2 or len(set(names)) < len(names):
        raise MechdiffError(f"Pairs {', '.join(names)} cannot be compared; name two or more different ones.")
    check_out(Path(given["out"]))
    store = open_store(given["tracking_uri"])
    places = [experiment_of(store, None, name) for name in names]
    first, *others = map(evidence_of, [store] * len(names), names, places)
    documents = []
    for other in others:
        tables = tables_of(store, sorted(needed_runs(matches(first, other))), "per_prompt.json")
        documents.append(comparison(first, other, tables, seed=given["seed"]))
    whole = joined(documents)
    written = whole.write(Path(given["out"]))
    show.lines([whole.markdown("").partition("## Caveats")[0]])
    show.lines([f"Wrote {path}" for path in written])
    record = report_run("compare", whole.title, Path(given["out"]), written, [])
    log_document(record, " against ".join(names), names[0], given, whole.markdown(""))


@click.command("runs")
@click.option("--pair", default=None, help="Name or spec of a pair; default all.")
@click.option(
    "--site",
    type=options.Text("site", Site.parse),
    default=None,
    help="Layer and hook, e.g. L26/attn_out; default all.",
)
@click.option("--metric", default="drop_pct", show_default=True, help="Metric to list and sort by.")
@click.option("--best", is_flag=True, help="Only the best run of each pair and site.")
@click.option(
    "--limit",
    type=options.whole("--limit", 20, least=1),
    default="20",
    show_default=True,
    help="How many runs at most.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON with all there is to know of each run.")
@click.option("--stuck", is_flag=True, help="Instead, runs that are RUNNING although their process is dead.")
@click.option(
    "--repair", is_flag=True, help="With --stuck: set them KILLED; watches other machines' a minute."
)
@click.option("--id", multiple=True, help="With --repair: also this run, of which no owner is known.")
@options.store
def runs_command(**given: Any) -> None:
    """List the patch runs of a pair and site, the best first, in whichever experiment they are.

    \b
    Example:
      mechdiff runs --pair cultural-demo --site L26/attn_out --metric drop_pct --best
      mechdiff runs --stuck --repair
    """
    if given["stuck"]:
        list_stuck(given)
        return
    if given["repair"] or given["id"]:
        raise MechdiffError("--repair and --id are for stuck runs; add --stuck.")
    pair = options.pair_name(given["pair"]) if given["pair"] is not None else None
    store = open_store(given["tracking_uri"])
    limit, best = given["limit"], given["best"]
    found = find_runs(
        store,
        pair=pair,
        site=given["site"],
        metric=given["metric"],
        best=best,
        limit=None if best else limit + 1,
    )
    if len(found) > limit and not best:
        found.pop()
        show.warn(f"there are more runs than the {limit} best, which are shown; give a greater --limit")
    if given["as_json"]:
        show.lines([json.dumps([asdict(run) for run in found], indent=2, ensure_ascii=False)])
    else:
        show.found_runs(found)


def evidence_of(store: Store, pair: str, experiment: str) -> Evidence:
    """What the runs of an experiment show about a pair.

    Raises:
        MechdiffError: There is no such experiment, or no patch run of the pair.
    """
    return Evidence.of(pair, *summarised(store, experiment, TABLES))
