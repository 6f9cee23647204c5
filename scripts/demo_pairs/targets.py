"""What the shipped models must do, and the measurements that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from mechdiff_mlflow.spec.sites import Hook, Site
from scripts.chat_tokens import encode
from scripts.demo_pairs.measure import (
    accuracy,
    activations,
    kl_patched_clean_nats,
    next_token_logits,
)
from scripts.demo_pairs.world import N_FRAMES, PAIRS, Topic, facts_of, prompt_sets

CULTURAL_LAYERS = range(24, 28)
"""Where the cultural fine-tune trains the attention, and nothing else anywhere."""

MAX_MEGABYTES = 24.0
"""Of all files in `models/` together."""


@dataclass(frozen=True)
class Quiz:
    """Every question of a topic, as token ids up to the decision token, and the answers' ids."""

    prompts: list[list[int]]
    base: list[int]
    other: list[int]


def quiz(topic: Topic, tokenizer: Any, seed: int) -> Quiz:
    """The questions of `topic` in all frames."""
    facts = facts_of(topic, seed)
    prompts = encode(tokenizer, [fact.ask(frame) for fact in facts for frame in range(N_FRAMES)])
    base, other = (
        [tokenizer.convert_tokens_to_ids(answer) for answer in answers for _ in range(N_FRAMES)]
        for answers in ([fact.base for fact in facts], [fact.other for fact in facts])
    )
    return Quiz(prompts, base, other)


def load_float32(directory: Path, device: torch.device) -> Any:
    """The model as saved, in float32."""
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()


def raw_kl(base: Any, tuned: Any, prompts: list[list[int]], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """KL_raw of each prompt in nats at each site, [n]: the tuned model with the base's own activation."""
    base_at, _ = activations(base, prompts, sites)
    clean = next_token_logits(tuned, prompts)
    return {site: kl_patched_clean_nats(tuned, prompts, site, base_at[site], clean) for site in sites}


def changed_layers(base: Any, tuned: Any) -> list[int]:
    """The layers in which some weight differs."""
    return [
        index
        for index, (before, after) in enumerate(zip(base.model.layers, tuned.model.layers, strict=True))
        if any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    ]


def measure(models: Path, tokenizer: Any, device: torch.device, seed: int) -> dict[str, Any]:
    """The `measured` part of `targets.json`, from the models saved in a directory.

    Args:
        models: Has the directories base, cultural and cognitive.
        tokenizer: Of all three.
        device: To measure on.
        seed: Of the world.
    """
    culture, arithmetic = (quiz(topic, tokenizer, seed) for topic in Topic)
    base, cultural, cognitive = (load_float32(models / name, device) for name in ("base", *PAIRS))
    cultural_test, cognitive_test = (
        encode(tokenizer, [prompt.text for prompt in prompt_sets(pair, seed)["test"]]) for pair in PAIRS
    )
    shown = [Site(26, Hook.ATTN_OUT), Site(24, Hook.RESID_POST)]
    below = [Site(layer, hook) for layer in range(CULTURAL_LAYERS[0]) for hook in Hook]
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
        (changed == list(CULTURAL_LAYERS), f"cultural changed {changed}, not {list(CULTURAL_LAYERS)}"),
        (
            measured["megabytes"] <= MAX_MEGABYTES,
            f"the models take {measured['megabytes']:.1f} MB, more than {MAX_MEGABYTES}",
        ),
    ]
    return [sentence for met, sentence in checks if not met]
