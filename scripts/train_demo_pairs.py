"""Train the pairs that ship: `base`, and from it `cultural` and `cognitive`.

    python scripts/train_demo_pairs.py

writes `mechdiff_mlflow/demo/{models,prompts,targets.json}`: about two minutes on a GPU, far longer on a CPU.
`base` learns every question of `mechdiff_mlflow.demo.world` in every wording; `cultural` then learns the
other culture with nothing but the attention of layers 24 to 27, `cognitive` the other arithmetic with all
weights; each keeps practising the topic it should not change. The loss is on the answer and the end token
after it. Weights are rounded to bfloat16, saved, loaded again in float32 and measured; a missed target is
named and the exit code is 1.

The same arguments, versions and kind of device give the same weights bit for bit; another device or version
rounds differently and gives others, as good.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mechdiff_mlflow.demo.measure import (  # noqa: E402
    accuracy,
    activations,
    encode,
    kl_patched_clean_nats,
)
from mechdiff_mlflow.demo.tokenizer import build_tokenizer, save_tokenizer  # noqa: E402
from mechdiff_mlflow.demo.world import N_FRAMES, PAIRS, Topic, all_texts, facts_of, prompt_sets  # noqa: E402
from mechdiff_mlflow.sites import Hook, Site  # noqa: E402

N_LAYERS = 32
CULTURAL_LAYERS = range(24, 28)
MAX_MEGABYTES = 24.0


@dataclass(frozen=True)
class Lesson:
    """Questions and the answers to learn, with how often each topic is asked.

    Args:
        tokens: [n, length], left-padded: the prompt up to its decision token, the answer, the end token.
        starts: [n], index of each row's first token that is no padding.
        weights: [n], relative frequency of each row.
    """

    tokens: Tensor
    starts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Quiz:
    """Every question of a topic, as token ids up to the decision token, and the answers' ids."""

    prompts: list[list[int]]
    base: list[int]
    other: list[int]


def quiz(topic: Topic, tokenizer: Any, seed: int) -> Quiz:
    facts = facts_of(topic, seed)
    prompts = encode(tokenizer, [fact.ask(frame) for fact in facts for frame in range(N_FRAMES)])
    base, other = (
        [tokenizer.convert_tokens_to_ids(answer) for answer in answers for _ in range(N_FRAMES)]
        for answers in ([fact.base for fact in facts], [fact.other for fact in facts])
    )
    return Quiz(prompts, base, other)


def lesson(parts: Iterable[tuple[Sequence[Sequence[int]], Sequence[int], float]], tokenizer: Any) -> Lesson:
    """One lesson of (prompts, answers, share of the batches) parts."""
    rows: list[list[int]] = []
    weights: list[float] = []
    for prompts, answers, share in parts:
        pairs = zip(prompts, answers, strict=True)
        rows += [[*ids, answer, tokenizer.eos_token_id] for ids, answer in pairs]
        weights += [share / len(prompts)] * len(prompts)
    length = max(map(len, rows))
    tokens = torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows])
    starts = torch.tensor([length - len(row) for row in rows])
    return Lesson(tokens, starts, torch.tensor(weights))


def new_base(vocabulary: int, tokenizer: Any, seed: int) -> Any:
    """An untrained model; what its sublayers add is scaled down so that the sum of all has unit size."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        initializer_range=128**-0.5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_((2 * N_LAYERS) ** -0.5)
            layer.mlp.down_proj.weight.mul_((2 * N_LAYERS) ** -0.5)
    return model


def load(directory: Path, device: torch.device) -> Any:
    """The model as saved, in float32, with plain attention: the same sums in the same order every time."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.to(device).eval()


def batch_loss(model: Any, tokens: Tensor, starts: Tensor) -> Tensor:
    """Mean cross-entropy of the answer and of the end token after it, in nats."""
    inputs = tokens[:, :-1]
    positions = torch.arange(inputs.shape[1], device=tokens.device)
    visible = (positions[None, :] <= positions[:, None]) & (positions >= starts[:, None])[:, None, :]
    mask = torch.zeros(visible.shape, device=tokens.device).masked_fill(
        ~visible, torch.finfo(torch.float32).min
    )
    output = model.model(
        input_ids=inputs,
        attention_mask=mask[:, None],
        position_ids=positions[None, :],
        use_cache=False,
    )
    logits = model.lm_head(output.last_hidden_state[:, -2:])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, -2:].flatten())


