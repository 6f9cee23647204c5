"""What commands cost in a store of 300 and of 3,000 cells, when they show the same number of rows.

    python -m benchmarks.growth --out benchmarks/results/growth.md

Two small sweeps on the shipped pairs are run once; then their rows are copied in the database, as if the
sweeps had been repeated until there are so many cells (`sweeps`), or as if one had had so many (`one sweep`).
Commands run in this process on copies of that store, directly and through `mlflow server` behind a proxy that
counts: the median of some times, after one that is not counted. Imports are not in it. Seconds are of this
process's CPU, which others on the machine do not change much; a server's own are not in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from faults.proxy import proxying
from tracking.servers import serving

from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.tracking.store.store import PLACE_TAG

PAIRS = ("cultural-demo", "cognitive-demo")
SWEEP = ("--sites", "L26/attn_out,L24/resid_post", "--ranks", "1,8,full", "--alphas", "0.3")
COMMANDS = {
    "runs": ("runs",),
    "runs --best": ("runs", "--best"),
    "report": ("report", "--out", "r.md"),
    "compare": ("compare", *PAIRS, "--out", "c.md"),
}
CELLS = (300, 3000)
TIMES = 3
LAYOUTS = ("sweeps", "one sweep")


@dataclass(frozen=True)
class Cost:
    """Of one command.

    Args:
        seconds: Median CPU time of this process.
        requests: That a server got; 0 without one.
        mib: That it answered with.
    """

    seconds: float
    requests: int = 0
    mib: float = 0.0


def base_store(folder: Path) -> None:
    """A store with one sweep of each shipped pair."""
    for pair in PAIRS:
        invoke(f"sqlite:///{folder / 'mlflow.db'}", folder, "sweep", "--pair", pair, *SWEEP)


def invoke(uri: str, folder: Path, *words: str) -> None:
    """A command in this process; its failure is ours."""
    before = Path.cwd()
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        result = CliRunner().invoke(cli, list(words), prog_name="mechdiff")
    finally:
        os.chdir(before)
    if result.exit_code:
        raise RuntimeError(f"mechdiff {' '.join(words)}: {result.output} {result.exception!r}")


def grow(database: Path, n_cells: int, layout: str) -> int:
    """Copy sweeps (or their cells alone) until there are at least so many cells; how many there are."""
    with closing(sqlite3.connect(database)) as db, db:
        parents = _ids(db, "sweep")
        cells = {parent: _below(db, parent) for parent in parents}
        n = sum(map(len, cells.values()))
        while n < n_cells:
            for parent, ids in cells.items():
                above = parent if layout == "one sweep" else _copy(db, parent)
                for run_id in ids:
                    _copy(db, run_id, {"mlflow.parentRunId": above, "mechdiff.root": above})
                n += len(ids)
        # It lies here now, and its files where they are.
        db.execute("UPDATE experiment_tags SET value = ? WHERE key = ?", (str(database), PLACE_TAG))
        db.execute("ANALYZE")
    return n


def _ids(db: sqlite3.Connection, kind: str) -> list[str]:
    where = "SELECT run_uuid FROM tags WHERE key = 'mechdiff.kind' AND value = ?"
    return [row[0] for row in db.execute(where, (kind,))]


def _below(db: sqlite3.Connection, parent: str) -> list[str]:
    where = "SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId' AND value = ?"
    return [row[0] for row in db.execute(where, (parent,))]


def _copy(db: sqlite3.Connection, run_id: str, tags: dict[str, str] | None = None) -> str:
    """All rows of a run once more, under another id; its files are those of the first."""
    new = uuid.uuid4().hex
    for table in ("runs", "params", "tags", "metrics", "latest_metrics"):
        _copy_rows(db, table, "run_uuid", run_id, {"run_uuid": new})
    for (given,) in db.execute(
        "SELECT input_uuid FROM inputs WHERE destination_id = ?", (run_id,)
    ).fetchall():
        other = uuid.uuid4().hex
        _copy_rows(db, "inputs", "input_uuid", given, {"input_uuid": other, "destination_id": new})
        _copy_rows(db, "input_tags", "input_uuid", given, {"input_uuid": other})
    for key, value in (tags or {}).items():
        db.execute("UPDATE tags SET value = ? WHERE key = ? AND run_uuid = ?", (value, key, new))
    return new


def _copy_rows(db: sqlite3.Connection, table: str, key: str, value: str, other: dict[str, str]) -> None:
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    given = ", ".join(f"'{other[name]}'" if name in other else name for name in columns)
    db.execute(
        f"INSERT INTO {table} ({', '.join(columns)}) SELECT {given} FROM {table} WHERE {key} = ?", (value,)
    )


@contextmanager
def answering(folder: Path, *, served: bool) -> Iterator[tuple[str, list[int]]]:
    """The URI of the store in a folder, and the sizes of a server's answers so far."""
    if not served:
        yield f"sqlite:///{folder / 'mlflow.db'}", []
        return
    with serving(folder) as server, proxying(server.url) as proxy:
        yield proxy.url, proxy.sizes


def measured(base: Path, n_cells: int, layout: str, *, served: bool, times: int = TIMES) -> dict[str, Cost]:
    """What each command costs in such a store."""
    with tempfile.TemporaryDirectory(prefix="mechdiff-growth-") as temporary:
        folder = Path(temporary)
        shutil.copy(base / "mlflow.db", folder)
        grow(folder / "mlflow.db", n_cells, layout)
        found = {}
        with answering(folder, served=served) as (uri, sizes):
            for name, words in COMMANDS.items():
                invoke(uri, folder, *words)
                seconds = []
                for _ in range(times):
                    sizes.clear()
                    start = time.process_time()
                    invoke(uri, folder, *words)
                    seconds.append(time.process_time() - start)
                found[name] = Cost(statistics.median(seconds), len(sizes), sum(sizes) / 2**20)
    return found


def table(layout: str, served: bool, costs: Sequence[dict[str, Cost]]) -> str:
    """Markdown, one row a command."""
    where = "through `mlflow server`" if served else "SQLite file"
    lines = [f"## {layout}, {where}", ""]
    lines.append(f"| command | {' | '.join(f'{n:,} cells' for n in CELLS)} | ratio |")
    lines.append(f"| --- | {'--- | ' * len(CELLS)}--- |")
    for name in COMMANDS:
        one, other = costs[0][name], costs[-1][name]
        texts = [
            f"{c.seconds:.2f} s" + (f", {c.requests} requests, {c.mib:.1f} MiB" if served else "")
            for c in (one, other)
        ]
        lines.append(f"| `{name}` | {' | '.join(texts)} | {other.seconds / one.seconds:.1f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--base", type=Path, help="A folder with the store of an earlier call, or to make it in."
    )
    parser.add_argument("--times", type=int, default=TIMES)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    given = parser.parse_args()
    parts = ["# Growth", "", (__doc__ or "").partition("\n\n")[2].strip(), ""]
    with tempfile.TemporaryDirectory(prefix="mechdiff-growth-") as temporary:
        base = given.base or Path(temporary)
        base.mkdir(exist_ok=True)
        if not (base / "mlflow.db").exists():
            base_store(base)
        for layout in given.layouts:
            for served in (False, True):
                costs = [measured(base, n, layout, served=served, times=given.times) for n in CELLS]
                parts.append(table(layout, served, costs))
                print(parts[-1], flush=True)
                if given.out:  # each as it comes
                    given.out.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
