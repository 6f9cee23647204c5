"""What the top run of a report, atlas, profile or comparison holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechdiff_mlflow.tracking.records import RunRecord


def report_run(title: str, out: Path, written: Sequence[Path], caveats: Sequence[str]) -> RunRecord:
    """A report's files: `report.md`, `report.html` and the pictures that the Markdown shows.

    Args:
        title: Of the report.
        out: The file that was asked for.
        written: Every file of the report.
        caveats: What to doubt.
    """
    files = {}
    for path in written:
        # The Markdown names the pictures by their folder beside it.
        files[str(path.relative_to(out.parent)).replace("\\", "/")] = path
    return RunRecord(
        kind="report",
        name="report",
        files=files,
        description=f"**{title}**: open `{out.stem}.html` under Artifacts.\n\n"
        + "\n".join(f"- {caveat}" for caveat in caveats),
    )
