"""What one cell of a sweep leaves in MLflow and costs the driver, by doing it.

    python -m benchmarks.scale --probe

Two sweeps of a toy pair into SQLite: the difference of the table counts over the difference of the cells is
what a cell adds, the rest is what a sweep adds. Then, on random rows of a real width, the statistics of one
cell; CPU seconds of one thread.
"""

from __future__ import annotations

import json
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from click.testing import CliRunner

from mechdiff_mlflow import controls
from mechdiff_mlflow.cli import cli
from mechdiff_mlflow.experiments.rows import IDENTITY, RAW, Patched, SiteRows
from mechdiff_mlflow.experiments.summary import summarise
from mechdiff_mlflow.maps import AffineMap, Weight
from mechdiff_mlflow.prompts import Prompt, PromptSet
from mechdiff_mlflow.sites import Site
from mechdiff_mlflow.spec import Alpha, Cell, Rank

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

from toy import write_pair

GROWS = {"map.pt", "probe.safetensors", "per_prompt.json", "input_example.json", "serving_input_example.json"}
"""Artifacts of a cell whose size follows from the pair and the prompts; the others are as they are."""

SWEEPS = (("L3/resid_post", "1,4", "1"), ("L2/attn_out,L3/resid_post", "1,4", "0.5,1"))
"""Sites, ranks and scales: 2 cells, then 8."""

TABLES = ("runs", "params", "metrics", "latest_metrics", "tags", "inputs", "input_tags")
MODEL_TABLES = tuple(f"logged_model{end}" for end in ("s", "_metrics", "_params", "_tags"))


@dataclass(frozen=True)
class Probe:
    """What was counted and timed.

    Args:
        rows_per_cell: By table.
        rows_per_sweep: By table; what the parent adds.
        files_per_cell: Artifact files.
        fixed_bytes_per_cell: Of the artifacts that do not grow with the pair or the prompts.
        control_builds_per_site: How often a sweep builds all controls of a site.
        bytes_per_prompt: Of the per-prompt table, the prompt's own text apart.
        database_bytes_per_cell: Growth of the SQLite file.
        statistics_s: CPU seconds of one cell's statistics, 1000 prompts of width 8192.
        load: Load average before, of so many cores.
        cores: Of the machine.
    """

    rows_per_cell: dict[str, float]
    rows_per_sweep: dict[str, float]
    files_per_cell: float
    fixed_bytes_per_cell: float
    control_builds_per_site: float
    bytes_per_prompt: float
    database_bytes_per_cell: float
    statistics_s: float
    load: float
    cores: int

    @classmethod
    def load_from(cls, path: Path) -> Probe:
        """What `save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def probe() -> Probe:
    """Do it all: half a minute."""
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        tracked = tracked_sweeps(Path(folder))
    return Probe(
        **tracked,
        statistics_s=cpu_seconds(statistics_of_a_cell(1000, 8192), 3),
        load=load,
        cores=os.cpu_count() or 1,
    )


def tracked_sweeps(folder: Path) -> dict[str, object]:
    """Two real sweeps into a new store in `folder`, and what each cell left."""
    pair = write_pair(folder / "toy")
    at, builds = [_state(folder)], 0
    for sites, ranks, alphas in SWEEPS:
        words = ["--sites", sites, "--ranks", ranks, "--alphas", alphas, "--targets", "30"]
        database = f"sqlite:///{folder / 'mlflow.db'}"
        command = ["sweep", "--pair", str(pair), "--tracking-uri", database, *words]
        # The store puts its artifacts into the working directory.
        with chdir(folder), patch.object(controls, "control_map", wraps=controls.control_map) as built:
            done = CliRunner().invoke(cli, command, catch_exceptions=False)
        builds += built.call_count
        if done.exit_code != 0:
            raise SystemExit(f"The toy sweep failed: {done.output}")
        at.append(_state(folder))
    first, second = at[1], at[2]
    small, large = first["logged_models"], second["logged_models"] - first["logged_models"]
    per_cell, per_sweep = {}, {}
    for table in (*TABLES, *MODEL_TABLES):
        slope = (second[table] - 2 * first[table]) / (large - small)
        per_cell[table] = slope
        per_sweep[table] = first[table] - small * slope
    n_cells = small + large
    n_sites = sum(len(sites.split(",")) for sites, _, _ in SWEEPS)
    files = list((folder / "mlartifacts").rglob("*"))
    of_cells = [f for f in files if f.is_file() and not _of_parent(f)]
    tables = [f.stat().st_size for f in of_cells if f.name == "per_prompt.json"]
    n_test, text = 16, 25
    return {
        "rows_per_cell": per_cell,
        "rows_per_sweep": per_sweep,
        "files_per_cell": len(of_cells) / n_cells,
        "fixed_bytes_per_cell": sum(f.stat().st_size for f in of_cells if f.name not in GROWS) / n_cells,
        "control_builds_per_site": builds / len(controls.CONTROLS) / n_sites,
        "bytes_per_prompt": statistics.mean(tables) / n_test - text,
        "database_bytes_per_cell": (second["bytes"] - first["bytes"]) / large,
    }


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    """`contextlib.chdir`, which Python 3.10 lacks."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _of_parent(file: Path) -> bool:
    return file.name in ("figures.html", "summary.json", "least_ranks.json") or file.suffix == ".png"


def _state(folder: Path) -> dict[str, int]:
    path = folder / "mlflow.db"
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path)) as database:
        counts = {
            table: database.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
            for table in (*TABLES, *MODEL_TABLES)
        }
    return {**counts, "bytes": path.stat().st_size}


def cpu_seconds(work: Callable[[], object], rounds: int) -> float:
    """Median, after a warm-up."""
    work()
    found = []
    for _ in range(rounds):
        begun = time.process_time()
        work()
        found.append(time.process_time() - begun)
    return statistics.median(found)


def statistics_of_a_cell(n: int, d: int) -> Callable[[], object]:
    """What `Study.patch` does for each cell once its rows are scored."""
    numbers, where = np.random.default_rng(0), Site.parse("L3/attn_out")

    def patched(size: float) -> Patched:
        return Patched(*(size * numbers.exponential(1, n) for _ in range(4)))

    x, y = (torch.from_numpy(numbers.standard_normal((n, d))).bfloat16() for _ in range(2))
    labels = (RAW, "mapped", *controls.CONTROLS)
    scored = {IDENTITY: patched(1e-6), **{label: patched(1.0) for label in labels}}
    rows = SiteRows(where, {where: x}, {where: y}, scored)
    left, right = (torch.from_numpy(numbers.standard_normal(shape)) for shape in ((d, 8), (8, d)))
    map_ = AffineMap(left.new_zeros(d), left.new_zeros(d), Weight.low_rank(left, right, 1.0))
    prompts = PromptSet(
        "test", tuple(Prompt(({"role": "user", "content": f"prompt {i}"},)) for i in range(n))
    )
    return lambda: summarise(
        Cell(where, "reduced_rank", "update", Rank(8), Alpha((1.0,))),
        map_,
        rows,
        label="mapped",
        controls={name: (name,) for name in controls.CONTROLS},
        null="zero",
        prompts=prompts,
        leak=(),
        seed=0,
        n_resamples=2000,
        seconds=0.0,
    )
