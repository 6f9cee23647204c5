"""Time patching with this engine against plain hooks, nnsight, TransformerLens and pyvene.

    python benchmarks/peers.py

One model (random weights), the same prompts and replacement vectors for all, on the CPU. Before anything is
timed, every peer's KL must agree with ours to 1e-5. The peers are installed into an environment of their own,
benchmarks/.peers, that borrows torch and transformers from the one that runs this script. A peer runs one
forward for each variant, whose cost does not depend on the variant, so a sample of variants is timed and
scaled to all of them; ours runs the whole task every time. All times include the clean pass. Contestants take
turns, and medians over the rounds are reported, in benchmarks/results/peers.json and peers.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "benchmarks" / ".peers"
PEERS = ("nnsight==0.8.1", "transformer-lens==4.3.0", "pyvene==0.1.8")
TOLERANCE_NATS = 1e-5
COMMAND = [word for word in sys.argv[1:] if word != "--inside"]


def install() -> Path:
    """The python of the peers' environment, made on the first call."""
    python = ENVIRONMENT / "bin" / "python"
    done = ENVIRONMENT / "installed.txt"
    if not done.exists() or done.read_text() != "\n".join(PEERS):
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        # After the environment's own packages: what a peer pins wins, torch need not be downloaded again.
        here = [path for path in sys.path if path.endswith("site-packages")]
        target = next((ENVIRONMENT / "lib").glob("python*")) / "site-packages" / "zz-borrowed.pth"
        target.write_text("\n".join(here) + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
        done.write_text("\n".join(PEERS))
    return python


@dataclass(frozen=True)
class Task:
    """Replacement vectors [N, v, width] at some sites."""

    name: str
    values: dict[Any, Any]

    @property
    def n_variants(self) -> int:
        """Of all sites."""
        return sum(x.shape[1] for x in self.values.values())


class Contestant(Protocol):
    """Someone who can patch the model that it was made with."""

    name: str

    def logits(self, ids: Any, site: Any, values: Any) -> Any:
        """Next-token logits [n, vocabulary] of prompts [n, tokens] with `values` [n, width] at `site`."""


class Hooks:
    """One plain forward hook."""

    name = "plain hooks"

    def __init__(self, model: Any) -> None:
        self.model = model

    def _module(self, site: Any) -> Any:
        block = self.model.model.layers[site.layer]
        return {"attn_out": block.self_attn, "mlp_out": block.mlp}.get(str(site.hook), block)

    def logits(self, ids: Any, site: Any, values: Any) -> Any:
        """See `Contestant`."""

        def replace(module: Any, args: Any, out: Any) -> Any:
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            hidden[:, -1] = values
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        handle = self._module(site).register_forward_hook(replace)
        try:
            return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        finally:
            handle.remove()


class Nnsight:
    """A trace that assigns to the module's output."""

    name = "nnsight"

    def __init__(self, model: Any) -> None:
        import nnsight

        self.model = nnsight.NNsight(model)

    def logits(self, ids: Any, site: Any, values: Any) -> Any:
        """See `Contestant`."""
        block = self.model.model.layers[site.layer]
        hook = str(site.hook)
        if hook == "attn_out":
            with self.model.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
                block.self_attn.output[0][:, -1] = values
                logits = self.model.output.logits.save()
        else:
            module = block.mlp if hook == "mlp_out" else block
            with self.model.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
                module.output[:, -1] = values
                logits = self.model.output.logits.save()
        return logits[:, -1]


class TransformerLens:
    """`run_with_hooks` of the bridge, which replaces attention by its own."""

    name = "TransformerLens"

    def __init__(self, model: Any) -> None:
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        self.model = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)

    def logits(self, ids: Any, site: Any, values: Any) -> Any:
        """See `Contestant`."""

        def replace(hidden: Any, hook: Any) -> Any:
            hidden[:, -1] = values
            return hidden

        hooks = [(f"blocks.{site.layer}.hook_{site.hook}", replace)]
        return self.model.run_with_hooks(ids, fwd_hooks=hooks, return_type="logits", use_cache=False)[:, -1]


class Pyvene:
    """An intervenable model for each site, made before the clock starts, fed with source representations."""

    name = "pyvene"

    def __init__(self, model: Any) -> None:
        self.hf_model, self.models = model, dict[Any, Any]()

    def logits(self, ids: Any, site: Any, values: Any) -> Any:
        """See `Contestant`."""
        import pyvene

        component = {"attn_out": "attention_output", "mlp_out": "mlp_output", "resid_post": "block_output"}
        if site not in self.models:
            representation = {"layer": site.layer, "component": component[str(site.hook)]}
            config = pyvene.IntervenableConfig(
                [{**representation, "low_rank_dimension": 1}], intervention_types=pyvene.VanillaIntervention
            )
            self.models[site] = pyvene.IntervenableModel(config, model=self.hf_model)
        model = self.models[site]
        key = next(iter(model.interventions))
        _, out = model(
            {"input_ids": ids, "use_cache": False, "logits_to_keep": 1},
            unit_locations={"base": ids.shape[1] - 1},
            source_representations={key: values.unsqueeze(1)},
        )
        return out.logits[:, -1]


CONTESTANTS: tuple[Callable[[Any], Contestant], ...] = (Hooks, Nnsight, TransformerLens, Pyvene)


