"""The report of a pair: the answer in sentences, the tables and figures behind it, and what to doubt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.measures.bootstrap import may_be_unseen
from mechdiff_mlflow.report import answers, wording
from mechdiff_mlflow.report.document import Block, Document, Grid, bullets
from mechdiff_mlflow.report.evidence import Evidence, Measured
from mechdiff_mlflow.report.figures import bars, curve_figures
from mechdiff_mlflow.report.profiles import (
    MOST_SITES,
    atlas_figures,
    heads_blocks,
    layers_blocks,
    where,
)
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.prompts import FEW
from mechdiff_mlflow.spec.sites import SUBLAYERS
from mechdiff_mlflow.text import markdown, plain, text_of

N_SHOWN = 10
"""Prompts shown with their next tokens."""
LOW_RANK_SHARE = 0.25
"""k ≪ d is said of ranks up to this share of the width."""


RESEARCH_QUESTIONS = (
    "Research questions of the original experiment: RQ1 (do the representations differ, and from which layer "
    "on?) is answered by *Where* and *Layers*, RQ2 (does a linear map causally transport base activations to "
    "tuned ones?) by *How*, RQ3 (what is the smallest rank that suffices?) by *How low-rank*, RQ4 (which "
    "attention heads carry the difference?) by *Heads*."
)


def report(
    evidence: Evidence,
    spec: PairSpec | None,
    *,
    min_effect_nats: float,
    table: Callable[[str, str], pd.DataFrame | None] = lambda run_id, path: None,
) -> Document:
    """The whole report of a pair: the answer first, what it rests on below.

    `table` gives the table of a run, by its id, at a path, where there is one.
    """
    quoted = evidence.quoted()
    patches = [patch for patch in quoted if patch.source != "atlas"]
    cells = [patch for patch in evidence.patches if patch.source != "atlas"]
    shown = answering(quoted, min_effect_nats)
    blocks: list[Block] = [
        _models(evidence, spec),
        *_accuracy(shown),
        "## Where",
        *_where(evidence, min_effect_nats),
        "## How",
        *_how(shown, min_effect_nats),
        "## How low-rank",
        _low_rank(evidence, shown, min_effect_nats),
        "## How sure",
        _how_sure(evidence, shown),
        *(_before_and_after(shown[0], table(shown[0].run_id, "per_prompt.json")) if shown else ()),
        "## Tables",
        "Quoted above, one row a site:",
        _patch_table(shown),
        *answers.blocks(shown, table),
        *([f"All {len(cells)} cells:", _patch_table(cells)] if cells else ()),
        *_rank_table(evidence),
        *curve_figures(evidence.patches),
        *_controls(patches or shown),
    ]
    if evidence.atlas is not None:
        blocks += [
            "## Atlas",
            f"Every layer and hook, from run `{evidence.atlas['run_id'].iloc[0]}`; grey has no value, or no "
            f"effect (KL_raw below {min_effect_nats:g} nats).",
            *atlas_figures(evidence.atlas, min_effect_nats),
        ]
    if evidence.layers is not None:
        blocks += layers_blocks(evidence.layers)
    for site, heads in evidence.heads.items():
        blocks += heads_blocks(site, heads)
    blocks += [
        "## Caveats",
        bullets(caveats(evidence)),
        "## Reproduce",
        "\n".join(["```bash", *_commands(evidence), "```"]),
        "## Runs",
        _run_table(evidence),
        RESEARCH_QUESTIONS,
    ]
    return Document(f"What the fine-tune changed: {evidence.pair}", blocks)


def answering(quoted: Sequence[Measured], min_effect_nats: float) -> list[Measured]:
    """The patches that the answer quotes: of an atlas only attention and MLP outputs with an effect.

    Those come first, by falling KL_raw.
    """
    places = [patch for patch in quoted if _is_place(patch, min_effect_nats)]
    others = [patch for patch in quoted if patch not in places and patch.source != "atlas"]
    return [
        *sorted(places, key=lambda patch: patch.kl_raw or 0.0, reverse=True),
        *sorted(others, key=lambda patch: patch.kl_raw or 0.0, reverse=True),
    ]


def how(patches: Sequence[Measured], min_effect_nats: float) -> list[str]:
    """Sentences: at how many sites with an effect a map carries it, then one a patch, and one on its α."""
    if not patches:
        return ["No site with an effect has been patched yet."]
    places = [patch for patch in patches if _is_place(patch, min_effect_nats)]
    carried = [p for p in places if wording.above(p.drop) and wording.above(p.skill)]
    said = [
        f"A linear map carries the difference at {len(carried)} of the {len(places)} such sites that were "
        "patched: its drop and its skill over the best control lie above 0."
    ]
    for patch in patches[:MOST_SITES]:
        said += [wording.transport(patch, min_effect_nats), answers.sentence(patch)]
        said.append(wording.scale(patch) or "")
    if len(patches) > MOST_SITES:
        said.append(f"{len(patches) - MOST_SITES} more were patched; the table shows them all.")
    return [text for text in said if text]


def _how(patches: Sequence[Measured], min_effect_nats: float) -> list[Block]:
    first, *rest = how(patches, min_effect_nats)
    return [first, bullets(rest)] if rest else [first]


def _is_place(patch: Measured, min_effect_nats: float) -> bool:
    """Whether it is at an attention or MLP output with an effect."""
    return patch.site.hook in SUBLAYERS and not wording.negligible(patch, min_effect_nats)


def _models(evidence: Evidence, spec: PairSpec | None) -> str:
    """Which models these are, by name where the pair has a spec, and by revision."""
    if spec is None:
        return "**Base** is {}, **tuned** is {}.".format(*evidence.revisions)
    base, changed = evidence.revisions
    return (
        f"**Base** is `{markdown(spec.base.model, 80)}` ({base}), **tuned** is "
        f"`{markdown(spec.tuned.name, 80)}` ({changed}). {markdown(spec.description)}"
    ).rstrip()


def _accuracy(patches: Sequence[Measured]) -> list[str]:
    """How often base and tuned are right, where answers are known; a report pass has the most prompts."""
    known = [patch for patch in patches if {"base", "tuned"} <= patch.accuracy.keys()]
    if not known:
        return []
    best = max(known, key=lambda patch: patch.conditions.n)
    base, tuned = (f"**{100 * best.accuracy[role]:.1f} %**" for role in ("base", "tuned"))
    return [
        "**Accuracy**: the most probable next token is the first token of the answer in "
        f"{base} of prompts for base and in {tuned} for tuned ({best.conditions.n} {best.conditions.split} "
        "prompts)."
    ]


def _before_and_after(patch: Measured, table: pd.DataFrame | None) -> list[Block]:
    """What the models say next to ten prompts of a patch run; nothing for runs of earlier versions."""
    if table is None:
        return []
    texts, kls, chances = [f"says_{name}" for name in answers.WHO], ["KL_answer_raw", "KL_answer_mapped"], []
    what = f"Greedy answers of up to {patch.conditions.answer_tokens} tokens"
    if not {*texts, *kls} <= {*table.columns}:
        texts, chances = [[f"{start}_{name}" for name in answers.WHO] for start in ("top", "p")]
        what, kls = "The most probable next token and its probability", ["KL_raw", "KL_mapped"]
    numbers = [*kls, *chances]
    if not {*numbers, *texts, "prompt"} <= {*table.columns}:
        return []
    table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce")
    order = (table[kls[0]] - table[kls[1]]).sort_values(kind="stable").index
    places = sorted({round(i * (len(order) - 1) / (N_SHOWN - 1)) for i in range(N_SHOWN)})
    rows = []
    for row in table.loc[[order[place] for place in places]].to_dict("records"):
        cells = {"prompt": markdown(row["prompt"], 120)}
        cells |= {"answer": markdown(row["answer"] or "", 40)} if "answer" in table else {}
        for i, name in enumerate(answers.WHO):
            cells[name] = f"`{wording.token(row[texts[i]], 80)}`"
            cells[name] += f" {row[chances[i]]:.2f}" if chances else ""
        rows.append(cells | {f"{key}, nats": wording.number(row[key], 3) for key in kls})
    return [
        "## Before and after",
        f"{what}: of base, of tuned, and of tuned with base's "
        f"activation at `{patch.site}` (α={text_of(patch.alpha)}, k={patch.rank}), raw and mapped. Of "
        f"{len(order)} {markdown(patch.conditions.split)} prompts, sorted by {' − '.join(kls)}, these "
        f"{len(rows)} stand at even steps from the first, which the map serves worst, to the last, which it "
        "serves best. ␣ is a space, ⏎ a line break.",
        Grid(rows),
    ]


def _where(evidence: Evidence, min_effect_nats: float) -> list[Block]:
    if evidence.atlas is None:
        return [f"Not measured: no atlas has been run; run `mechdiff atlas --pair {evidence.pair}`."]
    first, *sites, last = where(evidence.atlas, min_effect_nats)
    return [first, *([bullets(sites)] if sites else ()), last]


def _how_sure(evidence: Evidence, patches: Sequence[Measured]) -> str:
    conditions = "; ".join(sorted({str(patch.conditions) for patch in patches})) or "no prompts"
    solvers = ", ".join(sorted({f"`{p.solver}` ({p.family} family)" for p in patches})) or "none"
    return (
        f"Measured on {conditions}, with the solver {solvers}; {len(caveats(evidence))} caveats are below. "
        "KL is KL(patched ‖ clean) of the next token in nats, drop is 100·(1 − KL_mapped/KL_raw), skill "
        "100·(1 − KL_mapped/KL of the best control); brackets are 95 % bootstrap intervals."
    )


def caveats(evidence: Evidence) -> list[str]:
    """Caveats that apply to these runs."""
    found, quoted = [], evidence.quoted()
    intervals = [p for p in evidence.patches if p.drop is not None and p.drop.low is not None]
    if intervals:
        found.append(
            "Intervals make room for prompts of a kind that these are not, on which the map does as its "
            "reference, but not for worse ones, and cover 91 to 98 % where KL has heavy tails."
        )
    if few := sorted({p.conditions.n for p in evidence.patches if p.conditions.n < FEW}):
        found.append(
            f"Some runs have only n={', '.join(map(str, few))} prompts, which miss a kind of prompt that is "
            f"{100 * may_be_unseen(few[0], 0.025):.0f} % of all with a probability of 2.5 %."
        )
    if leaking := [p for p in evidence.patches if p.leak]:
        found.append(
            f"{len(leaking)} runs report prompts that something may have been chosen on, at "
            f"{', '.join(sorted({str(p.site) for p in leaking}))}: "
            f"{'; '.join(sorted({p.leak for p in leaking}))}. For a number without that choice, "
            f"{selection.REMEDY}."
        )
    if floor := sorted({p.site for p in evidence.patches if "drop_pct" in p.undefined}):
        found.append(
            f"No drop is defined at {', '.join(map(str, floor))}: below the noise floor or no raw patch."
        )
    for one in quoted:
        if one.picked_among > 1 and one.source != "atlas":
            found.append(
                f"`{one.site}` quotes the best of {one.picked_among} cells, picked on the reported "
                f"prompts. For a number without that choice, promote it, then {selection.REMEDY}."
            )
    if len({p.conditions for p in evidence.patches}) > 1:
        found.append(
            "Runs differ in prompts, split or seed; the tables say which, and no sentence mixes them."
        )
    if len(quoted) > 1:
        found.append("Intervals are per site, not corrected for looking at several; the atlas has Holm's p.")
    if evidence.left_out:
        found.append(
            f"{evidence.left_out} runs of other weights, prompts or dtypes of this pair are left out: their "
            "numbers are not comparable."
        )
    found.append("A drop does not localise a change: sites downstream of it reach high drops too.")
    return found


def _low_rank(evidence: Evidence, shown: Sequence[Measured], min_effect_nats: float) -> str:
    rows = wording.rows_of(evidence.least_ranks)
    if not rows:
        sites = ",".join(str(patch.site) for patch in shown[:2]) or "SITES"
        command = f"mechdiff sweep --pair {evidence.pair} --sites {sites}"
        return f"Not measured: no sweep has been run; run `{command}`."
    return bullets([wording.low_rank(row, evidence.patches, LOW_RANK_SHARE, min_effect_nats) for row in rows])


def _rank_table(evidence: Evidence) -> list[Block]:
    cells = []
    for row in wording.rows_of(evidence.least_ranks):
        k, ends = wording.ranks(row)
        cells.append(
            {
                "site": str(row["site"]),
                "family": str(row["family"]),
                "α": text_of(row["alpha"]),
                "target %": text_of(row["target_pct"]),
                "min k": k,
                "interval": ends,
                "reached in": f"{100 * row['p_reached']:.0f} %",
                "conservative k": wording.rank(row["conservative_k"], int(row["width"])),
                "run": f"`{row['run_id']}`",
            }
        )
    about = (
        "Smallest tested ranks from which on every rank reaches the target; k is called low up to a quarter "
        "of the width. Family update counts rank(W − I), content rank(W)."
    )
    return [about, Grid(cells)] if cells else []


def _patch_table(patches: Sequence[Measured]) -> Grid:
    return Grid(
        [
            {
                "site": str(p.site),
                "solver": p.solver,
                "family": p.family,
                "k": p.rank,
                "α": text_of(p.alpha),
                "split": p.conditions.split,
                "n": str(p.conditions.n),
                "KL_raw": wording.number(p.kl_raw),
                "KL_mapped": wording.number(p.kl_mapped),
                "drop %": wording.percent(p.drop),
                "skill %": wording.percent(p.skill),
                "best control": p.null,
                "floor": wording.number(p.noise_floor, 2),
                "ρ": wording.number(p.rho),
                "settings": p.settings,
                "run": f"`{p.run_id}`",
            }
            for p in patches
        ]
    )


def _controls(patches: Sequence[Measured]) -> list[Block]:
    figures = []
    for patch in patches:
        values = {"mapped": patch.kl_mapped, **patch.controls}
        values |= {} if patch.kl_raw is None else {"raw": patch.kl_raw}
        ordered = dict(sorted(values.items(), key=lambda item: item[1]))
        title = f"{patch.site}: mean KL of the map and of every control"
        figures.append(
            bars(f"controls-{patch.site.slug}", title, ordered, x_label="KL, nats", marked="mapped")
        )
    return ["## Controls", *figures] if figures else []


def _commands(evidence: Evidence) -> list[str]:
    """The commands of the runs quoted, oldest first, each once."""
    if "tag.mechdiff.command" not in evidence.parents:
        return []
    commands = evidence.parents.sort_values("started")["tag.mechdiff.command"].dropna()
    ours = [
        plain(str(text)) for text in commands if str(text).startswith("mechdiff ") and "\n" not in str(text)
    ]
    return [*dict.fromkeys(ours), f"mechdiff report --pair {evidence.pair}"]


def _run_table(evidence: Evidence) -> Grid:
    return Grid(
        [
            {
                "run": f"`{row['run_id']}`",
                "kind": markdown(row["kind"]),
                "name": markdown(row["name"]),
                "started": f"{row['started']:%Y-%m-%d %H:%M} UTC",
            }
            for row in wording.rows_of(evidence.parents.sort_values("started"))
        ]
    )
