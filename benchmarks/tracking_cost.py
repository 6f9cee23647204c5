"""What tracking a sweep costs, against the fluent calls that a user would write for the same content.

    python -m benchmarks.tracking_cost --out benchmarks/results/tracking-cost.md

The records are those of a real sweep on the demo pair: 10 sites × 10 ranks × 2 scales, each cell with its
params, metrics, tags, three prompt sets, tables, spec, environment and map, and a parent with curves and the
best cell. They are made once, then logged to each store

(ours) as `mechdiff sweep` does, by `Tracker` and `OpenRun.log_soon`;
(fluent) by `mlflow.start_run(nested=True)`, `log_param`, `log_metric`, `set_tag`, `log_input`, `log_table`
    and `log_text` one by one, the map by `mlflow.pyfunc.log_model` with its requirements given, which spares
    the naive side MLflow's slow inference of them;
(fluent, map as file) the same with the map by `log_artifact`, which is no model: it can neither be
    registered nor served.

The ways take turns, every time in a new experiment, since the machine may be busy with other things. A cell
of the fluent ways costs as much as the next, so they log a sample of the cells. Everything is in seconds of
wall clock; what was stored is compared before a number is believed.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import sqlalchemy
import torch
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.models import ModelSignature
from mlflow.types.schema import Schema, TensorSpec

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from team.postgres import postgres
from team.server import serve

from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.sweep import SweepSite, cells_of, least_ranks
from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.spec.pair_spec import PairSpec, Rank
from mechdiff_mlflow.tracking.content import fields
from mechdiff_mlflow.tracking.content.records import RunRecord, param_text
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import Store, open_store

SITES = tuple(f"L{layer}/{hook}" for layer in range(24, 29) for hook in ("attn_out", "resid_post"))
RANKS = ("1", "2", "4", "8", "12", "16", "24", "32", "48", "full")
ALPHAS = (0.5, 1.0)
N_TRAIN = 80
"""Fewer than the width, as on an 8B model: val then chooses the off-span rule and cells have candidates."""
STORES = ("sqlite", "server-sqlite", "server-postgresql", "postgresql")
NAMES = {
    "sqlite": "SQLite file",
    "server-sqlite": "`mlflow server`, 1 worker, on SQLite",
    "server-postgresql": "`mlflow server`, 1 worker, on PostgreSQL",
    "postgresql": "PostgreSQL, directly",
}
OURS, FLUENT, AS_FILE = "ours", "fluent", "fluent, map as file"


@dataclass(frozen=True)
class Sweep:
    """What a sweep has to log.

    Args:
        cells: One record a cell.
        headline: Of the parent.
    """

    cells: Sequence[RunRecord]
    headline: RunRecord


@dataclass(frozen=True)
class Timing:
    """Seconds that one way took.

    Args:
        cell_s: Of a cell, by the mean.
        parent_s: Of the parent run: opening, headline, ending.
    """

    cell_s: float
    parent_s: float

    def sweep_s(self, n_cells: int) -> float:
        """Of a sweep of so many cells."""
        return n_cells * self.cell_s + self.parent_s


def demo_sweep() -> Sweep:
    """The records of a sweep of 200 cells on the demo pair."""
    study = Study(load_pair(PairSpec.load("cultural-demo")), Protocol(n_train=N_TRAIN))
    sites = [SweepSite.parse(text) for text in SITES]
    cells = cells_of(sites, [Rank.parse(k) for k in RANKS], ALPHAS, "procrustes_scaled", "update")
    fits = study.fit(cells)
    patches = study.patch([fit.to_patch for fit in fits])
    records = [fields.cell_run(fit, patch, study) for fit, patch in zip(fits, patches, strict=True)]
    return Sweep(records, fields.sweep_headline(patches, least_ranks(patches, [30.0], seed=0)))


def widened(sweep: Sweep, width: int) -> Sweep:
    """The same sweep with maps as large as those of models of that width, of random numbers."""
    generator = torch.Generator().manual_seed(0)

    def wide(the_map: AffineMap) -> AffineMap:
        k = the_map.meta["k"]
        rank = 450 if k == "full" else int(str(k))
        left, right = (torch.randn(width, rank, generator=generator, dtype=torch.float64) for _ in "lr")
        mean = torch.randn(width, generator=generator, dtype=torch.float64)
        weight = Weight.low_rank(left / width, right.mT.contiguous() / width, 1.0)
        return AffineMap(mean, mean, weight, the_map.alpha, the_map.meta)

    cells = [
        replace(record, map=wide(record.map), tags={**record.tags, "mechdiff.map_sha256": "wide"})
        for record in sweep.cells
        if record.map is not None
    ]
    return Sweep(cells, sweep.headline)


def ours(sweep: Sweep, store: Store, experiment: str) -> Timing:
    """As `mechdiff sweep` logs."""
    store.experiment(experiment)
    start = time.perf_counter()
    with Tracker(store, experiment).run("sweep", f"sweep of {len(sweep.cells)} cells") as run:
        opened = time.perf_counter()
        for cell in sweep.cells:
            run.log_soon(cell)
        run.wait()
        logged = time.perf_counter()
        run.add(sweep.headline)
    return _timing(len(sweep.cells), start, opened, logged)


class NaiveMap(mlflow.pyfunc.PythonModel):
    """A map as users make it a model: the file is an artifact, a few lines apply it."""

    def load_context(self, context: Any) -> None:
        """Read the map."""
        self.map = AffineMap.load(context.artifacts["map"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow reads hints
        """Map rows."""
        return self.map(torch.from_numpy(model_input)).numpy()


def fluent(sweep: Sweep, store: Store, experiment: str, *, as_model: bool) -> Timing:
    """By fluent calls, one by one."""
    store.experiment(experiment)
    mlflow.set_tracking_uri(store.uri)
    mlflow.set_experiment(experiment)
    start = time.perf_counter()
    with mlflow.start_run(run_name=f"sweep of {len(sweep.cells)} cells"):
        opened = time.perf_counter()
        for record in sweep.cells:
            with mlflow.start_run(run_name=record.name, nested=True):
                _log_one_by_one(record, as_model=as_model)
        logged = time.perf_counter()
        _log_one_by_one(sweep.headline, as_model=as_model)
    return _timing(len(sweep.cells), start, opened, logged)


def _log_one_by_one(record: RunRecord, *, as_model: bool) -> None:
    for key, value in record.params.items():
        mlflow.log_param(key, param_text(key, value))
    for key, number in record.metrics.items():
        mlflow.log_metric(key, number)
    for key, curve in record.stepped_metrics.items():
        for step, number in curve.items():
            mlflow.log_metric(key, number, step=step)
    for key, text in {**record.tags, "mechdiff.kind": record.kind}.items():
        mlflow.set_tag(key, text)
    mlflow.set_tag("mlflow.note.content", record.description)
    for prompts in record.datasets:
        source = resolve_dataset_source(prompts.source)  # as MLflow does for a path that users name
        dataset = MetaDataset(source, name=prompts.name, digest=prompts.digest)
        mlflow.log_input(dataset, context=prompts.split)
    for path, table in record.tables.items():
        mlflow.log_table(table, path)
    for path, text in record.texts.items():
        mlflow.log_text(text, path)
    if record.map is not None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "map.pt")
            record.map.save(file)
            _log_map(record.map, file, as_model=as_model)


def _log_map(the_map: AffineMap, file: Path, *, as_model: bool) -> None:
    if not as_model:
        mlflow.log_artifact(str(file))
        return
    inputs, outputs = (
        Schema([TensorSpec(np.dtype(np.float32), (-1, width))]) for width in (the_map.d_in, the_map.d_out)
    )
    mlflow.pyfunc.log_model(
        name="map",
        python_model=NaiveMap(),
        artifacts={"map": str(file)},
        signature=ModelSignature(inputs, outputs),
        pip_requirements=[f"mlflow=={mlflow.__version__}", f"torch=={torch.__version__.split('+')[0]}"],
    )


def _timing(n_cells: int, start: float, opened: float, logged: float) -> Timing:
    end = time.perf_counter()
    return Timing((logged - opened) / n_cells, (opened - start) + (end - logged))


WAYS: dict[str, Callable[[Sweep, Store, str], Timing]] = {
    OURS: ours,
    FLUENT: lambda sweep, store, name: fluent(sweep, store, name, as_model=True),
    AS_FILE: lambda sweep, store, name: fluent(sweep, store, name, as_model=False),
}


def check(sweep: Sweep, store: Store, experiment: str, way: str) -> None:
    """Make sure that every cell is stored whole: status, params, metrics, tags, inputs, artifacts, map.

    Raises:
        SystemExit: It is not.
    """
    client = store.client
    where = [store.experiment(experiment)]
    kind = sweep.cells[0].kind
    runs = client.search_runs(where, f"tags.`mechdiff.kind` = '{kind}'", max_results=5000)
    if len(runs) != len(sweep.cells):
        raise SystemExit(f"{way} logged {len(runs)} runs of {len(sweep.cells)}.")
    by_name = {record.name: record for record in sweep.cells}
    for run in runs:
        record = by_name[run.info.run_name]
        texts = {key: param_text(key, value) for key, value in record.params.items()}
        whole = (
            run.info.status == "FINISHED"
            and run.data.params == texts
            and run.data.metrics == dict(record.metrics)
            and record.tags.items() <= run.data.tags.items()
            and {i.dataset.digest for i in run.inputs.dataset_inputs} == {p.digest for p in record.datasets}
        )
        if not whole:
            raise SystemExit(f"{way}: run {run.info.run_name} is not what was logged.")
    found = {file.path for file in client.list_artifacts(runs[0].info.run_id)}
    record = by_name[runs[0].info.run_name]
    wanted = {*record.tables, *record.texts} | ({"map.pt"} if way == AS_FILE else set())
    if not wanted <= found:
        raise SystemExit(f"{way}: artifacts {sorted(wanted - found)} are missing.")
    models = client.search_logged_models(where, max_results=1000)
    ready = sum(model.status == "READY" for model in models)
    if ready != (0 if way == AS_FILE else len(runs)):
        raise SystemExit(f"{way} logged {ready} models ready for {len(runs)} maps.")


@contextmanager
def opened(kind: str, folder: Path) -> Iterator[Store]:
    """A new store of a kind."""
    with ExitStack() as stack:
        artifacts = ["--serve-artifacts", "--artifacts-destination", str(folder / "artifacts")]
        if kind == "sqlite":
            uri = f"sqlite:///{folder / 'mlflow.db'}"
        elif kind == "server-sqlite":
            backend = {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder / 'mlflow.db'}"}
            uri = stack.enter_context(serve(folder, artifacts, backend))
        else:
            uri = stack.enter_context(postgres()).create("mlflow")
            if kind == "server-postgresql":
                uri = stack.enter_context(serve(folder, artifacts, {"MLFLOW_BACKEND_STORE_URI": uri}))
        yield open_store(uri)


def measure(sweep: Sweep, store: Store, n_sample: int, rounds: int) -> dict[str, list[Timing]]:
    """Timings of each way, taken in turns after a warm-up of one cell each."""
    sample = replace(sweep, cells=_spread(sweep.cells, n_sample))
    for way, log in WAYS.items():
        log(replace(sweep, cells=sweep.cells[:1]), store, f"warm-up {way}")
    timings: dict[str, list[Timing]] = {way: [] for way in WAYS}
    for i in range(rounds):
        for way, log in WAYS.items():
            what = sweep if way == OURS else sample
            name = f"{way} {i}"
            timings[way].append(log(what, store, name))
            check(what, store, name, way)
    return timings


def _spread(cells: Sequence[RunRecord], n: int) -> Sequence[RunRecord]:
    """N cells from all over the sweep: their maps are of all ranks."""
    step = len(cells) / n
    return [cells[int(i * step)] for i in range(n)]


def rows(kind: str, timings: dict[str, list[Timing]], n_cells: int) -> list[str]:
    """Lines of the report's table for one store."""
    median = {
        way: (
            1e3 * statistics.median(t.cell_s for t in found),
            statistics.median(t.sweep_s(n_cells) for t in found),
            min(t.sweep_s(n_cells) for t in found),
            max(t.sweep_s(n_cells) for t in found),
        )
        for way, found in timings.items()
    }
    lines = []
    for way, (cell_ms, sweep_s, low, high) in median.items():
        ratio = f"{sweep_s / median[FLUENT][1]:.2f}"
        of_file = f"{sweep_s / median[AS_FILE][1]:.2f}"
        lines.append(
            f"| {NAMES[kind]} | {way} | {cell_ms:.0f} | {sweep_s:.1f} ({low:.1f}-{high:.1f}) | {ratio} | "
            f"{of_file} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=200, help="of the 200, how many our way logs")
    parser.add_argument("--sample", type=int, default=20, help="how many the fluent ways log, then scaled")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stores", default=",".join(STORES))
    parser.add_argument("--width", type=int, help="make the maps as large as those of a model this wide")
    parser.add_argument("--folder", help="where the stores are made; one in memory takes the disk out of it")
    parser.add_argument("--out", type=Path, help="write the report there too")
    args = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")  # advice to the naive
    torch.set_num_threads(1)
    tempfile.tempdir = args.folder
    sweep = demo_sweep()
    sweep = replace(sweep, cells=_spread(sweep.cells, args.cells))
    sweep = sweep if args.width is None else widened(sweep, args.width)
    record = sweep.cells[0]
    sizes = [len(cell.map.to_bytes()) for cell in sweep.cells if cell.map is not None]
    lines = [
        "# What tracking a sweep costs",
        "",
        f"`python -m benchmarks.tracking_cost {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"{os.cpu_count()} cores of {platform.machine()} for client, server and database together, load "
        f"average before {os.getloadavg()[0]:.1f}; Python {platform.python_version()}, MLflow "
        f"{mlflow.__version__}, SQLAlchemy {sqlalchemy.__version__}, torch {torch.__version__}.",
        "",
        f"{len(sweep.cells)} cells, each of {len(record.params)} params, {len(record.metrics)} metrics, "
        f"{len(record.tags)} tags, {len(record.datasets)} prompt sets, "
        f"{len(record.tables) + len(record.texts)} files and a map of {min(sizes) / 1e3:.0f} to "
        f"{max(sizes) / 1e3:.0f} kB. Medians of {args.rounds} rounds in which the ways take turns; the "
        f"fluent ways log {min(args.sample, args.cells)} cells, whose time is scaled to {len(sweep.cells)}. "
        "All runs were found whole afterwards. The baseline is `fluent`, whose map is a model as ours is; "
        "in `fluent, map as file` it is only a file.",
        "",
        "| store | way | ms a cell | seconds a sweep (range) | of `fluent` | of `fluent, map as file` |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    here = Path.cwd()
    for kind in args.stores.split(","):
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)  # PostgreSQL reached directly has its artifacts in the working directory
            try:
                with opened(kind, Path(folder)) as store:
                    found = rows(kind, measure(sweep, store, args.sample, args.rounds), len(sweep.cells))
            finally:
                os.chdir(here)
        print("\n".join(found), flush=True)
        lines += found
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
