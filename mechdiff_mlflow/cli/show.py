"""Progress bars, final tables, and the commands to look further."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import click
import pandas as pd
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mechdiff_mlflow.experiments import FitRecord, PatchRecord
from mechdiff_mlflow.experiments.adapting import AdapterRecord
from mechdiff_mlflow.experiments.progress import Advance, Stage
from mechdiff_mlflow.experiments.steering import Steered
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.measures.bootstrap import Interval
from mechdiff_mlflow.report import wording
from mechdiff_mlflow.report.adapter import CLOSENESS_HEADS, closeness_rows, headline, leak_lines
from mechdiff_mlflow.report.document import Document, Grid
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
LINE_S = 60.0
"""Between two lines on progress where there is no terminal."""


def _console() -> Console:
    """Standard output; wide where it is no terminal, so that logs keep whole rows."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, soft_wrap=False)


def _cell(text: object) -> Text:
    """A text as it is: no markup, nothing that a terminal obeys."""
    return Text(plain(str(text)))


def _table(*heads: str, title: str = "", **options: Any) -> Table:
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=_cell(title) if title else None, title_justify="left", **look, **options)
    for head in heads:
        table.add_column(_cell(head), overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*map(_cell, cells))


def _print(table: Table, keep: int) -> None:
    """Print a table whose cells are never cut.

    On a terminal without room the last columns go, down to `keep`, then cells take several lines; elsewhere
    rows are as long as they need.
    """
    console, left_out = _console(), list[str]()
    unbounded = console.options.update(max_width=10_000)
    for column in table.columns:  # an interval may take two lines, a name or a number one
        column.no_wrap = not any(" " in str(cell) for cell in (column.header, *column.cells))
    if not console.is_terminal:
        console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
    while len(table.columns) > keep and Measurement.get(console, unbounded, table).maximum > console.width:
        left_out.insert(0, str(table.columns.pop().header))
    if Measurement.get(console, unbounded, table).minimum > console.width:
        for column in table.columns:
            column.no_wrap = False
    console.print(table)
    if left_out:
        lines([f"No room for {', '.join(left_out)}; a wider terminal or a pipe shows all columns."])


def fits(records: Sequence[FitRecord], pair: str) -> None:
    """Print fitted maps."""
    table = _table("site", "k", "α", "ρ val", "cos val", "solver", "family", "off span", title=pair)
    for fit in records:
        cell, quality = fit.cell, (_number(fit.rho), _number(fit.cos_mean))
        _row(table, cell.site, cell.rank, cell.alpha, *quality, cell.solver, cell.family, fit.off_span)
    _print(table, keep=5)


def patches(records: Sequence[PatchRecord], pair: str) -> None:
    """Print patches with their controls."""
    first = records[0]
    title = f"{pair}, {first.n} {first.split} prompts, KL in nats, 95 % bootstrap intervals"
    table = _table(
        "site", "k", "α", "KL_raw", "KL_mapped", "drop %", "skill %", "null", "floor", "ρ", title=title
    )
    for _, names in groupby(records, key=lambda patch: id(patch.per_prompt)):  # of one place, measured once
        patch, *others = names
        site = " = ".join(str(one.cell.site) for one in (patch, *others))
        cell, kls = patch.cell, (_number(patch.kl_raw), _number(patch.kl_mapped))
        drop = _interval(patch.drop_pct, patch.undefined.get("drop_pct", ""))
        skill = _interval(patch.skill_pct, patch.undefined.get("skill_pct", ""))
        floor = f"{patch.noise_floor:.1g}"
        _row(table, site, cell.rank, cell.alpha, *kls, drop, skill, patch.null, floor, _number(patch.rho))
    _print(table, keep=7)
    if len(records) == 1:
        controls = sorted(first.controls.items(), key=lambda item: item[1])
        lines(["Controls (mean KL): " + ", ".join(f"{name} {_number(kl)}" for name, kl in controls)])
        p_values = {
            "than raw": first.p_raw,
            f"than {first.null}": first.p_null,
            "than maps of shuffled pairs": first.p_permutation,
        }
        tested = [f"{name} {_number(p)}" for name, p in p_values.items() if p is not None]
        if tested:
            lines(["One-sided p-value of KL_mapped being no lower: " + ", ".join(tested)])
    _answers(records)
    for text in dict.fromkeys(selection.sentence(patch.leak) for patch in records):
        lines([f"{text}. For a number without that, {selection.REMEDY}."] if text else [])
    if len(records) == 1:
        sentences(wording.transport(of_record(first)))


