"""After a crash: resume, and the repairing half of runs."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.core import ParameterSource

from mechdiff_mlflow.cli import show
from mechdiff_mlflow.cli.group import cli
from mechdiff_mlflow.cli.options import command
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.options import StoreOptions
from mechdiff_mlflow.experiments.requests import ExperimentRequest
from mechdiff_mlflow.spec.options import FLAG, TEXT, Request, flag_of, option
from mechdiff_mlflow.spec.untrusted import inside, is_there
from mechdiff_mlflow.tracking.commands.session import Resumption
from mechdiff_mlflow.tracking.runs.resuming import Command, names_in, newest_of_mine, top_run, who_began
from mechdiff_mlflow.tracking.runs.stuck import Stuck, end_stuck, stuck_runs
from mechdiff_mlflow.tracking.store.store import Store, open_store

RESUMABLE = {request.command: request for request in ExperimentRequest.__subclasses__()}
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class ResumeRequest(StoreOptions):
    """Finish what a killed or failed command left.

    PARENT is the id of its top run; by default your newest unfinished one that no process is at work on. What
    is finished stays as it is, what was computed is read from the journal, and the rest is done. MORE options
    after `--` replace the command's own, e.g. another --device.

    \b
    Example:
      mechdiff resume
    """

    parent: str | None = option(None, TEXT, "", is_argument=True)
    more: tuple[str, ...] = option((), TEXT, "", is_argument=True, is_repeated=True)
    yes: bool = option(False, FLAG, "Also a run, given by its id, that you did not begin here.")


@command(ResumeRequest)
def _resume(request: ResumeRequest) -> None:
    store, parent, more = open_store(request.tracking_uri), request.parent, request.more
    if parent is not None and parent.startswith("-"):  # the first of MORE
        more, parent = (parent, *more), None
    run, others = newest_of_mine(store) if parent is None else (top_run(store, parent), [])
    if run is None:
        show.lines([_on_one_line(_nothing_of_mine(store.shown, others))])
        return
    run_id = run.info.run_id
    if run.info.status == "FINISHED":
        show.lines([f"Run {run_id} is finished; there is nothing to resume."])
        return
    left = Command.of(run)
    known = left.begun_by(run_id)
    left.check(run, is_ours=known is not None)
    words = _validated(run_id, left.argv, more, is_ours=known is not None)
    line = shlex.join(["mechdiff", *words, *more])
    if known is None and not request.yes:
        raise MechdiffError(
            f"You did not begin run {run_id} on this machine ({who_began(run)}), so it is not resumed "
            f"unasked; if you want `{line}` done here for it, run {show.command('resume', run_id, '--yes')}"
        )
    show.lines([_on_one_line(f"Resuming {run.info.run_name} (run {run_id})."), _on_one_line(line)])
    place = () if request.tracking_uri is None else ("--tracking-uri", request.tracking_uri)
    record, trusts = ("", False) if known is None else (left.record, known.trusts)
    cli.main(
        [*words, *more, *place],
        prog_name="mechdiff",
        standalone_mode=False,
        obj=Resumption(run_id, left.parent, record, trusts),
    )


def _nothing_of_mine(shown: str, others: Sequence[str]) -> str:
    if not others:
        return f"No run in {shown} is unfinished; there is nothing to resume."
    more = f"; and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
    return (
        f"Nothing of yours in {shown} is unfinished. Of others or from other machines ({len(others)}): "
        f"{'; '.join(others[:_LISTED])}{more}. Name one: {show.command('resume', 'RUN', '--yes')}"
    )


def _on_one_line(text: str) -> str:
    """Text from a store, without what a terminal would obey."""
    return str(MechdiffError(text)).replace("\n", "\\n")


def _validated(run_id: str, argv: Sequence[str], more: Sequence[str], *, is_ours: bool) -> list[str]:
    """The words of a run's tag as the command's own options understand them; what a store says is data.

    Of what is not ours only what defines the numbers is taken over, and where `more` does not say otherwise
    it may name no file outside of the working directory, and ask for no promotion.
    """
    name, *rest = argv
    if name not in RESUMABLE:
        raise MechdiffError(f"Run {run_id} asks for `{name[:100]}`, which is not resumed; run it yourself.")
    request = RESUMABLE[name]
    fields = {flag_of(field, option): (field, option) for field, option in request.options().items()}
    values: dict[str, Any] = {}
    words = iter(rest)
    for word in words:  # as we write them: an option, then its value unless it is a flag
        field, option = fields.get(word, ("", None))
        value = "" if option is None else True if option.kind is FLAG else next(words, "--")
        if option is None or not option.is_resumed or str(value).startswith("--"):
            raise MechdiffError(
                f"Run {run_id} asks for `mechdiff {name}` with {word[:100]!r}, which is not taken from a "
                "store; repeat the command yourself."
            )
        values[field] = value
    try:
        asked = request(**values)
    except TypeError as error:  # a value that must be given is not there
        raise MechdiffError(
            f"Run {run_id} asks for a `mechdiff {name}` that lacks a value; repeat the command yourself."
        ) from error
    if is_ours:
        return asked.words(lambda field, option: not option.is_resumed)
    typed = cli.commands[name].make_context(name, list(more), resilient_parsing=True)
    for field in request.options():
        if typed.get_parameter_source(field) is not ParameterSource.COMMANDLINE:
            _check_taken(run_id, asked, field)
    return asked.words(lambda field, option: option.is_technical)


def _check_taken(run_id: str, asked: Request, field: str) -> None:
    """Refuse what a run of somebody else would decide about this user's files and aliases."""
    option, value = asked.options()[field], getattr(asked, field)
    asks = ""
    if field in ("promote", "promote_best") and value:
        asks = "moves an alias"
    if field in ("pair", "map", "tuned", "base", "prompts", "prompts_from") and value is not None:
        for name in names_in(value):
            path = Path(name)
            try:
                if path.is_absolute() or ".." in path.parts or is_there(path):
                    inside(Path.cwd(), name, "It")
            except MechdiffError:
                asks = "names a file outside of this folder"
    if asks:
        flag, text = flag_of(field, option), option.kind.text(value)[:200]
        raise MechdiffError(
            f"Run {run_id}, which you did not begin on this machine, {asks} with {flag} {text!r}; say "
            f"yourself what it is to be: {show.command('resume', run_id, '--yes')} -- {flag} {field.upper()}."
        )