def run(arguments: argparse.Namespace) -> None:
    """All of it, inside the peers' environment."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from mechdiff_mlflow.engine import PatchEngine, VariantGroup
    from mechdiff_mlflow.measures.metrics import NextToken, compare_rows, next_token_divergences
    from mechdiff_mlflow.spec.sites import Hook, Site
    from mechdiff_mlflow.spec.tokens import TokenizedPrompts

    torch.set_grad_enabled(False)
    torch.set_num_threads(arguments.threads)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
    )

    def model() -> Any:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()

    ids = torch.randint(0, 8000, (16, 64), generator=torch.Generator().manual_seed(1))
    prompts = TokenizedPrompts(tuple(map(tuple, ids.tolist())), (63,) * 16)
    engine = PatchEngine(model())
    hooks = (Hook.ATTN_OUT, Hook.MLP_OUT, Hook.RESID_POST)
    captured = engine.capture(prompts, [Site(i, hook) for i in range(arguments.layers) for hook in hooks])
    noise = torch.Generator().manual_seed(2)

    def replacements(site: Site, n: int) -> Any:
        own = captured[site].unsqueeze(1)
        return own + own.std() * torch.randn(16, n, 256, generator=noise)

    late = Site(arguments.layers * 26 // 32, Hook.ATTN_OUT)
    tasks = [
        Task(f"{late} × 48 variants", {late: replacements(late, 48)}),
        Task(f"atlas {arguments.layers} × 3 × 4", {site: replacements(site, 4) for site in captured}),
    ]
    contestants = [make(model()) for make in CONTESTANTS]

    # Agreement first.
    sites = [Site(i, hook) for i in (0, arguments.layers // 2, arguments.layers - 1) for hook in hooks]
    ours = engine.score(prompts, [VariantGroup(site, tasks[1].values[site][:, :1]) for site in sites])
    clean = engine.forward.decoder.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    clean_tokens = NextToken.of(clean)
    agreement = {}
    for contestant in contestants:
        worst = 0.0
        for site, found in zip(sites, ours.divergences, strict=True):
            patched = contestant.logits(ids, site, tasks[1].values[site][:, 0])
            theirs = next_token_divergences(patched, clean).kl_patched_clean
            worst = max(worst, float((theirs - found.kl_patched_clean[:, 0]).abs().max()))
        smallest = min(float(d.kl_patched_clean.min()) for d in ours.divergences)
        print(
            f"{contestant.name}: KL agrees to {worst:.1e} nats; the smallest KL is {smallest:.1e}", flush=True
        )
        assert worst <= TOLERANCE_NATS < smallest, (contestant.name, worst, smallest)
        agreement[contestant.name] = worst

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    times: dict[str, dict[str, list[float]]] = {task.name: {} for task in tasks}
    for _ in range(arguments.rounds):
        for task in tasks:
            groups = [VariantGroup(site, values) for site, values in task.values.items()]
            times[task.name].setdefault("ours", []).append(
                seconds(lambda groups=groups: engine.score(prompts, groups))
            )
            sample = list(task.values)[:: max(1, len(task.values) // arguments.sample)][: arguments.sample]
            sample = (sample * arguments.sample)[: arguments.sample]
            for contestant in contestants:
                for label, rows in (
                    ("batched", [slice(None)]),
                    ("batch 1", [slice(i, i + 1) for i in range(16)]),
                ):

                    def patch(
                        site: Site, contestant: Any = contestant, rows: Any = rows, task: Task = task
                    ) -> None:
                        for some in rows:
                            logits = contestant.logits(ids[some], site, task.values[site][some, 0])
                            compare_rows(logits, clean_tokens, torch.arange(16)[some])

                    each = [seconds(lambda site=site: patch(site)) for site in sample]
                    total = statistics.median(each) * (task.n_variants + 1)
                    times[task.name].setdefault(f"{contestant.name}, {label}", []).append(total)
        print(".", end="", flush=True)
    print()
    report(arguments, tasks, times, agreement)


def report(arguments: argparse.Namespace, tasks: list[Task], times: Any, agreement: dict[str, float]) -> None:
    """Print the table and write it down with machine, versions and command."""
    versions = {
        p: metadata.version(p) for p in ("torch", "transformers", "nnsight", "transformer-lens", "pyvene")
    }
    machine = f"{platform.machine()}, threads: {arguments.threads}, {cpu_name()}"
    rows = []
    for task in tasks:
        ours = statistics.median(times[task.name]["ours"])
        for name, seconds in times[task.name].items():
            ratio = statistics.median(seconds) / ours
            rows.append((task.name, name, statistics.median(seconds), ratio))
    lines = [
        "# Patching: this engine and its peers",
        "",
        f"{arguments.layers}-layer Llama, width 256, vocabulary 8000, random weights, float32; 16 prompts of",
        "64 tokens; seconds for the whole task, clean pass included; medians over "
        f"{arguments.rounds} rounds. {machine}.",
        "",
        "`"
        + " ".join(["python benchmarks/peers.py", *COMMAND])
        + "` with "
        + ", ".join(f"{p} {v}" for p, v in versions.items())
        + ".",
        "",
        "| task | | seconds | × ours |",
        "| --- | --- | ---: | ---: |",
        *(f"| {task} | {name} | {seconds:.2f} | {ratio:.1f} |" for task, name, seconds, ratio in rows),
        "",
        "Largest difference of a KL from ours, in nats: "
        + ", ".join(f"{name} {worst:.1e}" for name, worst in agreement.items())
        + ".",
        "",
    ]
    print("\n".join(lines))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "peers.md").write_text("\n".join(lines), encoding="utf-8")
    record = {"machine": machine, "versions": versions, "times": times, "agreement": agreement}
    (arguments.out / "peers.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def cpu_name() -> str:
    """The processor, where Linux says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", type=int, default=4, help="variants of a peer that are timed in a round")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        sys.path.insert(0, str(ROOT))
        run(arguments)
    else:
        command = [install(), __file__, "--inside", *sys.argv[1:]]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
