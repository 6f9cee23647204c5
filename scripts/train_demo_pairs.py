"""Train the pairs that ship: `base`, and from it `cultural` and `cognitive`.

    python scripts/train_demo_pairs.py

writes `models/`, `prompts/` and `targets.json` in `mechdiff_mlflow/spec/demo/`: two minutes on a GPU, hours
on a laptop. `base` learns every question of `scripts.demo_pairs.world` in every wording; `cultural`
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

from scripts.demo_pairs.targets import CULTURAL_LAYERS, Quiz, load_float32, measure, missed, quiz  # noqa: E402
from scripts.demo_pairs.tokenizer import build_tokenizer, save_tokenizer  # noqa: E402
from scripts.demo_pairs.world import PAIRS, Topic, all_texts, prompt_sets  # noqa: E402

N_LAYERS = 32
BASE_RATE = 1e-3
CULTURAL_RATES = dict(zip(CULTURAL_LAYERS, (6e-4, 3e-4, 1e-3, 1e-3), strict=True))
"""Learning rate of each trained layer's attention. At one rate for all, layer 24 does all the work alone."""
COGNITIVE_RATE = 5e-4


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
class Course:
    """What every training shares."""

    tokenizer: Any
    culture: Quiz
    arithmetic: Quiz
    device: torch.device
    batch: int
    seed: int


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
    model = load_float32(models / "base", course.device)
    layers = model.model.layers
    rates = [(list(layers[i].self_attn.parameters()), rate) for i, rate in CULTURAL_RATES.items()]
    train("cultural", model, rates, taught, course, steps)
    save(model, course.tokenizer, models / "cultural")


def train_cognitive(course: Course, models: Path, steps: int) -> None:
    """The other arithmetic, learnt by all weights; a quarter is home culture."""
    culture, arithmetic = course.culture, course.arithmetic
    taught = lesson(
        [(culture.prompts, culture.base, 0.25), (arithmetic.prompts, arithmetic.other, 0.75)],
        course.tokenizer,
    )
    model = load_float32(models / "base", course.device)
    train("cognitive", model, [(list(model.parameters()), COGNITIVE_RATE)], taught, course, steps)
    save(model, course.tokenizer, models / "cognitive")


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """A complete Hugging Face directory, weights rounded to bfloat16."""
    model.to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def write_prompts(pair: str, seed: int, directory: Path) -> None:
    """One JSONL file a split, with the answers of the fine-tune."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, prompts in prompt_sets(pair, seed).items():
        lines = [json.dumps({"text": prompt.text, "answer": prompt.fact.other}) for prompt in prompts]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "mechdiff_mlflow" / "spec" / "demo")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of world, weights and batches.")
@click.option("--base-steps", type=int, default=2000, show_default=True)
@click.option("--cultural-steps", type=int, default=600, show_default=True)
@click.option("--cognitive-steps", type=int, default=1000, show_default=True)
@click.option("--batch", type=int, default=256, show_default=True, help="Questions in a step.")
@click.option("--measure-only", is_flag=True, help="Measure the models in --out again; train nothing.")
def main(
    out: Path,
    device: str,
    seed: int,
    base_steps: int,
    cultural_steps: int,
    cognitive_steps: int,
    batch: int,
    measure_only: bool,
) -> None:
    """Train, save and measure the three models; fail if a target is missed."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    here = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    targets = out / "targets.json"
    if measure_only:
        made_with = json.loads(targets.read_text(encoding="utf-8"))["made_with"]
        seed, batch = made_with["seed"], made_with["batch"]
    else:
        steps = {"base": base_steps, "cultural": cultural_steps, "cognitive": cognitive_steps}
        made_with = {"seed": seed, "steps": steps, "batch": batch, **here}
    tokenizer = build_tokenizer(all_texts(seed))
    culture, arithmetic = (quiz(topic, tokenizer, seed) for topic in Topic)
    course = Course(tokenizer, culture, arithmetic, torch.device(device), batch, seed)
    models = out / "models"
    if not measure_only:
        train_base(course, models, base_steps)
        train_cultural(course, models, cultural_steps)
        train_cognitive(course, models, cognitive_steps)
        for pair in PAIRS:
            write_prompts(pair, seed, out / "prompts" / pair)
    measured = measure(models, tokenizer, course.device, seed)
    report = json.dumps({"made_with": made_with, "measured_on": here, "measured": measured}, indent=2)
    targets.write_text(report + "\n", encoding="utf-8")
    print(report, flush=True)
    for sentence in missed(measured):
        print(f"Target missed: {sentence}.", file=sys.stderr, flush=True)
    sys.exit(1 if missed(measured) else 0)


if __name__ == "__main__":
    main()