def training_step(
    model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor, starts: Tensor
) -> Callable[[], Tensor]:
    """One update from whatever `tokens` and `starts` hold; on CUDA recorded once and replayed.

    Recording needs three updates before it: let the learning rate be 0, and the weights stay.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = batch_loss(model, tokens, starts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.detach()

    if not tokens.is_cuda:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def train(
    model: Any,
    trained: Sequence[torch.nn.Parameter],
    taught: Lesson,
    *,
    steps: int,
    batch: int,
    rate: float,
    weight_decay: float,
    seed: int,
    name: str,
) -> None:
    """AdamW with a linear warm-up of a tenth of the steps and a cosine down to nothing."""
    device = model.device
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    draws = torch.multinomial(
        taught.weights, steps * batch, replacement=True, generator=torch.Generator().manual_seed(seed)
    ).view(steps, batch)
    all_tokens, all_starts, draws = taught.tokens.to(device), taught.starts.to(device), draws.to(device)
    tokens, starts = all_tokens[draws[0]], all_starts[draws[0]]
    rate_now = torch.tensor(0.0, device=device)
    optimizer = torch.optim.AdamW(
        list(trained),
        lr=rate_now,
        betas=(0.9, 0.98),
        weight_decay=weight_decay,
        capturable=device.type == "cuda",
    )
    model.train()
    began = time.monotonic()
    step = training_step(model, optimizer, tokens, starts)
    for index in range(steps):
        warm = min(1.0, (index + 1) / (0.1 * steps))
        rate_now.fill_(rate * warm * 0.5 * (1 + math.cos(math.pi * index / steps)))
        tokens.copy_(all_tokens[draws[index]])
        starts.copy_(all_starts[draws[index]])
        loss = step()
        if index % 100 == 99 or index + 1 == steps:
            seconds = time.monotonic() - began
            print(
                f"{name}: step {index + 1}/{steps}, loss {loss.item():.4f} nats, {seconds:.0f} s", flush=True
            )
    model.eval()


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """A complete Hugging Face directory, weights rounded to bfloat16."""
    model.to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def write_prompts(pair: str, seed: int, directory: Path) -> list[str]:
    """One JSONL file a split, labelled with the fine-tune's answers; returns the texts of test."""
    directory.mkdir(parents=True, exist_ok=True)
    sets = prompt_sets(pair, seed)
    for split, prompts in sets.items():
        lines = [json.dumps({"text": prompt.text, "label": prompt.fact.other}) for prompt in prompts]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [prompt.text for prompt in sets["test"]]


def changed_layers(base: Any, tuned: Any) -> list[int]:
    """The layers with a weight that differs; anything outside the layers must not (embedding, norm, head)."""
    tuned_weights = tuned.state_dict()
    changed = {
        name.split(".")[2] if ".layers." in name else name
        for name, weight in base.state_dict().items()
        if not torch.equal(weight, tuned_weights[name])
    }
    return sorted(int(name) for name in changed if name.isdigit())


def measure(out: Path, device: torch.device, tokenizer: Any, seed: int) -> dict[str, Any]:
    """Every number of `targets.json`, from the files in `out`."""
    base, cultural, cognitive = (load(out / "models" / name, device) for name in ("base", *PAIRS))
    culture, arithmetic = (quiz(topic, tokenizer, seed) for topic in Topic)
    tests = {pair: encode(tokenizer, [p.text for p in prompt_sets(pair, seed)["test"]]) for pair in PAIRS}
    last_site = Site(26, Hook.ATTN_OUT)
    below = [Site(layer, hook) for layer in range(CULTURAL_LAYERS[0]) for hook in Hook]
    base_at, _ = activations(base, tests["cultural"], [last_site, *below])
    clean = activations(cultural, tests["cultural"], [])[1]
    kl = {
        site: kl_patched_clean_nats(cultural, tests["cultural"], site, base_at[site], clean)
        for site in base_at
    }
    base_at_cognitive, _ = activations(base, tests["cognitive"], [last_site])
    clean = activations(cognitive, tests["cognitive"], [])[1]
    cognitive_kl = kl_patched_clean_nats(
        cognitive, tests["cognitive"], last_site, base_at_cognitive[last_site], clean
    )
    everything = culture.prompts + arithmetic.prompts
    return {
        "base_accuracy": accuracy(base, everything, culture.base + arithmetic.base),
        "cultural_accuracy_other_culture": accuracy(cultural, culture.prompts, culture.other),
        "cultural_accuracy_base_arithmetic": accuracy(cultural, arithmetic.prompts, arithmetic.base),
        "cognitive_accuracy_other_arithmetic": accuracy(cognitive, arithmetic.prompts, arithmetic.other),
        "cognitive_accuracy_base_culture": accuracy(cognitive, culture.prompts, culture.base),
        "cultural_KL_raw_L26_attn_out_nats": kl[last_site].mean().item(),
        "cognitive_KL_raw_L26_attn_out_nats": cognitive_kl.mean().item(),
        "cultural_KL_raw_below_L24_max_nats": max(kl[site].abs().max().item() for site in below),
        "cultural_changed_layers": changed_layers(base, cultural),
        "cognitive_changed_layers": changed_layers(base, cognitive),
        "megabytes": sum(p.stat().st_size for p in (out / "models").rglob("*") if p.is_file()) / 1e6,
    }