def list_stuck(store: Store, *, repair: bool, ids: Sequence[str]) -> None:
    """Show, and if asked end, the runs that stay RUNNING for ever."""
    found = stuck_runs(store, watch=repair)
    if unknown := set(ids) - {one.run_id for one in found}:
        stuck = show.command("runs", "--stuck")
        raise MechdiffError(f"Run {min(unknown)} is not stuck; those that are: {stuck}")
    if not found:
        show.lines(["No run is stuck."])
        return
    show.stuck(found, [_verdict(one) for one in found], time.time())
    dead = [one for one in found if one.is_dead or one.run_id in ids]
    left = end_stuck(store, dead) if repair else {}
    if repair:
        show.lines([f"{len(dead) - len(left)} of {len(found)} are KILLED now."])
    roots = dict.fromkeys(one.root for one in dead if one.can_resume)
    show.lines([f"Finish: {show.command('resume', root)}" for root in roots])
    if dead and not repair:
        show.lines([f"End:    {show.command('runs', '--stuck', '--repair')}"])
    if left:
        show.lines([f"Left:   {run_id}: {why}" for run_id, why in left.items()])
        raise MechdiffError(
            f"{len(left)} of {len(dead)} runs could not be ended, for the reasons above; have that mended, "
            "or let somebody who may write them run this again."
        )


def _verdict(one: Stuck) -> str:
    if one.orphaned:
        return f"orphan: {one.orphaned}"
    if one.is_dead:
        return "dead"
    if one.owner is None:
        return "unknown: end it with --repair --id"
    return f"on {one.owner.host}: --repair watches whether it lives"
