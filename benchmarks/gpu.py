"""Time the engine on one GPU at the size of an 8B model, against what the GPU can do at most.

    python -m benchmarks.gpu --out benchmarks/results/gpu-h100.md

Base and tuned are Llamas of the 8B shape with random weights in bfloat16. In one run: the ceilings (matrix
products of random numbers, copies), capture of both models, with the tuned one's clean run kept and without,
one site with 48 variants, the atlas of every layer and three hooks with 4 variants each, of what was captured
and from nothing, fits of all its sites, all of it end to end, naive hooks on a sample, and how cost grows
with prompts, variants, layers and vocabulary. Times are medians of wall time between synchronised clocks,
after a warm-up.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from mechdiff_mlflow.engine import CleanRuns, PatchEngine, VariantGroup
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.solvers import PairedSpectrum, fit_spectrum
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

HOOKS = (Hook.ATTN_OUT, Hook.MLP_OUT, Hook.RESID_POST)
PER_SITE = 4
FITTERS = 4
"""Threads that fit, a site at a time: factorisations of this size leave most of a GPU idle."""
RANKS = (1, 2, 4, 8, 16, 32, 64, 100, 128, None)
SOLVERS = ("reduced_rank", "procrustes_scaled")


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    layers: int = 32
    width: int = 4096
    mlp_width: int = 14336
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 128256

    @property
    def attention_numbers(self) -> int:
        """Weights of one block's attention."""
        head = self.width // self.heads
        return self.width * head * (2 * self.heads + 2 * self.key_heads)

    @property
    def mlp_numbers(self) -> int:
        """Weights of one block's MLP."""
        return 3 * self.width * self.mlp_width

    def model(self, seed: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
        """One with random weights."""
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            max_position_embeddings=4096,
            rope_theta=500000.0,
        )
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.eval().requires_grad_(False)

    def clean_flops(self, n_prompts: int, n_tokens: int) -> float:
        """Multiplications and additions of matrix products in whole forwards; one row of logits a prompt."""
        block = self.attention_numbers + self.mlp_numbers
        return 2.0 * n_prompts * (n_tokens * self.layers * block + self.width * self.vocabulary)

    def variant_flops(self, site: Site) -> float:
        """The same for one variant, which computes nothing below or beside its own site."""
        block = self.attention_numbers + self.mlp_numbers
        above = self.layers - 1 - site.layer
        own = self.mlp_numbers if site.hook is Hook.ATTN_OUT else 0
        return 2.0 * (above * block + own + self.width * self.vocabulary)


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median wall time after one warm-up."""
    work()
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def few(rounds: int) -> int:
    """Rounds where many points make one curve."""
    return min(rounds, 3)


def prompts_of(n: int, tokens: int, vocabulary: int) -> TokenizedPrompts:
    ids = torch.randint(0, vocabulary, (n, tokens), generator=torch.Generator().manual_seed(n))
    return TokenizedPrompts(tuple(map(tuple, ids.tolist())), (tokens - 1,) * n)


def noisy(site: Site, n_variants: int) -> VariantGroup:
    """The clean activation with a fifth of its own size of noise, made when it is needed."""

    def replace(index: Tensor, clean: Tensor) -> Tensor:
        noise = torch.randn(len(clean), n_variants, clean.shape[1], device=clean.device, dtype=clean.dtype)
        return clean.unsqueeze(1) + 0.2 * clean.std() * noise

    return VariantGroup(site, replace, n_variants=n_variants)


def mapped(site: Site, maps: Sequence[AffineMap], base: Tensor) -> VariantGroup:
    """Maps of the base model's activations [N, width], applied when they are needed."""

    def replace(index: Tensor, clean: Tensor) -> Tensor:
        x = base[index.to(base.device)].double()
        return torch.stack([map_(x) for map_ in maps], 1)

    return VariantGroup(site, replace, n_variants=len(maps))


@torch.no_grad()
def fits(x: Tensor, y: Tensor) -> list[AffineMap]:
    """Every solver and rank of a site's rows [n, width]; of each solver those of rank 8 and full are kept."""
    with torch.cuda.stream(torch.cuda.Stream()):
        spectrum = PairedSpectrum.from_rows(x, y)
        kept = []
        for solver in SOLVERS:
            solution = fit_spectrum(solver, spectrum, "update")
            maps = {k: solution.map(k) for k in RANKS if k is None or k < len(x)}
            kept += [maps[8], maps[None]]
        torch.cuda.current_stream().synchronize()
    return kept


