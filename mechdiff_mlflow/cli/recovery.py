"""After a crash: resume, and the repairing half of runs."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.untrusted import inside, is_there
from mechdiff_mlflow.tracking.runs.commands import Command, newest_of_mine, top_run, who_began
from mechdiff_mlflow.tracking.runs.stuck import Stuck, end_stuck, stuck_runs
from mechdiff_mlflow.tracking.store.store import open_store

RESUMABLE = ("run", "fit", "patch", "sweep", "report-pass", "atlas", "layers", "heads")
"""Commands that write nothing but their runs, and can be begun again from what a run's tag says."""
_LISTED = 5


@dataclass(frozen=True, slots=True)
class Resumption:
    """What a command finds in its context when it goes on with a run.

    Args:
        run_id: The run.
        has_parent: Whether results lie below that run.
        record: Name of the local record of who began it.
        trusts: Whether this user began it with a pair whose code is trusted.
    """

    run_id: str
    has_parent: bool
    record: str
    trusts: bool

    def check_trust(self, pair: str, trusts: bool) -> None:
        """Make sure that no code is run that the user did not ask for.

        Raises:
            MechdiffError: The pair's spec trusts remote code, and this user did not begin the run with that.
        """
        if trusts and not self.trusts:
            raise MechdiffError(
                f"Pair {pair[:200]!r} says trust_remote_code: true, and nothing on this machine says that "
                f"you began run {self.run_id} so; if you trust that code, run the command yourself instead "
                "of resuming."
            )


def resumption() -> Resumption | None:
    """Which run the current command goes on with, if it was started by `resume`."""
    return click.get_current_context().find_object(Resumption)


@click.command("resume")
@click.argument("parent", required=False)
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
@click.option("--yes", is_flag=True, help="Also a run, given by its id, that you did not begin here.")
@options.store
def resume_command(parent: str | None, more: tuple[str, ...], yes: bool, tracking_uri: str | None) -> None:
    """Finish what a killed or failed command left.

    PARENT is the id of its top run; by default your newest unfinished one that no process is at work on. What
    is finished stays as it is, what was computed is read from the journal, and the rest is done. MORE options
    after `--` replace the command's own, e.g. another --device.

    \b
    Example:
      mechdiff resume
    """
    from mechdiff_mlflow.cli.group import cli

    store = open_store(tracking_uri)
    if parent is not None and parent.startswith("-"):  # the first of MORE
        more, parent = (parent, *more), None
    run, others = newest_of_mine(store) if parent is None else (top_run(store, parent), [])
    if run is None:
        show.lines([_plain(_nothing_of_mine(store.shown, others))])
        return
    run_id = run.info.run_id
    if run.info.status == "FINISHED":
        show.lines([f"Run {run_id} is finished; there is nothing to resume."])
        return
    command = Command.of(run)
    known = command.begun_by(run_id)
    command.check(run, is_ours=known is not None)
    words = _validated(run_id, command.argv, more, is_ours=known is not None)
    line = shlex.join(["mechdiff", *words, *more])
    if known is None and not yes:
        raise MechdiffError(
            f"You did not begin run {run_id} on this machine ({who_began(run)}), so it is not resumed "
            f"unasked; if you want `{line}` done here for it, run {show.command('resume', run_id, '--yes')}"
        )
    show.lines([_plain(f"Resuming {run.info.run_name} (run {run_id})."), _plain(line)])
    place = () if tracking_uri is None else ("--tracking-uri", tracking_uri)
    cli.main(
        [*words, *more, *place],
        prog_name="mechdiff",
        standalone_mode=False,
        obj=Resumption(
            run_id,
            command.parent,
            record=command.record if known is not None else "",
            trusts=known is not None and known.trusts,
        ),
    )


def _nothing_of_mine(shown: str, others: Sequence[str]) -> str:
    if not others:
        return f"No run in {shown} is unfinished; there is nothing to resume."
    more = f"; and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
    are = (
        "1 run of others or from other machines is"
        if len(others) == 1
        else (f"{len(others)} runs of others or from other machines are")
    )
    return (
        f"Nothing of yours in {shown} is unfinished; {are}: {'; '.join(others[:_LISTED])}{more}. "
        f"Name one: {show.command('resume', 'RUN', '--yes')}"
    )


