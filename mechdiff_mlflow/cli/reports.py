"""Commands that work from runs alone, without any model: report, compare, runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from mechdiff_mlflow.cli import show
from mechdiff_mlflow.cli.options import command, pair_name
from mechdiff_mlflow.cli.resume import list_stuck
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.options import StoreOptions
from mechdiff_mlflow.experiments.requests import CompareRequest, ReportRequest
from mechdiff_mlflow.spec.options import FLAG, TEXT, Kind, option, whole
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.tracking.commands.documents import write_comparison, write_report
from mechdiff_mlflow.tracking.runs.search import find_runs
from mechdiff_mlflow.tracking.store.store import open_store


@command(ReportRequest)
def _report(request: ReportRequest) -> None:
    done = write_report(request)
    show.lines([f"Wrote {path}" for path in done.files])
    show.where_to_look(done.store, done.experiment_id)


@command(CompareRequest)
def _compare(request: CompareRequest) -> None:
    done = write_comparison(request)
    show.document(done.document)
    show.lines([f"Wrote {path}" for path in done.files])
    show.where_to_look(done.store, done.experiment_id)


@dataclass(frozen=True, kw_only=True)
class RunsRequest(StoreOptions):
    """List the patch runs of a pair and site, the best first, in whichever experiment they are.

    \b
    Example:
      mechdiff runs --pair cultural-demo --site L26/attn_out --metric drop_pct --best
      mechdiff runs --stuck --repair
    """

    pair: str | None = option(None, TEXT, "Name or spec of a pair; default all.")
    site: Site | None = option(
        None, Kind("site", Site.parse), "Layer and hook, e.g. L26/attn_out; default all."
    )
    metric: str = option("drop_pct", TEXT, "Metric to list and sort by.")
    best: bool = option(False, FLAG, "Only the best run of each pair and site.")
    limit: int = option("20", whole("--limit", 20, least=1), "How many runs at most.")
    json: bool = option(False, FLAG, "Print JSON with all there is to know of each run.")
    stuck: bool = option(False, FLAG, "Instead, runs that are RUNNING although their process is dead.")
    repair: bool = option(
        False,
        FLAG,
        "With --stuck: set them KILLED; waits up to 60 s for other machines.",
    )
    id: tuple[str, ...] = option(
        (), TEXT, "With --repair: also this run, of which no owner is known.", is_repeated=True
    )


@command(RunsRequest)
def _runs(request: RunsRequest) -> None:
    store = open_store(request.tracking_uri)
    if request.stuck:
        list_stuck(store, repair=request.repair, ids=request.id)
        return
    if request.repair or request.id:
        raise MechdiffError("--repair and --id are for stuck runs; add --stuck.")
    found = find_runs(
        store,
        pair=None if request.pair is None else pair_name(request.pair),
        site=request.site,
        metric=request.metric,
        best=request.best,
        limit=None if request.best else request.limit + 1,
    )
    if len(found) > request.limit and not request.best:
        found.pop()
        show.warn(f"there are more runs than the {request.limit} best, which are shown; raise --limit")
    if request.json:
        show.lines([json.dumps([asdict(run) for run in found], indent=2, ensure_ascii=False)])
    else:
        show.found_runs(found)
