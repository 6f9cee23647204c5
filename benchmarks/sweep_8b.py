"""What tracking costs of a whole sweep of 200 cells on a pair of the size of 8B models.

    python -m benchmarks.sweep_8b --out benchmarks/results/sweep-8b.md

Base is a Llama of the 8B shape with random weights in bfloat16, tuned the same with the attention of its
upper half changed. The sweep is what `mechdiff sweep` does: the checks of the plumbing, a `Study` that fits
10 sites × 10 ranks × 2 scales on 450 train prompts, lets val choose and reports on test, every control
included, the least ranks, a run for each cell with its map, tables and metrics, and a parent with curves and
figures. Only where the weights and the prompts come from differs: they are made in memory. The same is
computed before and after without any store; what tracking costs is the wall clock that it adds, because most
of it is done while the next cells are computed. Random weights cost as much as trained ones; the drops that
they give mean nothing.

`--layers 8 --width 64 --vocabulary 500 --prompts 40,16,16 --ranks 1,full --device cpu` tries it anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn

from benchmarks.gpu import Shape
from mechdiff_mlflow.engine import PatchEngine
from mechdiff_mlflow.experiments import PatchRecord, Protocol, Study
from mechdiff_mlflow.experiments.preflight import require_sound
from mechdiff_mlflow.experiments.sweep import SweepSite, cells_of, least_ranks
from mechdiff_mlflow.experiments.workers import Journal, LocalWorkers
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.models.sides import ModelCache, Side
from mechdiff_mlflow.report.evidence import of_record
from mechdiff_mlflow.report.figures import curve_figures, write_figures
from mechdiff_mlflow.spec.pair_spec import SPLITS, Cell, PairSpec, Rank
from mechdiff_mlflow.spec.prompts import check_disjoint, read_prompts
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.tracking.content import fields
from mechdiff_mlflow.tracking.flavour import maps_of
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import open_store

N_SITES = 10
ALPHAS = (0.5, 1.0)
CHANGE = 1.0
"""Noise put on the output projections of attention, in standard deviations of their own weights."""
DTYPES = {"cuda": "bfloat16", "cpu": "float32"}
# What `load_pair` gives an engine by default, on a GPU and on a CPU.
BOUNDS = {"cuda": (32, 32768, 8192), "cpu": (32, 8192, 2048)}
SPEC = """\
name: random-{layers}x{width}
base: {{model: random}}
tuned: {{model: random}}
dtype: {dtype}
template: none
prompts: {{train: train.jsonl, val: val.jsonl, test: test.jsonl}}
"""


@dataclass
class Clock:
    """Seconds by stage, in order."""

    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is inside, the GPU's work included."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Written:
    """What the store holds afterwards.

    Args:
        cells: Runs that are FINISHED with their metrics.
        models: Maps of the runs.
        megabytes: Of files.
    """

    cells: int
    models: int
    megabytes: float


def write_prompts(folder: Path, sizes: dict[str, int], n_tokens: int, vocabulary: int) -> None:
    """Prompts of random words, each a token."""
    words = random.Random(0)
    for split, n in sizes.items():
        texts = (" ".join(f"w{words.randrange(vocabulary)}" for _ in range(n_tokens)) for _ in range(n))
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """A word, a token."""
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0")


@torch.no_grad()
def change(model: Any) -> None:
    """Make a tuned model of a base one: noise on the attention of its upper half."""
    torch.manual_seed(1)
    layers = model.model.layers
    for layer in layers[len(layers) // 2 :]:
        weight = layer.self_attn.o_proj.weight
        weight.add_(CHANGE * weight.std() * torch.randn_like(weight))


def make_pair(shape: Shape, folder: Path, device: str) -> Pair:
    """Both models in memory, with the prompts in `folder`."""
    text = SPEC.format(layers=shape.layers, width=shape.width, dtype=DTYPES[device])
    spec = PairSpec.parse(text, root=folder)
    prompts = {split: read_prompts(spec.prompt_path(split), split) for split in SPLITS}
    check_disjoint(prompts.values())
    words = tokenizer(shape.vocabulary)
    model_cache = ModelCache(one_at_a_time=False)
    batch_size, max_rows, head_rows = BOUNDS[device]

    def engine(model: nn.Module) -> PatchEngine:
        return PatchEngine(model, batch_size=batch_size, max_rows=max_rows, head_rows=head_rows)

    def side(role: str) -> Side:
        def load() -> nn.Module:
            model: nn.Module = shape.model(0, device, getattr(torch, spec.dtype))
            if role == "tuned":
                change(model)
            return model

        revision = f"random weights, {role}"
        checkpoint: Any = SimpleNamespace(
            n_layers=shape.layers, n_embeddings=None, max_tokens=None, outline=lambda: None
        )
        return Side(role, checkpoint, words, revision, load, role, engine, model_cache)

    base, tuned = side("base"), side("tuned")
    for one in (base, tuned):
        model_cache.model(one.key, one.load)
    return Pair(spec, base, tuned, prompts, device)


def cells_for(shape: Shape, ranks: str) -> list[Cell]:
    """The cells of a sweep over both kinds of sites in the upper half."""
    per_hook = N_SITES // 2
    upper = shape.layers // 2
    layers = sorted({upper + i * (shape.layers - upper) // per_hook for i in range(per_hook)})
    sites = [SweepSite(Site(layer, h), None) for layer in layers for h in (Hook.ATTN_OUT, Hook.RESID_POST)]
    each = [Rank.parse(k) for k in ranks.split(",")]
    return cells_of(sites, each, ALPHAS, "procrustes_scaled", "update")


def compute(pair: Pair, cells: list[Cell], folder: Path, clock: Clock) -> None:
    """The sweep without a store: what the same takes when nothing is tracked."""
    with journal(pair, folder) as workers:
        study = Study(pair, Protocol(), workers=workers)
        with clock.stage("capture, fit, choose on val"):
            fits = study.fit(cells)
        with clock.stage("report on test"):
            patches = study.patch([fit.to_patch for fit in fits])
    with clock.stage("least ranks and figures"), tempfile.TemporaryDirectory() as figures:
        least_ranks(patches, [30.0], seed=0)
        draw(patches, pair, Path(figures))


def track(uri: str, pair: Pair, cells: list[Cell], folder: Path, clock: Clock) -> Written:
    """The same as `mechdiff sweep` does it, into a new store."""
    with clock.stage("make the store, once"):
        store = open_store(uri)
        store.experiment(pair.name)
    with (
        Tracker(store, pair.name).run("sweep", f"sweep of {len(cells)} cells") as run,
        journal(pair, folder) as workers,
    ):
        study = Study(pair, Protocol(), workers=workers)
        with clock.stage("capture, fit, choose on val"):
            fits = study.fit(cells)
        with clock.stage("report on test"):
            patches = study.patch(
                [fit.to_patch for fit in fits],
                lambda i, patch: run.log_soon(fields.cell_run(fits[i], patch, study)),
            )
        with clock.stage("what is left to store"):
            run.wait()
        with clock.stage("least ranks and figures"), tempfile.TemporaryDirectory() as figures:
            found = least_ranks(patches, [30.0], seed=0)
            files = draw(patches, pair, Path(figures))
            run.add(replace(fields.sweep_headline(patches, found), files=files))
    where = [run.experiment_id]
    runs = store.client.search_runs(where, "tags.`mechdiff.kind` = 'patch'", max_results=5000)
    root = (store.sqlite_path or Path()).parent
    return Written(
        sum(r.info.status == "FINISHED" and "KL_mapped" in r.data.metrics for r in runs),
        sum(len(maps_of(store, run)) for run in runs),
        sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) / 1e6,
    )


@contextmanager
def journal(pair: Pair, folder: Path) -> Iterator[Journal]:
    """Workers as a command has them; nothing is known from before."""
    pair.recordings.forget()
    workers = Journal(LocalWorkers(pair), folder / "journal", version="benchmark")
    yield workers
    workers.discard()


def draw(patches: list[PatchRecord], pair: Pair, folder: Path) -> dict[str, Path]:
    """The figures of a sweep."""
    return write_figures(
        curve_figures([of_record(patch) for patch in patches]), f"Sweep of {pair.name}", folder
    )


def sweep(
    shape: Shape, args: argparse.Namespace, plain: list[Clock], tracked: Clock, folder: Path
) -> tuple[int, Written]:
    """Untracked, tracked, untracked; how many cells it has, and what was written."""
    sizes = dict(zip(SPLITS, map(int, args.prompts.split(",")), strict=True))
    write_prompts(folder, sizes, args.tokens, shape.vocabulary)
    pair = make_pair(shape, folder, args.device)
    require_sound(pair)  # warms up
    for clock in (*plain, tracked):
        pair.recordings.forget()
        with clock.stage("check the plumbing"):
            require_sound(pair)
    cells = cells_for(shape, args.ranks)
    compute(pair, cells, folder, plain[0])
    store = folder / "store"
    store.mkdir()
    written = track(f"sqlite:///{store / 'mlflow.db'}", pair, cells, folder, tracked)
    compute(pair, cells, folder, plain[1])
    return len(cells), written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt")
    parser.add_argument("--prompts", default="450,150,150", help="of train, val and test")
    parser.add_argument("--ranks", default="1,2,4,8,16,32,64,100,128,full")
    parser.add_argument("--device", choices=sorted(DTYPES), default="cuda")
    parser.add_argument("--out", type=Path, help="write the report there too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("Error: there is no CUDA device here; run this on a machine with one, or with --device cpu.")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    heads = max(args.width // 128, 2)
    shape = Shape(
        layers=args.layers,
        width=args.width,
        mlp_width=args.width * 7 // 2,
        heads=heads,
        key_heads=max(heads // 4, 1),
        vocabulary=args.vocabulary,
    )
    plain, tracked = [Clock(), Clock()], Clock()
    with tempfile.TemporaryDirectory() as folder:
        n_cells, written = sweep(shape, args, plain, tracked, Path(folder))
    if (written.cells, written.models) != (n_cells, n_cells):
        sys.exit(f"Error: of {n_cells} cells {written.cells} are whole, with {written.models} maps.")
    without = sum(sum(clock.stages.values()) for clock in plain) / len(plain)
    total = sum(tracked.stages.values())
    tracking = total - without
    made = tracked.stages["make the store, once"]
    where = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    lines = [
        "# Tracking's share of a sweep",
        "",
        f"`python -m benchmarks.sweep_8b {' '.join(sys.argv[1:])}`".replace(" `", "`"),
        "",
        f"{where}, {os.cpu_count()} cores of {platform.machine()}, {torch.get_num_threads()} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"MLflow {mlflow.__version__}. SQLite store on a local disk.",
        "",
        f"{shape.layers} layers, width {shape.width}, vocabulary {shape.vocabulary}, {args.prompts} prompts "
        f"of {args.tokens} tokens; {n_cells} cells, all found whole afterwards with their maps, "
        f"{written.megabytes:.0f} MB.",
        "",
        "| stage | tracked, s | untracked before, s | untracked after, s |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {name} | {took:.2f} | "
            + " | ".join(f"{c.stages[name]:.2f}" if name in c.stages else "" for c in plain)
            + " |"
            for name, took in tracked.stages.items()
        ),
        f"| all | {total:.2f} | " + " | ".join(f"{sum(c.stages.values()):.2f}" for c in plain) + " |",
        "",
        f"**Tracking costs {tracking:.2f} s, {100 * tracking / total:.1f} % of the sweep** "
        f"({made:.2f} s of it to make the store, once; without that "
        f"{100 * (tracking - made) / (total - made):.1f} %), {1e3 * tracking / n_cells:.0f} ms a cell. "
        "Loading the models is not counted as part of the sweep, the checks before it are.",
    ]
    print("\n".join(lines))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
