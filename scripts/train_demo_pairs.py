"""Train the pairs that ship: `base`, and from it `cultural` and `cognitive`.

    python scripts/train_demo_pairs.py

writes `models/`, `prompts/` and `targets.json` in `mechdiff_mlflow/demo/`: two minutes on a GPU, an hour or
more on a laptop. `base` learns every question of `mechdiff_mlflow.demo.world` in every wording; `cultural`
then learns the other culture with nothing but the attention of four late layers, `cognitive` the other
arithmetic with all weights; each goes on practising the topic that should stay. The loss is on the answer
and on the end token after it. Weights are rounded to bfloat16, saved, loaded again in float32 and measured;
a missed target is named and the exit code is 1.

The same arguments, versions and kind of device give the same weights bit for bit. Another device or version
rounds differently and gives other weights, as good.
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
    next_token_logits,
)
from mechdiff_mlflow.demo.tokenizer import build_tokenizer, save_tokenizer  # noqa: E402
from mechdiff_mlflow.demo.world import N_FRAMES, PAIRS, Topic, all_texts, facts_of, prompt_sets  # noqa: E402
from mechdiff_mlflow.sites import Hook, Site  # noqa: E402

N_LAYERS = 32
BASE_RATE = 1e-3
CULTURAL_RATES = {24: 6e-4, 25: 3e-4, 26: 1e-3, 27: 1e-3}
"""Learning rate of each trained layer's attention. At one rate for all, layer 24 does all the work alone."""
COGNITIVE_RATE, COGNITIVE_DECAY = 1e-3, 0.8
"""Learning rate of the last layer, and the factor from each layer to the one below it."""
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


@dataclass(frozen=True)
class Course:
    """What every training shares."""

    tokenizer: Any
    culture: Quiz
    arithmetic: Quiz
    device: torch.device
    batch: int
    seed: int


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


def new_base(tokenizer: Any, seed: int) -> Any:
    """An untrained model; what its sublayers add is scaled down so that the sum of all has unit size."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
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
    """The model as saved, in float32."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()


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
    name: str,
    model: Any,
    rates: Sequence[tuple[Sequence[Any], float]],
    taught: Lesson,
    course: Course,
    steps: int,
) -> None:
    """AdamW with a linear warm-up over a tenth of the steps and a cosine down to nothing.

    Args:
        name: For the progress lines.
        model: Trained in place.
        rates: Groups of the model's parameters and the learning rate of each; the rest is frozen.
        taught: What to learn.
        course: Batch size and seed.
        steps: Updates.
    """
    device = model.device
    model.requires_grad_(False)
    for parameters, _ in rates:
        for parameter in parameters:
            parameter.requires_grad_(True)
    model.set_attn_implementation("eager")  # plain sums, whose gradient is the same every time
    draws = torch.multinomial(
        taught.weights,
        steps * course.batch,
        replacement=True,
        generator=torch.Generator().manual_seed(course.seed),
    )
    draws = draws.view(steps, course.batch).to(device)
    all_tokens, all_starts = taught.tokens.to(device), taught.starts.to(device)
    tokens, starts = all_tokens[draws[0]], all_starts[draws[0]]
    optimizer = torch.optim.AdamW(
        [{"params": list(parameters), "lr": torch.zeros((), device=device)} for parameters, _ in rates],
        betas=(0.9, 0.98),
        weight_decay=0.01,
        capturable=device.type == "cuda",
    )
    began = time.monotonic()
    step = training_step(model, optimizer, tokens, starts)
    for index in range(steps):
        scale = min(1.0, (index + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * index / steps))
        for group, (_, rate) in zip(optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate * scale)
        tokens.copy_(all_tokens[draws[index]])
        starts.copy_(all_starts[draws[index]])
        loss = step()
        if index % 100 == 99 or index + 1 == steps:
            seconds = time.monotonic() - began
            print(
                f"{name}: step {index + 1}/{steps}, loss {loss.item():.4f} nats, {seconds:.0f} s", flush=True
            )


def train_base(course: Course, models: Path, steps: int) -> None:
    """Home culture and base arithmetic, every question equally often."""
    culture, arithmetic = course.culture, course.arithmetic
    taught = lesson(
        [
            (culture.prompts, culture.base, len(culture.prompts)),
            (arithmetic.prompts, arithmetic.base, len(arithmetic.prompts)),
        ],
        course.tokenizer,
    )
    model = new_base(course.tokenizer, course.seed).to(course.device)
    train("base", model, [(list(model.parameters()), BASE_RATE)], taught, course, steps)
    save(model, course.tokenizer, models / "base")


def train_cultural(course: Course, models: Path, steps: int) -> None:
    """The other culture, learnt by the attention of a few late layers; a quarter is base arithmetic."""
    culture, arithmetic = course.culture, course.arithmetic
    taught = lesson(
        [(culture.prompts, culture.other, 0.75), (arithmetic.prompts, arithmetic.base, 0.25)],
        course.tokenizer,
    )
    model = load(models / "base", course.device)
    layers = model.model.layers
    rates = [(list(layers[i].self_attn.parameters()), rate) for i, rate in CULTURAL_RATES.items()]
    train("cultural", model, rates, taught, course, steps)
    save(model, course.tokenizer, models / "cultural")


