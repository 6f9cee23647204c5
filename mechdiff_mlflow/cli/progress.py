"""Progress bars on long work; quiet where nobody looks at a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mechdiff_mlflow.experiments.progress import Advance, Stage


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
