"""Commands that load a pair and measure or check it: run, fit, patch, sweep, report-pass, …, doctor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click

from mechdiff_mlflow.cli import show
from mechdiff_mlflow.cli.group import cli
from mechdiff_mlflow.cli.options import command
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.options import DEFAULT_PAIR, ModelOptions, NamedPairOptions
from mechdiff_mlflow.experiments.preflight import examine
from mechdiff_mlflow.experiments.requests import (
    ORIGINAL_N,
    AtlasRequest,
    FitRequest,
    HeadsRequest,
    LayersRequest,
    PatchRequest,
    ReportPassRequest,
    RunRequest,
    SweepRequest,
)
from mechdiff_mlflow.models.named_pair import write_pair
from mechdiff_mlflow.spec.options import TEXT, option
from mechdiff_mlflow.tracking.commands import measuring, profiling
from mechdiff_mlflow.tracking.commands.computing import load_as_asked
from mechdiff_mlflow.tracking.commands.session import Caller, Result, Resumption

R = TypeVar("R")


@command(RunRequest)
def _run(request: RunRequest) -> None:
    done = _carried_out(measuring.run, request)
    show.patches(done.patches, done.pair)
    show.lines(done.notes)
    keep = [] if done.versions else [f"Keep:  {show.command('promote', done.map_run)}"]
    _finish(done, *keep, *_fetches(done, request.promote or ""))


@command(FitRequest)
def _fit(request: FitRequest) -> None:
    done = _carried_out(measuring.fit, request)
    show.fits(done.fits, done.pair)
    patch = show.command("patch", "--map", f"runs:/{done.map_run}", *request.pair_words)
    _finish(done, f"Patch: {patch}")


@command(PatchRequest)
def _patch(request: PatchRequest) -> None:
    done = _carried_out(measuring.patch, request)
    show.patches(done.patches, done.pair)
    show.lines([note for note in done.notes if note])
    _finish(done)


@command(SweepRequest)
def _sweep(request: SweepRequest) -> None:
    done = _carried_out(measuring.sweep, request)
    show.patches(done.patches, done.pair)
    show.lines(list(map(str, done.least_ranks)))
    _finish(done)


@command(ReportPassRequest)
def _report_pass(request: ReportPassRequest) -> None:
    done = _carried_out(measuring.report_pass, request)
    if isinstance(request.n, str):
        show.lines([f"{done.patches[0].n} {request.split} prompts (of the {ORIGINAL_N} aimed at)."])
    show.patches(done.patches, done.pair)
    _finish(done)


@command(AtlasRequest)
def _atlas(request: AtlasRequest) -> None:
    done = _carried_out(profiling.atlas, request)
    if done.patches:
        show.patches(done.patches, done.pair)
    show.sentences(done.sentence)
    _finish(done, *done.notes, *_fetches(done, request.alias))


@command(LayersRequest)
def _layers(request: LayersRequest) -> None:
    done = _carried_out(profiling.layers, request)
    show.frame(done.table)
    show.sentences(done.sentence)
    _finish(done)


@command(HeadsRequest)
def _heads(request: HeadsRequest) -> None:
    done = _carried_out(profiling.heads, request)
    show.frame(done.table.drop(columns=["site", "n_heads", "KL_all"]))
    show.sentences(done.sentence)
    _finish(done)


@cli.group("pair")
def pair_group() -> None:
    """Pairs of models, written down.

    \b
    Example:
      mechdiff pair init --tuned org/adapter --prompts prompts.jsonl
    """


@dataclass(frozen=True, kw_only=True)
class InitRequest(NamedPairOptions):
    """Write the pair spec that two names and some prompts amount to, with the prompts split beside it.

    \b
    Example:
      mechdiff pair init --tuned org/adapter --prompts prompts.jsonl --out pair.yaml
    """

    out: str = option("pair.yaml", TEXT, "File to write; the prompts of each split go beside it.")


@command(InitRequest, group=pair_group)
def _init(request: InitRequest) -> None:
    if request.tuned is None:
        raise MechdiffError("No model is named; give --tuned and --prompts.")
    written = write_pair(request.spec, Path(request.out))
    show.lines([f"Wrote {path}" for path in written])
    show.lines([f"Check: {show.command('doctor', written[0])}"])


@dataclass(frozen=True, kw_only=True)
class DoctorRequest(NamedPairOptions, ModelOptions):
    """Load PAIR and check the plumbing that every number depends on.

    \b
    Example:
      mechdiff doctor cultural-demo
    """

    pair: str = option(DEFAULT_PAIR, TEXT, "", is_argument=True)


@command(DoctorRequest)
def _doctor(request: DoctorRequest) -> None:
    with show.bars() as stage, stage("loading both models", 1):
        pair = load_as_asked(request.spec, request)
    show.lines([f"pair {pair.name}, fingerprint {pair.fingerprint}, {pair.spec.dtype} on {pair.device}"])
    failed = []
    for check in examine(pair):
        show.lines([f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.seen}"])
        failed += [] if check.passed else [check.name]
    if failed:
        raise MechdiffError(f"{pair.name} fails {', '.join(failed)}; mend that before trusting any number.")


def _carried_out(work: Callable[[R, Caller], Result], request: R) -> Result:
    """What a request found, with progress bars, and as the run that `resume` goes on with."""
    resumed = click.get_current_context().find_object(Resumption)
    with show.bars() as stage:
        return work(request, Caller(stage, resumed, show.warn))


def _fetches(done: Result, alias: str) -> list[str]:
    names = [f"{version.name}@{alias}" for version in done.versions]
    return [f"Fetch: {show.command('fetch', name, '-o', 'map.pt')}" for name in names]


def _finish(done: Result, *lines: str) -> None:
    """Say where to look, and why a map did not get its alias."""
    show.where_to_look(done.store, done.experiment_id, *lines)
    if done.refused:
        raise MechdiffError(done.refused)
