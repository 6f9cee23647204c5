"""Requests that are answered from runs alone, without any model: report, compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.requests import CompareRequest, ReportRequest
from mechdiff_mlflow.report import experiment as reports
from mechdiff_mlflow.report.comparison import comparison, matches, needed_runs
from mechdiff_mlflow.report.document import Document, joined
from mechdiff_mlflow.report.evidence import Evidence
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.tracking.commands.session import command_line
from mechdiff_mlflow.tracking.content.parents import report_run
from mechdiff_mlflow.tracking.runs.mlflow_run import experiment_of
from mechdiff_mlflow.tracking.runs.results import summarised, tables_of
from mechdiff_mlflow.tracking.runs.resuming import earlier_attempts
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import Store, open_store

TABLES = {"least_ranks.json": "sweep", "atlas.json": "atlas", "layers.json": "layers", "heads.json": "heads"}


@dataclass(frozen=True)
class Written:
    """A document, its files, and the experiment of the run that keeps them."""

    document: Document
    files: Sequence[Path]
    store: Store
    experiment_id: str


def write_report(request: ReportRequest) -> Written:
    """Write up what the runs of a pair show.

    Raises:
        MechdiffError: No run of the pair has been made, or nothing can be written there.
    """
    name, spec = _named(request.pair, request.tracking_uri)
    store = open_store(request.tracking_uri)
    experiment = experiment_of(store, request.experiment, name)
    evidence = evidence_of(store, name, experiment)

    def table(run_id: str, path: str) -> pd.DataFrame | None:
        return tables_of(store, [run_id], path).get(run_id)

    document = reports.report(evidence, spec, min_effect_nats=request.min_effect, table=table)
    doubts = reports.caveats(evidence)
    return _logged(request, store, document, f"report of {name}", experiment, doubts)


def write_comparison(request: CompareRequest) -> Written:
    """Compare fine-tunes by their runs, each with the first.

    Raises:
        MechdiffError: There are not two pairs, a pair has no runs, or nothing can be written there.
    """
    names = [_named(pair, request.tracking_uri)[0] for pair in request.pairs]
    if len(names) < 2 or len(set(names)) < len(names):
        raise MechdiffError(f"Pairs {', '.join(names)} cannot be compared; name two or more different ones.")
    store = open_store(request.tracking_uri)
    first, *others = (evidence_of(store, name, experiment_of(store, None, name)) for name in names)
    documents = []
    for other in others:
        tables = tables_of(store, sorted(needed_runs(matches(first, other))), "per_prompt.json")
        documents.append(
            comparison(first, other, tables, seed=request.seed, min_effect_nats=request.min_effect)
        )
    return _logged(request, store, joined(documents), " against ".join(names), names[0], [])


def _named(pair: str, tracking_uri: str | None) -> tuple[str, PairSpec | None]:
    """A pair's name and its spec; one that was given by the names of its models has an experiment alone."""
    try:
        spec = PairSpec.load(pair)
        return spec.name, spec
    except MechdiffError:
        store = open_store(tracking_uri)
        with store.errors():
            if store.client.get_experiment_by_name(pair) is None:
                raise
        return pair, None


def evidence_of(store: Store, pair: str, experiment: str) -> Evidence:
    """What the runs of an experiment show about a pair.

    Raises:
        MechdiffError: There is no such experiment, or no patch run of the pair.
    """
    return Evidence.of(pair, *summarised(store, experiment, TABLES))


def _logged(
    request: ReportRequest | CompareRequest,
    store: Store,
    document: Document,
    title: str,
    experiment: str,
    doubts: Sequence[str],
) -> Written:
    """Write a document and keep it as one run, which the same request and content had or get."""
    out = Path(request.out)
    files = document.write(out)
    params, tags = request.params(), {"mechdiff.command": command_line(request)}
    left = earlier_attempts(store, experiment, [request.command, title, params], document.markdown(""))
    if left.finished is not None:
        return Written(document, files, store, left.finished.info.experiment_id)
    tracker = Tracker(store, experiment, resume=left.unfinished, as_asked=request.as_typed)
    with tracker.run(request.command, title, params, tags=tags | left.tag) as run:
        run.add(report_run(request.command, document.title, out, files, doubts))
    return Written(document, files, store, run.experiment_id)
