"""What the experiment commands share: options made into specs, a tracked run, a loaded pair."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import click

from mechdiff_mlflow.cli.computing import workers_of
from mechdiff_mlflow.cli.progress import bars
from mechdiff_mlflow.cli.recovery import resumption
from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.spec import PairSpec
from mechdiff_mlflow.tracking import fields
from mechdiff_mlflow.tracking.cache import staging
from mechdiff_mlflow.tracking.policy import PAIR_FINGERPRINT
from mechdiff_mlflow.tracking.records import ParamValue, RunRecord
from mechdiff_mlflow.tracking.recovery import Command
from mechdiff_mlflow.tracking.runs import RUN_ID_VARIABLE, OpenRun, Tracker
from mechdiff_mlflow.tracking.store import Store, open_store

AS_MANY = "500-or-all"
"""As the number of prompts: the seed's 500 where there are as many, otherwise all there are."""
LONE = ("fit", "patch")
_NOT_RESUMED = ("tracking_uri", "address")
_NOT_SETTINGS = (
    *("tracking_uri", "experiment", "device", "batch_size", "memory_budget", "sequential", "out"),
    *("engine", "address", "workers", "gpus_per_worker"),
)


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
    return shlex.join(["mechdiff", *_words(options, set(_NOT_SETTINGS) - {"out"})])


def _words(options: dict[str, Any], leave_out: Container[str]) -> list[str]:
    """The current command and its parameters as typed."""
    context = click.get_current_context()
    words = [context.info_name or ""]
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in leave_out:
            continue
        value = options.get(name)
        if isinstance(parameter, click.Argument):
            words += map(str, value if isinstance(value, tuple) else (value,))
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            words += [parameter.opts[0]] if value else []
        elif parameter.opts:
            words += [parameter.opts[0], _typed(parameter, value)]
    return words


def _typed(parameter: click.Parameter, value: Any) -> str:
    """A value as it is typed; None is what the default stands for, or in the words of `_text`."""
    name = parameter.name or ""
    if value is None and name not in ("n", "n_train", "off_span"):
        return parameter.default if isinstance(parameter.default, str) else ""
    return str(_text(name, value))


@dataclass(frozen=True)
class Tracked:
    """An open run of a command that loads no model."""

    store: Store
    run: OpenRun


@contextlib.contextmanager
def tracked(kind: str, name: str, experiment: str, options: dict[str, Any]) -> Iterator[Tracked]:
    """A tracked run of a command that works from runs alone."""
    store = open_store(options["tracking_uri"])
    tags = {"mechdiff.command": command_line(options)}
    with Tracker(store, experiment).run(kind, name, asked(options), tags=tags) as run:
        yield Tracked(store, run)


@contextlib.contextmanager
def session(kind: str, name: str, options: dict[str, Any]) -> Iterator[Session]:
    """A tracked run around a study of the pair in `options`.

    Args:
        kind: `run`, `fit`, `patch` or `sweep`.
        name: What the UI shows.
        options: The command's parameters by name.
    """
    spec = PairSpec.load(options["pair"])
    store = open_store(options["tracking_uri"])
    resumed = resumption()
    tracker = Tracker(
        store, options["experiment"] or spec.name, resume=None if resumed is None else resumed.run_id
    )
    # A lone fit or patch is one run, whose params are what was resolved; what was asked would contradict it.
    has_parent = kind not in LONE or RUN_ID_VARIABLE in os.environ if resumed is None else resumed.has_parent
    again = Command.here(_words(options, _NOT_RESUMED), has_parent=has_parent)
    tags = {"mechdiff.command": command_line(options), **again.tag}
    params = asked(options) if has_parent else {}
    with tracker.run(kind, name, params, tags=tags, texts=fields.setting(spec)) as run:
        protocol = protocol_of(options)
        with bars() as stage, workers_of(spec, options, staging(run.run_id), stage) as workers:
            run.pin(PAIR_FINGERPRINT, workers.pair.fingerprint, "the pair")
            yield Session(store, run, Study(workers.pair, protocol, stage, workers), has_parent)
    workers.discard()  # only now: the run is finished, and nobody will resume it


def protocol_of(options: dict[str, Any]) -> Protocol:
    """The protocol in a command's parameters; what it has no option for keeps its default."""
    options = {**options, "n": None} if options.get("n") == AS_MANY else options
    names = {field.name for field in dataclasses.fields(Protocol)}
    return Protocol(**{name: value for name, value in options.items() if name in names})


def asked(options: dict[str, Any]) -> dict[str, ParamValue]:
    """Parameters as the user gave them, by the names that MLproject uses."""
    return {name: _text(name, value) for name, value in options.items() if name not in _NOT_SETTINGS}


def _text(name: str, value: Any) -> ParamValue:
    if value is None:
        return "auto" if name == "off_span" else "all"
    if isinstance(value, tuple):
        return ",".join(str(_text(name, item)) for item in value)
    return value if isinstance(value, int | float) else str(value)
