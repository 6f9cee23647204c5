"""Commands about tracking servers: server-check."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import click

from mechdiff_mlflow.cli import show
from mechdiff_mlflow.cli.options import command
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.options import StoreOptions
from mechdiff_mlflow.spec.options import FLAG, option
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.server_check import Level, check_store, rebase
from mechdiff_mlflow.tracking.store.store import uri_of


@dataclass(frozen=True, kw_only=True)
class ServerCheckRequest(StoreOptions):
    """Say what is wrong with a tracking server or store, and what to do about it.

    Makes a scratch experiment, run and registered model there and deletes them again. The exit code is 1
    when a check fails.

    \b
    Example:
      mechdiff server-check
    """

    json: bool = option(False, FLAG, "Print one JSON object instead of a table.")
    rebase: bool = option(
        False,
        FLAG,
        "First make a SQLite store that was copied or moved say that its artifacts are here.",
    )


@command(ServerCheckRequest)
def _server_check(request: ServerCheckRequest) -> None:
    shown = redact(uri_of(request.tracking_uri))
    for old in rebase(request.tracking_uri) if request.rebase else ():
        click.echo(f"What was in {old} is where the store is now.", err=True)
    findings = check_store(request.tracking_uri)
    failed = [finding.check for finding in findings if finding.level is Level.FAIL]
    if request.json:
        checks = [{**asdict(finding), "level": finding.level.lower()} for finding in findings]
        show.lines([json.dumps({"uri": shown, "ok": not failed, "checks": checks}, indent=1)])
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            show.lines([f"{finding.level.value:4}  {finding.check:{width}}  {finding.seen}"])
            show.lines([f"{'':4}  {'':{width}}  → {finding.remedy}"] if finding.remedy else [])
    if failed:
        raise MechdiffError(f"{shown} fails {', '.join(failed)}; mend that before a team works on it.")