def _answers(records: Sequence[PatchRecord]) -> None:
    """Print what whole answers say, where they were compared."""
    found = [(patch, patch.answer) for patch in records if patch.answer is not None]
    if not found:
        return
    first = found[0][1]
    title = f"answers of up to {first.n_tokens} tokens, patched at {first.patch_at}; KL in nats an answer"
    table = _table("site", "k", "α", "KL_answer_raw", "KL_answer_mapped", "drop %", "skill %", title=title)
    for patch, answer in found:
        drop = _interval(answer.drop_pct, answer.undefined.get("drop_answer_pct", ""))
        skill = _interval(answer.skill_pct, answer.undefined.get("skill_answer_pct", ""))
        kls = _number(answer.kl_raw), _number(answer.kl_mapped)
        _row(table, patch.cell.site, patch.cell.rank, patch.cell.alpha, *kls, drop, skill)
    _print(table, keep=7)
    if first.tasks:
        table = _table("measure", "n", "base", "tuned", "raw", "mapped", "null", "recovered %")
        for task in first.tasks:
            means = [_number(task.means.get(who)) for who in ("base", "tuned", "raw", "mapped", "null")]
            recovered = _interval(task.recovered_pct, "nothing to recover")
            _row(table, task.measure, task.n, *means, recovered)
        _print(table, keep=8)


def continuations(rows: Sequence[Steered], title: str) -> None:
    """Print what the models say, side by side."""
    heads = ("prompt", "base", "tuned (clean)", "raw patch", "mapped patch", "KL raw", "KL mapped")
    table = _table(
        *heads, title=title, caption="greedy; KL(patched ‖ clean) of the first token, nats", show_lines=True
    )
    for row in rows:
        texts = [row.prompt, row.base, row.clean, "n/a" if row.raw is None else row.raw, row.mapped]
        _row(table, *texts, _number(row.kl_raw), _number(row.kl_mapped))
    _print(table, keep=len(heads))


def adapter(record: AdapterRecord, folder: Path) -> None:
    """Print what was written and what it achieves."""
    kind = "a hook module" if record.rank is None else f"a PEFT LoRA of rank {record.rank}"
    at = f"on {record.target}, α = {text_of(record.alpha)}"
    lines([f"{folder} is {kind} {at}; its README.md says how to load it."])
    sentences(headline(record))
    if not record.closeness:
        return
    title = f"{record.n} {record.split} prompts, 95 % bootstrap intervals"
    table = _table(*CLOSENESS_HEADS, title=title)
    for cells in closeness_rows(record):
        _row(table, *cells)
    _print(table, keep=len(CLOSENESS_HEADS))
    lines(leak_lines(record))