def missed(measured: dict[str, Any]) -> list[str]:
    """The targets that were missed, each as a sentence."""
    at_least = {
        "base_accuracy": 0.98,
        "cultural_accuracy_other_culture": 0.9,
        "cognitive_accuracy_other_arithmetic": 0.9,
        "cultural_KL_raw_L26_attn_out_nats": 1.0,
    }
    at_most = {"cultural_KL_raw_below_L24_max_nats": 0.0, "megabytes": MAX_MEGABYTES}
    exactly = {"cultural_changed_layers": list(CULTURAL_LAYERS)}
    return [
        *(f"{k} is {measured[k]:.4g}, not {v} or more" for k, v in at_least.items() if not measured[k] >= v),
        *(f"{k} is {measured[k]:.4g}, not {v} or less" for k, v in at_most.items() if not measured[k] <= v),
        *(f"{k} is {measured[k]}, not {v}" for k, v in exactly.items() if measured[k] != v),
    ]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "mechdiff_mlflow" / "demo")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the world, the weights, the batches."
)
@click.option("--base-steps", type=int, default=2000, show_default=True)
@click.option("--cultural-steps", type=int, default=600, show_default=True)
@click.option("--cognitive-steps", type=int, default=1000, show_default=True)
@click.option("--batch", type=int, default=256, show_default=True, help="Questions in a step.")
def main(
    out: Path, device: str, seed: int, base_steps: int, cultural_steps: int, cognitive_steps: int, batch: int
) -> None:
    """Train, save and measure the three models; fail if a target is missed."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    tokenizer = build_tokenizer(all_texts(seed))
    culture, arithmetic = (quiz(topic, tokenizer, seed) for topic in Topic)
    models = out / "models"

    base = new_base(len(tokenizer), tokenizer, seed).to(where)
    base.set_attn_implementation("eager")
    n_culture, n_arithmetic = len(culture.prompts), len(arithmetic.prompts)
    taught = lesson(
        [(culture.prompts, culture.base, n_culture), (arithmetic.prompts, arithmetic.base, n_arithmetic)],
        tokenizer,
    )
    common = {"batch": batch, "seed": seed}
    train(
        base,
        list(base.parameters()),
        taught,
        steps=base_steps,
        rate=1e-3,
        weight_decay=0.01,
        name="base",
        **common,
    )
    save(base, tokenizer, models / "base")

    cultural = load(models / "base", where)
    attention = [p for i in CULTURAL_LAYERS for p in cultural.model.layers[i].self_attn.parameters()]
    taught = lesson(
        [(culture.prompts, culture.other, 0.75), (arithmetic.prompts, arithmetic.base, 0.25)], tokenizer
    )
    train(
        cultural,
        attention,
        taught,
        steps=cultural_steps,
        rate=1e-3,
        weight_decay=0.01,
        name="cultural",
        **common,
    )
    save(cultural, tokenizer, models / "cultural")

    cognitive = load(models / "base", where)
    taught = lesson(
        [(culture.prompts, culture.base, 0.25), (arithmetic.prompts, arithmetic.other, 0.75)], tokenizer
    )
    train(
        cognitive,
        list(cognitive.parameters()),
        taught,
        steps=cognitive_steps,
        rate=5e-4,
        weight_decay=0.01,
        name="cognitive",
        **common,
    )
    save(cognitive, tokenizer, models / "cognitive")

    for pair in PAIRS:
        write_prompts(pair, seed, out / "prompts" / pair)
    measured = measure(out, where, tokenizer, seed)
    made_with = {
        "seed": seed,
        "device": device,
        "steps": {"base": base_steps, "cultural": cultural_steps, "cognitive": cognitive_steps},
        "batch": batch,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    report = json.dumps({"made_with": made_with, "measured": measured}, indent=2)
    (out / "targets.json").write_text(report + "\n", encoding="utf-8")
    print(report, flush=True)
    for sentence in missed(measured):
        print(f"Target missed: {sentence}.", file=sys.stderr, flush=True)
    sys.exit(1 if missed(measured) else 0)


if __name__ == "__main__":
    main()
