"""Progress bars, final tables, and the commands to look further."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pandas as pd
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mechdiff_mlflow.experiments import FitRecord, PatchRecord
from mechdiff_mlflow.experiments.adapting import AdapterRecord
from mechdiff_mlflow.experiments.progress import Advance, Stage
from mechdiff_mlflow.experiments.steering import Steered
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.measures.stats import Interval
from mechdiff_mlflow.report import wording
from mechdiff_mlflow.report.adapter import CLOSENESS_HEADS, closeness_rows, leak_lines
from mechdiff_mlflow.report.evidence import of_record
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.text import plain, text_of
from mechdiff_mlflow.tracking.content.view import ui_command, view_url
from mechdiff_mlflow.tracking.registry.compare import MapDiff
from mechdiff_mlflow.tracking.registry.moves import Move
from mechdiff_mlflow.tracking.registry.versions import Version
from mechdiff_mlflow.tracking.runs.search import FoundRun
from mechdiff_mlflow.tracking.runs.stuck import Stuck
from mechdiff_mlflow.tracking.store.store import Store, command_on

_PIPE_WIDTH = 160


def _console() -> Console:
    """Standard output; wide where it is no terminal, so that logs keep whole rows."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, soft_wrap=False)


def _cell(text: object) -> Text:
    """A text as it is: no markup, nothing that a terminal obeys."""
    return Text(plain(str(text)))


def _table(*heads: str, title: str = "", **options: Any) -> Table:
    table = Table(title=_cell(title) if title else None, **options)
    for head in heads:
        table.add_column(_cell(head))
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*map(_cell, cells))


def fits(records: Sequence[FitRecord], pair: str) -> None:
    """Print fitted maps."""
    table = _table("site", "solver", "family", "k", "α", "off span", "ρ val", "cos val", title=pair)
    for fit in records:
        cell, quality = fit.cell, (_number(fit.rho), _number(fit.cos_mean))
        _row(table, cell.site, cell.solver, cell.family, cell.rank, cell.alpha, fit.off_span, *quality)
    _console().print(table)


def patches(records: Sequence[PatchRecord], pair: str) -> None:
    """Print patches with their controls."""
    first = records[0]
    title = f"{pair}, {first.n} {first.split} prompts, KL in nats, 95 % bootstrap intervals"
    table = _table(
        "site", "k", "α", "KL_raw", "KL_mapped", "drop %", "skill %", "null", "floor", "ρ", title=title
    )
    for patch in records:
        cell, kls = patch.cell, (_number(patch.kl_raw), _number(patch.kl_mapped))
        drop = _interval(patch.drop_pct, patch.undefined.get("drop_pct", ""))
        skill = _interval(patch.skill_pct, patch.undefined.get("skill_pct", ""))
        floor = f"{patch.noise_floor:.1g}"
        _row(
            table, cell.site, cell.rank, cell.alpha, *kls, drop, skill, patch.null, floor, _number(patch.rho)
        )
    _console().print(table)
    if len(records) == 1:
        controls = sorted(first.controls.items(), key=lambda item: item[1])
        lines(["Controls (mean KL): " + ", ".join(f"{name} {_number(kl)}" for name, kl in controls)])
        p_values = {
            "than raw": first.p_sign_flip,
            f"than {first.null}": first.p_null,
            "than maps of shuffled pairs": first.p_permutation,
        }
        tested = [f"{name} {_number(p)}" for name, p in p_values.items() if p is not None]
        if tested:
            lines(["One-sided p-value of KL_mapped being no lower: " + ", ".join(tested)])
    for text in dict.fromkeys(selection.sentence(patch.leak) for patch in records):
        lines([f"{text}. For a number without that, {selection.REMEDY}."] if text else [])
    if len(records) == 1:
        sentences(wording.transport(of_record(first)))


def continuations(rows: Sequence[Steered], title: str) -> None:
    """Print what the models say, side by side."""
    heads = ("prompt", "base", "tuned (clean)", "raw patch", "mapped patch", "KL raw", "KL mapped")
    table = _table(
        *heads, title=title, caption="greedy; KL(patched ‖ clean) of the first token, nats", show_lines=True
    )
    for row in rows:
        texts = [row.prompt, row.base, row.clean, "n/a" if row.raw is None else row.raw, row.mapped]
        _row(table, *texts, _number(row.kl_raw), _number(row.kl_mapped))
    _console().print(table)


def adapter(record: AdapterRecord, folder: Path) -> None:
    """Print what was written and what it achieves."""
    kind = "a hook module" if record.rank is None else f"a PEFT LoRA of rank {record.rank}"
    at = f"on {record.target}, α = {text_of(record.alpha)}"
    lines([f"{folder} is {kind} {at}; its README.md says how to load it."])
    if not record.closeness:
        lines(["Not measured: base and tuned have different vocabularies."])
        return
    title = f"{record.n} {record.split} prompts, 95 % bootstrap intervals"
    table = _table(*CLOSENESS_HEADS, title=title)
    for cells in closeness_rows(record):
        _row(table, *cells)
    _console().print(table)
    lines(leak_lines(record))


