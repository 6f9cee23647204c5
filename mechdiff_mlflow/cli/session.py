"""What the experiment commands share: options made into specs, a tracked run, a loaded pair."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import click

from mechdiff_mlflow.cli import show
from mechdiff_mlflow.cli.computing import workers_of
from mechdiff_mlflow.cli.options import Text
from mechdiff_mlflow.cli.progress import bars
from mechdiff_mlflow.cli.recovery import resumption
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.possible import check_pair
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.tracking.content import fields
from mechdiff_mlflow.tracking.content.records import ParamValue, RunRecord
from mechdiff_mlflow.tracking.content.tag_names import PAIR_FINGERPRINT
from mechdiff_mlflow.tracking.registry.promotion import require_may_promote
from mechdiff_mlflow.tracking.runs.commands import Command, earlier, user_of
from mechdiff_mlflow.tracking.runs.mlflow_run import experiment_of
from mechdiff_mlflow.tracking.runs.runs import RUN_ID_VARIABLE, OpenRun, Tracker
from mechdiff_mlflow.tracking.store.store import Store, open_store
from mechdiff_mlflow.tracking.store.user_cache import staging

AS_MANY = "500-or-all"
"""As the number of prompts: the seed's 500 where there are as many, otherwise all there are."""
LONE = ("fit", "patch")
NOT_RESUMED = ("tracking_uri", "address")
MACHINE_OPTIONS = (
    *("tracking_uri", "experiment", "device", "batch_size", "memory_budget", "sequential", "out"),
    *("engine", "address", "workers", "gpus_per_worker"),
)
"""Where results go and how they are computed, not what they are."""


@dataclass(frozen=True)
class Session:
    """An open run and the study whose records go into it."""

    store: Store
    run: OpenRun
    study: Study
    has_parent: bool

    def place(self, record: RunRecord) -> str:
        """Log a record below the parent, or as the open run itself where there is none; the run's id."""
        if self.has_parent:
            return self.run.log(record)
        self.run.add(record)
        return self.run.run_id


def command_line(options: dict[str, Any]) -> str:
    """What to type to run the current command again, defaults written out; no store, which may be secret."""
    leave_out = set(MACHINE_OPTIONS) - {"out"}
    return shlex.join(["mechdiff", *words_of(click.get_current_context(), options, leave_out)])


def words_of(context: click.Context, options: dict[str, Any], leave_out: Container[str]) -> list[str]:
    """A command and its parameters as typed."""
    words = [context.info_name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        value = options.get(name)
        if name in leave_out:
            continue
        if isinstance(parameter, click.Argument):
            words += map(str, value if isinstance(value, tuple) else (value,))
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            words += [parameter.opts[0]] if value else []
        elif parameter.opts and _typed(parameter, value):
            words += [parameter.opts[0], _typed(parameter, value)]
    return words


def _typed(parameter: click.Parameter | None, value: Any) -> str:
    """A value as it is typed; empty for an option that was left out."""
    if parameter is not None and isinstance(parameter.type, Text):
        return parameter.type.text(value)
    return "" if value is None else str(value)


def log_document(
    record: RunRecord, title: str, experiment: str, options: dict[str, Any], content: str
) -> None:
    """Log what a command made from runs alone as one run, which the same command and content had or get.

    Args:
        record: The run.
        title: Its name.
        experiment: Where to.
        options: The command's parameters by name.
        content: What the files say.
    """
    store = open_store(options["tracking_uri"])
    params, tags = asked(options), {"mechdiff.command": command_line(options)}
    left = earlier(store, experiment, [record.kind, title, params], content)
    if left.finished is not None:
        show.where_to_look(store, left.finished.info.experiment_id)
        return
    tracker = Tracker(store, experiment, resume=left.unfinished, as_asked=as_asked)
    with tracker.run(record.kind, title, params, tags=tags | left.tag) as run:
        run.add(record)
    show.where_to_look(store, run.experiment_id)


@contextlib.contextmanager
def session(
    kind: str,
    name: str,
    options: dict[str, Any],
    check: Callable[[Protocol, Pair], None] = check_pair,
    *,
    promotes: Sequence[str] = (),
) -> Iterator[Session]:
    """A tracked run around a study of the pair in `options`.

    Args:
        kind: `run`, `fit`, `patch` or `sweep`.
        name: What the UI shows.
        options: The command's parameters by name.
        check: Refuses what is impossible for the pair, of which no weights have been loaded.
        promotes: Slugs of the sites whose maps it may register, as regular expressions.
    """
    spec = PairSpec.load(options["pair"])
    store = open_store(options["tracking_uri"])
    if promotes:
        require_may_promote(store, spec.name, promotes)
    resumed = resumption()
    if resumed is not None:
        resumed.check_trust(options["pair"], spec.trust_remote_code)
    tracker = Tracker(
        store,
        experiment_of(store, options["experiment"], spec.name),
        resume=None if resumed is None else resumed.run_id,
        as_asked=as_asked,
    )
    # A lone fit or patch is one run, whose params are what was resolved; what was asked would contradict it.
    has_parent = kind not in LONE or RUN_ID_VARIABLE in os.environ if resumed is None else resumed.has_parent
    words = words_of(click.get_current_context(), options, NOT_RESUMED)
    again = Command.here(words, user_of(store), has_parent=has_parent, trusts=bool(spec.trust_remote_code))
    tags = {"mechdiff.command": command_line(options), **again.tag}
    protocol = protocol_of(options)
    params = asked(options) if has_parent else {}
    with tracker.run(kind, name, params, tags=tags, texts=fields.setting(spec)) as run:
        again.begun(run.run_id, None if resumed is None else resumed.record)
        with (
            bars() as stage,
            workers_of(spec, options, staging(run.run_id), stage, partial(check, protocol)) as workers,
        ):
            run.pin(PAIR_FINGERPRINT, workers.pair.fingerprint, "the pair or mechdiff")
            yield Session(store, run, Study(workers.pair, protocol, stage, workers), has_parent)
    workers.discard()  # only now: the run is finished, and nobody will resume it
    again.done()


def protocol_of(options: dict[str, Any]) -> Protocol:
    """The protocol in a command's parameters; what it has no option for keeps its default."""
    options = {**options, "n": None} if options.get("n") == AS_MANY else options
    names = {field.name for field in dataclasses.fields(Protocol)}
    return Protocol(**{name: value for name, value in options.items() if name in names})


def asked(options: dict[str, Any]) -> dict[str, ParamValue]:
    """Parameters as the user gave them, by the names that MLproject uses."""
    known = {parameter.name: parameter for parameter in click.get_current_context().command.params}
    given = {name: value for name, value in options.items() if name not in MACHINE_OPTIONS}
    return {
        name: value if isinstance(value, bool) else _typed(known.get(name), value)
        for name, value in given.items()
    }


def as_asked(name: str, text: str) -> str:
    """A param that `mlflow run` has logged, as typed, in the words in which `asked` has that value."""
    context = click.get_current_context()
    parameter = next((p for p in context.command.params if p.name == name), None)
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return {"yes": "true", "no": "false"}.get(text, text)
    if parameter is None or not isinstance(parameter.type, Text):
        return text
    try:
        return _typed(parameter, parameter.type.convert(text, parameter, context))
    except MechdiffError:  # the command itself was given another value
        return text
