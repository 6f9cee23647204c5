"""Commands about tracking servers: server-check."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.tracking.store.redaction import redact
from mechdiff_mlflow.tracking.store.server_check import Finding, Level, check_store, rebase
from mechdiff_mlflow.tracking.store.store import uri_of


@click.command("server-check")
@options.store
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option(
    "--rebase",
    "rebased",
    is_flag=True,
    help="First have a SQLite store that was copied or moved say that its artifacts are here, too.",
)
def server_check_command(tracking_uri: str | None, as_json: bool, rebased: bool) -> None:
    """Say what is wrong with a tracking server or store, and what to do about it.

    Makes a scratch experiment, run and registered model there and deletes them again. The exit code is 1
    when a check fails.

    \b
    Example:
      mechdiff server-check
    """
    shown = redact(uri_of(tracking_uri))
    for old in rebase(tracking_uri) if rebased else ():
        click.echo(f"What was in {old} is where the store is now.", err=True)
    findings = check_store(tracking_uri)
    failed = [finding.check for finding in findings if finding.level is Level.FAIL]
    if as_json:
        checks = [{**asdict(finding), "level": finding.level.lower()} for finding in findings]
        show.lines([json.dumps({"uri": shown, "ok": not failed, "checks": checks}, indent=1)])
    else:
        show.lines(_table(findings))
    if failed:
        raise MechdiffError(f"{shown} fails {', '.join(failed)}; mend that before a team works on it.")


def _table(findings: list[Finding]) -> list[str]:
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.value:4}  {finding.check:{width}}  {finding.seen}")
        lines += [f"{'':4}  {'':{width}}  → {finding.remedy}"] if finding.remedy else []
    return lines