def frame(table: pd.DataFrame) -> None:
    """Print a table as it is."""
    shown = _table(*map(str, table.columns))
    for row in table.itertuples(index=False):
        _row(shown, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    _console().print(shown)


def winners(versions: Sequence[Version]) -> None:
    """Print registered maps that an alias points to."""
    if not versions:
        lines([f"No map has an alias yet; promote one with {command('promote', 'RUN')}"])
        return
    table = _table("map", "version", "aliases", "solver", "k", "α", "drop %", "skill %", "verified", "run")
    for version in versions:
        tags = version.tags
        texts = [tags.get(key, "n/a") for key in ("solver", "k", "alpha")]
        try:
            numbers = [
                _number(foreign.number(tags, key) if key in tags else None)
                for key in ("drop_pct", "skill_pct")
            ]
        except foreign.Malformed as error:
            foreign.left_out(f"map {version}", error)
            continue
        names = [version.name, str(version.number), ", ".join(version.aliases)]
        _row(table, *names, *texts, *numbers, "yes" if version.is_verified else "no", version.run_id)
    _console().print(table)


def moves(made: Sequence[Move], name: str, alias: str) -> None:
    """Print the history of an alias, oldest first."""
    if not made:
        lines([f"No version of {name} has ever been @{alias}."])
        return
    table = _table("when (UTC)", "who", "action", "from", "to", "rules", "why", title=f"{name}@{alias}")
    for move in made:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(move.when_ms / 1000)) if move.when_ms else "?"
        ends = ["none" if number is None else str(number) for number in (move.source, move.target)]
        _row(table, when, move.who or "?", move.action, *ends, move.rules, move.why)
    _console().print(table)


def map_diff(found: MapDiff) -> None:
    """Print what two registered maps differ in."""
    table = _table("", str(found.a), str(found.b))
    for key, pair in found.facts.items():
        _row(table, key, *("n/a" if text is None else text for text in pair))
    for what, cosine in (("cosine of W", found.cosine_weight), ("cosine of W − I", found.cosine_update)):
        _row(table, what, "", "n/a" if cosine is None else f"{cosine:.6f}")
    _console().print(table)


def found_runs(found: Sequence[FoundRun]) -> None:
    """Print runs in the order given."""
    metric = found[0].metric
    table = _table("pair", "site", "solver", "k", "α", "split", "n", metric, "95 % interval", "leak", "run")
    for run in found:
        settings = [run.settings.get(key, "n/a") for key in ("solver", "k", "alpha", "split", "n")]
        interval = "" if run.low is None or run.high is None else f"{run.low:.4g} to {run.high:.4g}"
        leak = "unknown" if run.leak is None else "yes" if run.leak else "no"
        _row(table, run.pair, run.site, *settings, _number(run.value), interval, leak, run.run_id)
    _console().print(table)


def stuck(found: Sequence[Stuck], verdicts: Sequence[str], now_s: float) -> None:
    """Print runs that stay RUNNING."""
    table = _table("run", "name", "experiment", "for", "written by", "verdict")
    for one, verdict in zip(found, verdicts, strict=True):
        minutes = max(0, now_s - one.started_ms / 1000) / 60
        age = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
        _row(table, one.run_id, one.name, one.experiment, age, one.owner or "not said", verdict)
    _console().print(table)


@contextlib.contextmanager
def bars() -> Iterator[Stage]:
    """A stage for experiments that draws one bar a stretch of work on standard error."""
    text, bar, _, left = Progress.get_default_columns()
    columns = (text, bar, MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), left)
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:

        @contextlib.contextmanager
        def stage(name: str, total: int) -> Iterator[Advance]:
            task = progress.add_task(name, total=total)
            yield lambda steps: progress.update(task, advance=steps)
            progress.update(task, completed=total)

        yield stage


def where_to_look(store: Store, experiment_id: str, *commands: str) -> None:
    """Print how to open the experiment in MLflow's UI, and more commands."""
    url, look = view_url(store, experiment_id), ui_command(store)
    lines([f"Look:  {look}", f"Then:  {url}", *commands] if look else [f"Look:  {url}", *commands])


def command(*words: object) -> str:
    """A command of ours to type, quoted for a shell, on the store that the present one was given."""
    uri = click.get_current_context().params.get("tracking_uri")
    return command_on(uri or os.environ.get("MLFLOW_TRACKING_URI"), *words)


def lines(texts: Sequence[str]) -> None:
    """Print plain lines."""
    for text in texts:
        _console().print(plain(text), markup=False, soft_wrap=True)


def sentences(text: str) -> None:
    """Print lines of Markdown without its marks."""
    lines(wording.plain(text).splitlines())


def warn(text: str) -> None:
    """Print what the user must not miss, on standard error."""
    click.echo(plain(f"Warning: {text}."), err=True)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"


def _interval(interval: Interval | None, why: str) -> str:
    if interval is None or interval.estimate is None:
        return f"n/a ({why.partition(':')[0]})"
    bounds = "" if interval.low is None else f" [{interval.low:.1f}, {interval.high:.1f}]"
    return f"{interval.estimate:.1f}{bounds}"
