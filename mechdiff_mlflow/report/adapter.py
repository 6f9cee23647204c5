"""The README of an adapter: what it is, how to load it, how close it brings base to tuned."""

from __future__ import annotations

import json

from mechdiff_mlflow.experiments.adapting import CEILING, AdapterRecord
from mechdiff_mlflow.maps.affine import AffineMap, Family
from mechdiff_mlflow.maps.selection import META, REMEDY, sentence
from mechdiff_mlflow.models.map_adapters import Form
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.report import wording
from mechdiff_mlflow.text import text_of

LITTLE_PCT = 5.0
"""Part of the way to tuned below which an adapter does next to nothing."""
CLOSENESS_HEADS = ("base with", "KL(it ‖ tuned), nats", "of the way to tuned, %", "tuned's top token")

_PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/to/this/directory")"""
_HOOK = """\
import sys
sys.path.insert(0, "path/to/this/directory")
import load_hook  # 40 lines beside this file; torch and safetensors are all it needs
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base})
handle = load_hook.attach(model)  # handle.remove() takes it away"""


def adapter_card(record: AdapterRecord, the_map: AffineMap, pair: Pair) -> str:
    """Markdown for the directory that `make_adapter` filled."""
    is_peft = record.form is Form.PEFT
    what = f"a PEFT LoRA of rank {record.rank}" if is_peft else "a map with a forward hook"
    header = ["---", "library_name: peft", "---", ""] if is_peft else []
    checkpoint = pair.base.checkpoint
    base = json.dumps(checkpoint.source)
    base += f', gguf_file="{checkpoint.gguf_file}", dtype="float32"' if checkpoint.gguf_file else ""
    lines = [
        *header,
        f"# The base of {pair.name}, made to act as tuned at {record.site}",
        "",
        headline(record),
        "",
        f"This is {what} on `{record.target}`. It sends the activation h at {record.site} "
        f"({wording.WHERE[record.site.hook.value].format(layer=record.site.layer)}) to "
        f"α·((h − μ_base)·W + μ_tuned) at every token, α = {text_of(record.alpha)}. The map was fitted "
        "by mechdiff on activations of base and tuned at the decision token, the last of the prompt; nothing "
        "was trained.",
        "",
        "## How to load it",
        "",
        "```python",
        (_PEFT if is_peft else _HOOK).format(base=base),
        "```",
        "",
        f"The base must be the one it was made for: `{pair.spec.base.model}`, {pair.base.revision}.",
        *([_about_rank(record, the_map)] if is_peft else []),
        "",
        "## How close base comes to tuned",
        "",
        *_table(record),
        "",
        "## Where it comes from",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in sorted(the_map.meta.items()) if key != META),
        f"| sha256 of the map | {the_map.sha256()} |",
        "",
    ]
    return "\n".join(lines)


def headline(record: AdapterRecord) -> str:
    """How far it goes, in a sentence that says so where that is next to nothing."""
    if not record.closeness:
        return "How close it brings base to tuned is not measured: their vocabularies differ."
    way, most = (record.closeness[name].closer_pct for name in ("adapter", CEILING))
    far = f"{wording.percent(way, '.3g')} % of the way to tuned, on {record.n} {record.split} prompts"
    far += f" (at the decision token no map there can do more than {wording.percent(most, '.3g')} %)"
    if way.estimate is None:
        return "Base and tuned say the same, so there is no way to go."
    if wording.below(way):
        return f"**This adapter does harm**: it takes base {far}."
    if not wording.above(way):
        return f"**Nobody can tell that this adapter helps**: it takes base {far}."
    if way.estimate < LITTLE_PCT:
        return f"**This adapter does next to nothing**: it takes base {far}."
    return f"It takes base **{far.replace(' %', ' %**', 1)}."


def _about_rank(record: AdapterRecord, the_map: AffineMap) -> str:
    exact = "Nothing of the map is lost: its linear part is in lora_A and lora_B, its means in lora_B's bias."
    scaled = (
        f" Its rank is that of α·W − I: α = {text_of(record.alpha)} scales every direction, so it is full; "
        "α = 1 would give the rank of W − I."
        if record.alpha != 1 and record.rank != the_map.weight_rank(Family.UPDATE)
        else ""
    )
    merging = (
        "" if record.merges else " The layer has no bias in base, so PEFT cannot merge the adapter into it."
    )
    return exact + scaled + merging


def _table(record: AdapterRecord) -> list[str]:
    if not record.closeness:
        return ["Not measured: base and tuned have different vocabularies, so their outputs do not compare."]
    return [
        f"Next-token distributions after {record.n} {record.split} prompts, against the tuned model's; 95 % "
        "bootstrap intervals.",
        "",
        f"| {' | '.join(CLOSENESS_HEADS)} |",
        "|---|---|---|---|",
        *(f"| {' | '.join(cells)} |" for cells in closeness_rows(record)),
        "",
        "The third line puts tuned's own activation there, at the decision token: the most that a map can "
        "do at that token; the rest of the way is due to other places. The adapter acts on the tokens "
        "before it too.",
        *leak_lines(record),
    ]


def leak_lines(record: AdapterRecord) -> list[str]:
    """Caveat about how the map was chosen, and what helps; none where nothing was."""
    text = sentence(record.leak)
    return [f"{text}. For a number without that, {REMEDY}."] if text else []


def closeness_rows(record: AdapterRecord) -> list[tuple[str, str, str, str]]:
    """A line for each thing done to base, as `CLOSENESS_HEADS` heads them."""
    names = {
        "base": "nothing",
        CEILING: "tuned's own activation there, at the decision token",
        "adapter": "the adapter, at every token",
    }
    rows = []
    for name, found in record.closeness.items():
        way = "" if name == "base" else wording.percent(found.closer_pct, ".4g")
        rows.append(
            (names.get(name, f"the {name}"), wording.percent(found.kl, ".4g"), way, f"{found.top1:.2f}")
        )
    return rows