def _plain(text: str) -> str:
    """Text from a store on one line, without what a terminal would obey."""
    return str(MechdiffError(text)).replace("\n", "\\n")


def _validated(run_id: str, argv: Sequence[str], more: Sequence[str], *, is_ours: bool) -> list[str]:
    """A command's words as its own options understand them; what a store says is data.

    Args:
        run_id: Whose tag they are from.
        argv: The words there.
        more: What the user gives beside them, which is theirs to answer for.
        is_ours: Whether this user began it; else only what defines the numbers is taken over.

    Raises:
        MechdiffError: They are no command that is resumed, or name a file that they may not.
    """
    from mechdiff_mlflow.cli.group import cli
    from mechdiff_mlflow.cli.session import MACHINE_OPTIONS, NOT_RESUMED, words_of

    name, *rest = argv
    if name not in RESUMABLE:
        raise MechdiffError(f"Run {run_id} asks for `{name[:100]}`, which is not resumed; run it yourself.")
    command = cli.commands[name]
    declared = {word: option for option in command.params for word in option.opts}
    words = iter(rest)
    for word in words:  # as we write them: an option, then its value unless it is a flag
        option = declared.get(word)
        is_flag = isinstance(option, click.Option) and option.is_flag
        if option is None or option.name in NOT_RESUMED or (not is_flag and next(words, "--")[:2] == "--"):
            raise MechdiffError(
                f"Run {run_id} asks for `mechdiff {name}` with {word[:100]!r}, which is not taken from a "
                "store; repeat the command yourself."
            )
    try:
        context = command.make_context(name, list(rest))
        typed = command.make_context(name, list(more), resilient_parsing=True)
    except click.UsageError as error:
        raise MechdiffError(
            f"Run {run_id} asks for a `mechdiff {name}` that does not exist: {error.format_message()[:300]} "
            "Repeat the command yourself."
        ) from error
    if is_ours:
        return words_of(context, context.params, NOT_RESUMED)
    for option in command.params:
        if typed.get_parameter_source(option.name or "") is not ParameterSource.COMMANDLINE:
            _check_taken(run_id, option, str(context.params.get(option.name or "")))
    return words_of(context, context.params, {*NOT_RESUMED, *MACHINE_OPTIONS})


def _check_taken(run_id: str, option: click.Parameter, text: str) -> None:
    """Make sure that a run of somebody else does not decide about this user's files and aliases.

    Raises:
        MechdiffError: It names a file outside of the working directory, or asks for a promotion.
    """
    asks = ""
    if option.name in ("promote", "promote_best") and text != option.default:
        asks = "moves an alias"
    if option.name in ("pair", "map"):
        try:
            path = Path(text)
            if path.is_absolute() or ".." in path.parts or is_there(path):
                inside(Path.cwd(), text, "It")
        except MechdiffError:
            asks = "names a file outside of this folder"
    if asks:
        raise MechdiffError(
            f"Run {run_id}, which you did not begin on this machine, {asks} with {option.opts[0]} "
            f"{text[:200]!r}; say yourself what it is to be: {show.command('resume', run_id, '--yes')} -- "
            f"{option.opts[0]} {option.name.upper() if option.name else ''}."
        )


def list_stuck(given: dict[str, Any]) -> None:
    """Show, and if asked end, the runs that stay RUNNING for ever."""
    store = open_store(given["tracking_uri"])
    found = stuck_runs(store, watch=given["repair"])
    if unknown := set(given["id"]) - {one.run_id for one in found}:
        stuck = show.command("runs", "--stuck")
        raise MechdiffError(f"Run {min(unknown)} is not stuck; those that are: {stuck}")
    if not found:
        show.lines(["No run is stuck."])
        return
    show.stuck(found, [_verdict(one) for one in found], time.time())
    dead = [one for one in found if one.is_dead or one.run_id in given["id"]]
    left = end_stuck(store, dead) if given["repair"] else {}
    if given["repair"]:
        show.lines([f"{len(dead) - len(left)} of {len(found)} are KILLED now."])
    roots = dict.fromkeys(one.root for one in dead if one.can_resume)
    show.lines([f"Finish: {show.command('resume', root)}" for root in roots])
    if not given["repair"] and dead:
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