def frame(table: pd.DataFrame) -> None:
    """Print a table as it is."""
    shown = _table(*map(str, table.columns))
    for row in table.itertuples(index=False):
        _row(shown, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    _print(shown, keep=4)


def document(document: Document) -> None:
    """Print what a document says before its caveats: sentences, and tables as such."""
    lines([document.title])
    for block in takewhile(lambda block: block != "## Caveats", document.blocks):
        if isinstance(block, Grid):
            table = _table(*block.heads)
            for row in block.rows:
                _row(table, *(wording.plain(row[head]) for head in block.heads))
            _print(table, keep=3)
        elif isinstance(block, str):
            sentences(block.removeprefix("## "))


def winners(versions: Sequence[Version]) -> None:
    """Print registered maps that an alias points to."""
    if not versions:
        lines([f"No map has an alias yet; promote one with {command('promote', 'RUN')}"])
        return
    heads = ("map", "version", "aliases", "k", "α", "drop %", "skill %", "verified", "solver", "run")
    table = _table(*heads)
    for version in versions:
        tags = version.tags
        texts = [tags.get(key, "n/a") for key in ("k", "alpha")]
        try:
            numbers = [
                _number(foreign.number(tags, key) if key in tags else None)
                for key in ("drop_pct", "skill_pct")
            ]
        except foreign.Malformed as error:
            foreign.left_out(f"map {version}", error)
            continue
        names = [version.name, str(version.number), ", ".join(version.aliases)]
        solver, verified = tags.get("solver", "n/a"), "yes" if version.is_verified else "no"
        _row(table, *names, *texts, *numbers, verified, solver, version.run_id)
    _print(table, keep=3)


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
    _print(table, keep=7)


def map_diff(found: MapDiff) -> None:
    """Print what two registered maps differ in."""
    table = _table("", str(found.a), str(found.b))
    for key, pair in found.facts.items():
        _row(table, key, *("n/a" if text is None else text for text in pair))
    for what, cosine in (("cosine of W", found.cosine_weight), ("cosine of W − I", found.cosine_update)):
        _row(table, what, "", "n/a" if cosine is None else f"{cosine:.6f}")
    _print(table, keep=3)


def found_runs(found: Sequence[FoundRun]) -> None:
    """Print runs in the order given."""
    metric = found[0].metric
    heads = ("run", "site", metric, "95 % interval", "k", "α", "pair", "n", "split", "leak", "solver")
    table = _table(*heads)
    for run in found:
        k, alpha, n, split, solver = (
            run.settings.get(key, "n/a") for key in ("k", "alpha", "n", "split", "solver")
        )
        interval = "" if run.low is None or run.high is None else f"{run.low:.4g} to {run.high:.4g}"
        leak = "unknown" if run.leak is None else "yes" if run.leak else "no"
        shown = (run.run_id, run.site, _number(run.value), interval)
        _row(table, *shown, k, alpha, run.pair, n, split, leak, solver)
    _print(table, keep=3)


def stuck(found: Sequence[Stuck], verdicts: Sequence[str], now_s: float) -> None:
    """Print runs that stay RUNNING."""
    table = _table("run", "name", "experiment", "for", "written by", "verdict")
    for one, verdict in zip(found, verdicts, strict=True):
        minutes = max(0, now_s - one.started_ms / 1000) / 60
        age = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
        _row(table, one.run_id, one.name, one.experiment, age, one.owner or "not said", verdict)
    _print(table, keep=6)


@contextlib.contextmanager
def bars() -> Iterator[Stage]:
    """A stage for experiments: a bar for each name on standard error, or a line a minute."""
    text, bar, _, left = Progress.get_default_columns()
    columns = (text, bar, MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), left)
    tasks: dict[str, TaskID] = {}
    done = threading.Event()
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:

        @contextlib.contextmanager
        def stage(name: str, total: int) -> Iterator[Advance]:
            if name in tasks:
                progress.reset(tasks[name], total=total)
            else:
                tasks[name] = progress.add_task(name, total=total)
            task = tasks[name]
            yield lambda steps: progress.update(task, advance=steps)
            progress.update(task, completed=total)

        def tell() -> None:
            while not done.wait(LINE_S):
                for task in progress.tasks:
                    if not task.finished:
                        so_far = f"{task.description}: {task.completed:.0f} of {task.total:.0f}"
                        click.echo(plain(f"{so_far}, {task.elapsed or 0:.0f} s"), err=True)

        if progress.disable:
            threading.Thread(target=tell, daemon=True).start()
        try:
            yield stage
        finally:
            done.set()


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
    return wording.percent(interval)
