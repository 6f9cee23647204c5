"""A tracked run around the study that a request asks for."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import FitRecord, PatchRecord, Protocol, Study
from mechdiff_mlflow.experiments.preflight import check_pair
from mechdiff_mlflow.experiments.progress import Stage, silent
from mechdiff_mlflow.experiments.requests import ExperimentRequest
from mechdiff_mlflow.experiments.sweep import LeastRank
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.report.figures import Figure, write_figures
from mechdiff_mlflow.spec.options import Request
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.tracking.commands.computing import workers_of
from mechdiff_mlflow.tracking.content import fields
from mechdiff_mlflow.tracking.content.overview import models_of
from mechdiff_mlflow.tracking.content.records import ParamValue, RunRecord
from mechdiff_mlflow.tracking.content.tag_names import PAIR_FINGERPRINT
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.registry.promotion import PromotionRefused, promote, require_may_promote
from mechdiff_mlflow.tracking.registry.versions import Version
from mechdiff_mlflow.tracking.runs.mlflow_run import experiment_of
from mechdiff_mlflow.tracking.runs.resuming import Command, user_of
from mechdiff_mlflow.tracking.runs.tracker import RUN_ID_VARIABLE, OpenRun, Tracker
from mechdiff_mlflow.tracking.store.store import Store, open_store
from mechdiff_mlflow.tracking.store.user_cache import staging


@dataclass(frozen=True, slots=True)
class Resumption:
    """The run that a request goes on with."""

    run_id: str
    has_parent: bool  # whether results lie below that run
    record: str  # name of the local record of who began it
    trusts: bool  # whether this user began it with a pair whose code is trusted


@dataclass(frozen=True, slots=True)
class Caller:
    """Who has a request carried out: where progress is shown, which run is resumed, who hears of doubts."""

    stage: Stage = silent
    resumed: Resumption | None = None
    warn: Callable[[str], None] = warnings.warn


PYTHON = Caller()


@dataclass(frozen=True, eq=False)
class Result:
    """What a request found; all of it is in MLflow as well."""

    store: Store
    experiment_id: str
    run_id: str  # of the top run
    pair: str  # its name
    fits: Sequence[FitRecord] = ()
    patches: Sequence[PatchRecord] = ()
    map_run: str = ""  # id of the run that has the map, where there is one
    least_ranks: Sequence[LeastRank] = ()  # of a sweep, one for each target
    profile: pd.DataFrame | None = None  # of an atlas, of layers or of heads
    sentence: str = ""  # what that table shows
    figures: Sequence[Figure] = ()  # as PNG and as HTML
    versions: Sequence[Version] = ()  # registered maps that got the alias
    notes: Sequence[str] = ()  # what the promotion said
    refused: str = ""  # why a map did not get the alias

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a site, layer or set of heads; else one row a measured map."""
        return fields.summary_table(self.patches) if self.profile is None else self.profile


@dataclass(frozen=True)
class Session:
    """An open run and the study whose records go into it."""

    store: Store
    run: OpenRun
    study: Study
    has_parent: bool

    versions: list[Version] = field(default_factory=list)  # registered maps that got the alias
    notes: list[str] = field(default_factory=list)  # what promotions said
    refusals: list[str] = field(default_factory=list)  # why maps did not get the alias

    def result(self, **found: Any) -> Result:
        """Where the run is, what promotions gave, and what was `found`, by the names of `Result`."""
        return Result(
            store=self.store,
            experiment_id=self.run.experiment_id,
            run_id=self.run.run_id,
            pair=self.study.pair.name,
            versions=self.versions,
            notes=self.notes,
            refused=" ".join(self.refusals),
            **found,
        )

    def place(self, record: RunRecord) -> str:
        """Log a record below the parent, or as the open run itself where there is none; the run's id."""
        if self.has_parent:
            return self.run.log(record)
        self.run.add(record)
        return self.run.run_id

    def promote(self, run_id: str, map_: AffineMap, alias: str, *, force: bool) -> None:
        """Register the map that a run below this one measured; where that is refused, the run stays good."""
        policy, say = PromotionPolicy(force=force), self.notes.append
        try:
            made = promote(self.store, run_id, alias=alias, policy=policy, say=say, here=self.run, read=map_)
            self.versions.append(made)
        except PromotionRefused as refusal:
            self.refusals.append(str(refusal))

    def add_with_figures(
        self, figures: Sequence[Figure], title: str, make: Callable[[Mapping[str, Path]], RunRecord]
    ) -> None:
        """Add a record with the files of figures to the open run."""
        with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
            self.run.add(make(write_figures(figures, title, Path(folder))))


def command_line(request: Request) -> str:
    """What to type to repeat a request, defaults written out; no store, which may be secret."""
    words = request.words(lambda name, option: option.is_technical and name != "out")
    return shlex.join(["mechdiff", *words])


@contextlib.contextmanager
def session(
    request: ExperimentRequest,
    name: str,
    caller: Caller,
    check: Callable[[Protocol, Pair], None] = check_pair,
    *,
    position: Position | None = None,
    promotes: Sequence[str] = (),
) -> Iterator[Session]:
    """A tracked run around a study of the pair of a request, which the UI shows as `name`.

    `check` refuses what is impossible for the pair before weights are loaded; `position` is taken in place of
    the request's; `promotes` are slugs of the sites whose maps may be registered, as regular expressions.
    """
    spec, protocol = request.spec, request.protocol
    params: dict[str, ParamValue] = dict(request.params())
    if position is not None:
        protocol, params["position"] = replace(protocol, position=position), str(position)
    store, resumed = open_store(request.tracking_uri), caller.resumed
    if promotes:
        require_may_promote(store, spec.name, promotes)
    if resumed is not None and spec.trust_remote_code and not resumed.trusts:
        raise MechdiffError(
            f"Pair {request.pair[:200]!r} says trust_remote_code: true, and nothing on this machine says "
            f"that you began run {resumed.run_id} so; if you trust that code, run the command yourself "
            "instead of resuming."
        )
    # A lone fit or patch is one run, whose params are what was resolved; what was asked would contradict it.
    is_alone = request.kind in ("fit", "patch") and RUN_ID_VARIABLE not in os.environ
    has_parent = not is_alone if resumed is None else resumed.has_parent
    words = request.words(lambda name, option: not option.is_resumed)
    again = Command.here(words, user_of(store), has_parent=has_parent, trusts=spec.trust_remote_code)
    tracker = Tracker(
        store,
        experiment_of(store, request.experiment, spec.name),
        resume=None if resumed is None else resumed.run_id,
        as_asked=request.as_typed,
        about=models_of(spec),
    )
    tags = {"mechdiff.command": command_line(request), **again.tag}
    setting = fields.setting(spec)
    with tracker.run(request.kind, name, params if has_parent else {}, tags=tags, texts=setting) as run:
        again.begun(run.run_id, None if resumed is None else resumed.record)
        with workers_of(
            request, spec, staging(run.run_id), caller.stage, partial(check, protocol)
        ) as workers:
            run.pin(PAIR_FINGERPRINT, workers.pair.fingerprint, "the pair or mechdiff")
            yield Session(store, run, Study(workers.pair, protocol, caller.stage, workers), has_parent)
    workers.discard()  # only now: the run is finished, and nobody will resume it
    again.done()
