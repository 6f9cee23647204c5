"""After a crash: resume, and the repairing half of runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.recovery import Command, Stuck, end_stuck, run_to_resume, stuck_runs
from mechdiff_mlflow.tracking.store import open_store

RESUMABLE = ("run", "fit", "patch", "sweep", "report-pass", "atlas", "layers", "heads")
"""Commands that write nothing but their runs, and can be begun again from what a run's tag says."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """What a command finds in its context when it goes on with a run.

    Args:
        run_id: The run.
        has_parent: Whether results lie below that run.
    """

    run_id: str
    has_parent: bool


def resumption() -> Resumption | None:
    """Which run the current command goes on with, if it was started by `resume`."""
    return click.get_current_context().find_object(Resumption)


@click.command("resume")
@click.argument("parent", required=False)
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
@options.store
def resume_command(parent: str | None, more: tuple[str, ...], tracking_uri: str | None) -> None:
    """Finish what a killed or failed command left.

    PARENT is the id of its top run; by default the newest unfinished one that no process is at work on. What
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
    run = run_to_resume(store, parent)
    if run is None:
        show.lines([f"No run in {store.shown} is unfinished; there is nothing to resume."])
        return
    run_id = run.info.run_id
    if run.info.status == "FINISHED":
        show.lines([f"Run {run_id} is finished; there is nothing to resume."])
        return
    command = Command.of(run)
    if command.argv[0] not in RESUMABLE:
        raise MechdiffError(
            f"Run {run_id} asks for `{command.argv[0]}`, which is not resumed; run it yourself."
        )
    command.check(run)
    show.lines([f"Resuming {run.info.run_name} (run {run_id})."])
    place = () if tracking_uri is None else ("--tracking-uri", tracking_uri)
    cli.main(
        [*command.argv, *more, *place],
        prog_name="mechdiff",
        standalone_mode=False,
        obj=Resumption(run_id, command.has_parent),
    )


def list_stuck(given: dict[str, Any]) -> None:
    """Show, and if asked end, the runs that stay RUNNING for ever."""
    store = open_store(given["tracking_uri"])
    found = stuck_runs(store, watch=given["repair"])
    if unknown := set(given["id"]) - {one.run_id for one in found}:
        raise MechdiffError(f"Run {min(unknown)} is not stuck; see mechdiff runs --stuck for those that are.")
    if not found:
        show.lines(["No run is stuck."])
        return
    show.stuck(found, [_verdict(one) for one in found], time.time())
    dead = [one for one in found if one.is_dead or one.run_id in given["id"]]
    left = end_stuck(store, dead) if given["repair"] else {}
    if given["repair"]:
        show.lines([f"{len(dead) - len(left)} of {len(found)} are KILLED now."])
    roots = dict.fromkeys(one.root for one in dead if one.can_resume)
    show.lines([f"Finish: mechdiff resume {root}" for root in roots])
    if not given["repair"] and dead:
        show.lines(["End:    mechdiff runs --stuck --repair"])
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