class Report:
    """Lines of markdown, printed as they come, and the tables in them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tables: list[list[Sequence[object]]] = []

    def say(self, line: str = "") -> None:
        """Add a line."""
        print(line, flush=True)
        self.lines.append(line)

    def table(self, *head: str) -> None:
        """Begin a table."""
        self.tables.append([head])
        self.say()
        self._cells(head)
        self.say("| " + " | ".join(["---", *["---:"] * (len(head) - 1)]) + " |")

    def row(self, *cells: object) -> None:
        """Add a row to the table, numbers to three digits."""
        self.tables[-1].append(cells)
        self._cells(cells)

    def _cells(self, cells: Sequence[object]) -> None:
        self.say("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")

    def write(self, path: Path) -> None:
        """The lines as markdown, and the tables as JSON beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*self.lines, ""]), encoding="utf-8")
        path.with_suffix(".json").write_text(json.dumps(self.tables, indent=1) + "\n", encoding="utf-8")


def ceilings(shape: Shape, report: Report) -> float:
    """The rate of matrix products that everything is set against: the best of several shapes, in FLOP/s."""
    report.table("ceiling", "measured")
    rates = []
    sizes = {
        "8192 × 8192 × 8192": (8192, 8192, 8192),
        "9600 tokens into an MLP": (9600, shape.width, shape.mlp_width),
        "9600 tokens out of an MLP": (9600, shape.mlp_width, shape.width),
        "9600 tokens into queries": (9600, shape.width, shape.width),
    }
    for name, (m, k, n) in sizes.items():
        a, b = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((m, k), (n, k)))
        rates.append(2 * m * k * n * 20 / seconds(lambda a=a, b=b: [a @ b.T for _ in range(20)], 5))
        report.row(f"bfloat16 matrix product, {name}, TFLOP/s", rates[-1] / 1e12)
    x = torch.empty(2**31, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    report.row("copy, bytes read and written, TB/s", 2 * x.nbytes / seconds(lambda: y.copy_(x), 5) / 1e12)
    return max(rates)


@contextmanager
def peak() -> Iterator[Callable[[], float]]:
    """GiB held at most inside the context."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() / 2**30


def main_tables(args: argparse.Namespace, report: Report) -> None:
    shape = Shape(layers=args.layers)
    ceiling = ceilings(shape, report)
    sites = [Site(layer, hook) for layer in range(shape.layers) for hook in HOOKS]
    bounds = {"batch_size": args.batch, "max_rows": args.rows, "head_rows": args.head_rows}
    engines = [PatchEngine(shape.model(seed), **bounds) for seed in (0, 1)]
    plain = PatchEngine(engines[1].forward.decoder.model, **bounds, fused=False)
    tuned = engines[1]
    n, tokens = args.prompts, args.tokens
    prompts = prompts_of(n, tokens, shape.vocabulary)
    late = Site(shape.layers * 26 // 32, Hook.ATTN_OUT)
    atlas_groups = [noisy(site, PER_SITE) for site in sites]
    clean_flops = shape.clean_flops(n, tokens)
    atlas_flops = clean_flops + n * PER_SITE * sum(map(shape.variant_flops, sites))
    site_flops = clean_flops + n * 48 * shape.variant_flops(late)

    def capture() -> list[Mapping[Site, Tensor]]:
        return [engine.capture(prompts, sites, device="cuda") for engine in engines]

    def capture_kept() -> tuple[Mapping[Site, Tensor], CleanRuns]:
        base = engines[0].capture(prompts, sites, device="cuda")
        return base, kept(tuned, prompts, sites)

    def maps_of(x: Mapping[Site, Tensor], y: Mapping[Site, Tensor]) -> list[VariantGroup]:
        torch.cuda.synchronize()  # the fits have streams of their own
        with ThreadPoolExecutor(FITTERS) as pool:
            maps = list(pool.map(lambda site: fits(x[site], y[site]), sites))
        return [mapped(site, m, x[site]) for site, m in zip(sites, maps, strict=True)]

    def end_to_end() -> None:
        x, recorded = capture_kept()
        tuned.score(recorded, maps_of(x, recorded.activations))

    def end_to_end_from_nothing() -> None:
        tuned.score(prompts, maps_of(*capture()))

    report.say()
    report.say(
        f"{shape.layers} layers, width {shape.width}, vocabulary {shape.vocabulary}; {tokens} tokens a "
        f"prompt. The atlas has {PER_SITE} variants at {len(sites)} sites. Path {tuned.mode!r}. MFU is the "
        "matrix products' FLOP over time and the best rate above."
    )
    report.table("task", "seconds", "peak GiB", "MFU, %", "seconds without our kernels")

    def line(
        name: str,
        work: Callable[[], object],
        flops: float | None,
        slow: Callable[[], object] | None = None,
    ) -> tuple[float, float]:
        with peak() as gib:
            time_s = seconds(work, args.rounds)
            held = gib()
        unfused = seconds(slow, args.rounds) if slow and not args.quick else ""
        row(name, time_s, held, flops, unfused)
        return time_s, held

    def row(name: str, time_s: float, gib: float, flops: float | None, unfused: float | str = "") -> None:
        mfu = f"{100 * flops / time_s / ceiling:.0f}" if flops else ""
        report.row(name, time_s, gib, mfu, unfused)

    def atlas(some: TokenizedPrompts, slow: PatchEngine | None) -> float:
        """Of what was captured; from nothing; of that its clean pass and the rest. Seconds from nothing."""
        n = len(some)
        clean, every = (flops * n / len(prompts) for flops in (clean_flops, atlas_flops))
        line(
            f"atlas of what was captured, {n} prompts",
            partial(tuned.score, kept(tuned, some, sites), atlas_groups),
            every - clean,
        )
        total_s, gib = line(
            f"atlas from nothing, clean pass included, {n} prompts",
            partial(tuned.score, some, atlas_groups),
            every,
            None if slow is None else partial(slow.score, some, atlas_groups),
        )
        clean_s, _ = line(
            f"of it the clean pass, {n} prompts", partial(tuned.capture, some, [], device="cuda"), clean
        )
        row(f"of it the rest, {n} prompts", total_s - clean_s, gib, every - clean)
        return total_s

    line(
        f"capture both models, {n} prompts, {len(sites)} sites", capture, 2 * clean_flops,
        lambda: [plain.capture(prompts, sites, device="cuda") for _ in engines],
    )  # fmt: skip
    line(
        f"capture of both models, tuned kept, {n} prompts, {len(sites)} sites", capture_kept, 2 * clean_flops
    )
    line(
        f"{late} × 48 variants, {n} prompts", lambda: tuned.score(prompts, [noisy(late, 48)]), site_flops,
        lambda: plain.score(prompts, [noisy(late, 48)]),
    )  # fmt: skip
    atlas_s = atlas(prompts, plain)
    if args.profile:
        profile(lambda: tuned.score(prompts, atlas_groups), "atlas")
        profile(capture, "capture")
    if args.quick:
        return
    atlas(prompts_of(500, tokens, shape.vocabulary), None)
    what = f"{len(sites)} fits ({', '.join(SOLVERS)}; {len(RANKS)} ranks; {FITTERS} threads)"
    line(f"capture, tuned kept + {what} + atlas of what was captured, {n} prompts", end_to_end, None)
    line(f"capture + {what} + atlas, {n} prompts", end_to_end_from_nothing, None)
    naive = naive_seconds(tuned, prompts, late, args.rounds)
    n_variants = PER_SITE * len(sites)
    report.say()
    report.say(
        f"Naive hooks, the same {n} prompts in one batch: {naive:.3f} s a variant, "
        f"{naive * (n_variants + 1):.0f} s for the atlas, whose {n_variants} variants and clean run cost the "
        f"same each: {naive * (n_variants + 1) / atlas_s:.0f} times as long."
    )
    scaling(tuned, shape, args, report)


def kept(engine: PatchEngine, prompts: TokenizedPrompts, sites: Sequence[Site]) -> CleanRuns:
    """Recorded prompts, all of which can be patched without another clean run."""
    recorded = engine.record(prompts, sites, device="cuda")
    if recorded.n_kept < len(prompts):
        sys.exit(
            f"Error: {recorded.n_kept} of {len(prompts)} clean runs fit beside the models; use a GPU with "
            "more memory."
        )
    return recorded


def naive_seconds(engine: PatchEngine, prompts: TokenizedPrompts, site: Site, rounds: int) -> float:
    """One variant of every prompt by a hook on a whole forward."""
    model: Any = engine.forward.decoder.model
    ids = torch.tensor(prompts.ids, device="cuda")
    values = torch.randn(len(ids), engine.width, device="cuda", dtype=torch.bfloat16)

    def replace(module: Any, args: Any, out: Any) -> Any:
        hidden = out[0].clone()
        hidden[:, -1] = values
        return (hidden, *out[1:])

    @torch.no_grad()
    def patched() -> Tensor:
        handle = engine.forward.decoder.module(site).register_forward_hook(replace)
        try:
            logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            return torch.log_softmax(logits.float(), -1)
        finally:
            handle.remove()

    return seconds(patched, rounds)


def scaling(engine: PatchEngine, shape: Shape, args: argparse.Namespace, report: Report) -> None:
    """Prompts and variants."""
    tokens = args.tokens
    sites = [Site(layer, hook) for layer in range(shape.layers) for hook in HOOKS]
    report.table("prompts, atlas", "seconds", "ms a prompt", "peak GiB")
    for n in (50, 100, 200, 400, 800):
        prompts = prompts_of(n, tokens, shape.vocabulary)
        with peak() as gib:
            found = seconds(
                lambda p=prompts: engine.score(p, [noisy(s, PER_SITE) for s in sites]), few(args.rounds)
            )
            report.row(n, found, 1e3 * found / n, gib())
    prompts = prompts_of(args.prompts, tokens, shape.vocabulary)
    for site in (Site(0, Hook.RESID_POST), Site(shape.layers // 2, Hook.ATTN_OUT)):
        clean = seconds(lambda: engine.capture(prompts, [], device="cuda"), args.rounds)
        report.table(f"variants at {site}", "seconds", "each, % of a forward of its prompts")
        report.row("forward alone", clean, "")
        before, first = 1, seconds(lambda s=site: engine.score(prompts, [noisy(s, 1)]), args.rounds)
        report.row(1, first, 100 * (first - clean) / clean)
        for v in (2, 4, 8, 16, 32, 48, 96):
            found = seconds(lambda v=v, s=site: engine.score(prompts, [noisy(s, v)]), args.rounds)
            report.row(v, found, 100 * (found - first) / (v - before) / clean)


def sizes(args: argparse.Namespace, report: Report) -> None:
    """Layers and vocabulary, on models of their own."""
    n, tokens = args.prompts, args.tokens
    report.table("model", "atlas, seconds", "peak GiB", "TFLOP/s")
    shapes = [Shape(layers=layers) for layers in (4, 8, 16)]
    shapes += [Shape(layers=8, vocabulary=v) for v in (16032, 64128, 256512)]
    for shape in shapes:
        engine = PatchEngine(
            shape.model(0), batch_size=args.batch, max_rows=args.rows, head_rows=args.head_rows
        )
        sites = [Site(layer, hook) for layer in range(shape.layers) for hook in HOOKS]
        prompts = prompts_of(n, tokens, shape.vocabulary)
        flops = shape.clean_flops(n, tokens) + n * PER_SITE * sum(map(shape.variant_flops, sites))
        with peak() as gib:
            groups = [noisy(s, PER_SITE) for s in sites]
            found = seconds(lambda e=engine, p=prompts, g=groups: e.score(p, g), few(args.rounds))
            report.row(
                f"{shape.layers} layers, vocabulary {shape.vocabulary}", found, gib(), flops / found / 1e12
            )
        del engine
        torch.cuda.empty_cache()


def profile(work: Callable[[], object], name: str) -> None:
    """Print where the GPU's time goes."""
    with torch.profiler.profile() as found:
        work()
        torch.cuda.synchronize()
    print(name)
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=70))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=150, help="prompts a chunk")
    parser.add_argument("--rows", type=int, default=38400, help="patched rows together")
    parser.add_argument("--head-rows", type=int, default=8192, help="rows of logits together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="capture, site and atlas only")
    parser.add_argument("--profile", action="store_true", help="print kernels by time")
    parser.add_argument("--out", type=Path, help="write the report there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("Error: there is no CUDA device here; run this on a machine with one.")
    torch.set_grad_enabled(False)
    report = Report()
    report.say("# The engine on one GPU")
    report.say()
    report.say(f"`python -m benchmarks.gpu {' '.join(sys.argv[1:])}`".replace(" `", "`"))
    report.say()
    report.say(
        f"{torch.cuda.get_device_name()}, {platform.machine()}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}. Medians of {args.rounds}, of {few(args.rounds)} for the curves over "
        "prompts, layers and vocabulary."
    )
    main_tables(args, report)
    if not args.quick:
        torch.cuda.empty_cache()
        sizes(args, report)
    if args.out is not None:
        report.write(args.out)


if __name__ == "__main__":
    main()