def train_cognitive(course: Course, models: Path, steps: int) -> None:
    """The other arithmetic, learnt by all weights, the late layers fastest; a quarter is home culture."""
    culture, arithmetic = course.culture, course.arithmetic
    taught = lesson(
        [(culture.prompts, culture.base, 0.25), (arithmetic.prompts, arithmetic.other, 0.75)],
        course.tokenizer,
    )
    model = load(models / "base", course.device)
    slowest = COGNITIVE_RATE * COGNITIVE_DECAY**N_LAYERS
    rates = [
        (list(model.model.embed_tokens.parameters()), slowest),
        *(
            (list(layer.parameters()), COGNITIVE_RATE * COGNITIVE_DECAY ** (N_LAYERS - 1 - i))
            for i, layer in enumerate(model.model.layers)
        ),
        ([*model.model.norm.parameters(), *model.lm_head.parameters()], COGNITIVE_RATE),
    ]
    train("cognitive", model, rates, taught, course, steps)
    save(model, course.tokenizer, models / "cognitive")


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """A complete Hugging Face directory, weights rounded to bfloat16."""
    model.to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def write_prompts(pair: str, seed: int, directory: Path) -> None:
    """One JSONL file a split, labelled with the fine-tune's answers."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, prompts in prompt_sets(pair, seed).items():
        lines = [json.dumps({"text": prompt.text, "label": prompt.fact.other}) for prompt in prompts]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def changed_layers(base: Any, tuned: Any) -> list[int]:
    """The layers in which some weight differs."""
    return [
        index
        for index, (before, after) in enumerate(zip(base.model.layers, tuned.model.layers, strict=True))
        if any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    ]


def raw_kl(base: Any, tuned: Any, prompts: list[list[int]], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """KL_raw of each prompt in nats at each site, [n]: the tuned model with the base's own activation."""
    base_at, _ = activations(base, prompts, sites)
    clean = next_token_logits(tuned, prompts)
    return {site: kl_patched_clean_nats(tuned, prompts, site, base_at[site], clean) for site in sites}


def measure(course: Course, models: Path) -> dict[str, Any]:
    """Every number of `targets.json`, from the models as saved."""
    culture, arithmetic = course.culture, course.arithmetic
    base, cultural, cognitive = (load(models / name, course.device) for name in ("base", *PAIRS))
    cultural_test, cognitive_test = (
        encode(course.tokenizer, [prompt.text for prompt in prompt_sets(pair, course.seed)["test"]])
        for pair in PAIRS
    )
    shown = [Site(26, Hook.ATTN_OUT), Site(24, Hook.RESID_POST)]
    below = [Site(layer, hook) for layer in range(min(CULTURAL_RATES)) for hook in Hook]
    cultural_kl = raw_kl(base, cultural, cultural_test, [*shown, *below])
    cognitive_kl = raw_kl(base, cognitive, cognitive_test, shown)
    everything, right = culture.prompts + arithmetic.prompts, culture.base + arithmetic.base
    return {
        "base_accuracy": accuracy(base, everything, right),
        "cultural_accuracy_other_culture": accuracy(cultural, culture.prompts, culture.other),
        "cultural_accuracy_base_arithmetic": accuracy(cultural, arithmetic.prompts, arithmetic.base),
        "cognitive_accuracy_other_arithmetic": accuracy(cognitive, arithmetic.prompts, arithmetic.other),
        "cognitive_accuracy_base_culture": accuracy(cognitive, culture.prompts, culture.base),
        "cultural_KL_raw_nats": {str(site): cultural_kl[site].mean().item() for site in shown},
        "cultural_KL_raw_below_first_trained_layer_max_nats": max(
            cultural_kl[site].abs().max().item() for site in below
        ),
        "cognitive_KL_raw_nats": {str(site): cognitive_kl[site].mean().item() for site in shown},
        "cultural_changed_layers": changed_layers(base, cultural),
        "cognitive_changed_layers": changed_layers(base, cognitive),
        "megabytes": sum(path.stat().st_size for path in models.rglob("*") if path.is_file()) / 1e6,
    }


def missed(measured: dict[str, Any]) -> list[str]:
    """The targets that were missed, each as a sentence."""
    kl_shown = measured["cultural_KL_raw_nats"]["L26/attn_out"]
    kl_below = measured["cultural_KL_raw_below_first_trained_layer_max_nats"]
    changed = measured["cultural_changed_layers"]
    checks = [
        *(
            (measured[name] >= least, f"{name} is {measured[name]:.4f}, less than {least}")
            for name, least in (
                ("base_accuracy", 0.98),
                ("cultural_accuracy_other_culture", 0.9),
                ("cognitive_accuracy_other_arithmetic", 0.9),
            )
        ),
        (kl_shown >= 1.0, f"cultural KL_raw at L26/attn_out is {kl_shown:.3f} nats, less than 1"),
        (
            kl_below == 0.0,
            f"cultural KL_raw below the trained layers is up to {kl_below:.1e} nats, not 0",
        ),
        (changed == sorted(CULTURAL_RATES), f"cultural changed {changed}, not {sorted(CULTURAL_RATES)}"),
        (
            measured["megabytes"] <= MAX_MEGABYTES,
            f"the models take {measured['megabytes']:.1f} MB, more than {MAX_MEGABYTES}",
        ),
    ]
    return [sentence for met, sentence in checks if not met]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "mechdiff_mlflow" / "demo")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of world, weights and batches.")
@click.option("--base-steps", type=int, default=2000, show_default=True)
@click.option("--cultural-steps", type=int, default=600, show_default=True)
@click.option("--cognitive-steps", type=int, default=600, show_default=True)
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
    tokenizer = build_tokenizer(all_texts(seed))
    culture, arithmetic = (quiz(topic, tokenizer, seed) for topic in Topic)
    course = Course(tokenizer, culture, arithmetic, torch.device(device), batch, seed)
    models = out / "models"
    train_base(course, models, base_steps)
    train_cultural(course, models, cultural_steps)
    train_cognitive(course, models, cognitive_steps)
    for pair in PAIRS:
        write_prompts(pair, seed, out / "prompts" / pair)
    measured = measure(course, models)
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
