"""The report of a pair: the Results text filled in, the tables and figures behind it, and what to doubt."""

from __future__ import annotations

from collections.abc import Sequence

from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.report import wording
from mechdiff_mlflow.report.document import Block, Document, bullets, grid
from mechdiff_mlflow.report.evidence import Evidence, Measured
from mechdiff_mlflow.report.figures import bars, curve_figures
from mechdiff_mlflow.report.profiles import atlas_figures, first_difference, heads_blocks, layers_blocks
from mechdiff_mlflow.text import markdown, plain, text_of

LOW_RANK_SHARE = 0.25
"""k ≪ d is said of ranks up to this share of the width."""


def report(evidence: Evidence) -> Document:
    """The whole report of a pair."""
    quoted = evidence.quoted()
    patches = [patch for patch in quoted if patch.source != "atlas"]
    cells = [patch for patch in evidence.patches if patch.source != "atlas"]
    scales = [text for patch in quoted if (text := wording.scale(patch))]
    blocks: list[Block] = [
        (
            f"Pair `{evidence.pair}` (fingerprint `{evidence.fingerprint}`), from {len(evidence.patches)} "
            "patch runs. KL is KL(patched ‖ clean) of the next token in nats, drop is "
            "100·(1 − KL_mapped/KL_raw), skill 100·(1 − KL_mapped/KL of the best control); brackets are 95 % "
            "bootstrap intervals. RQ1 to RQ4 are the research questions: do the representations differ, and "
            "from which layer on; does a linear map causally transport base activations to tuned ones; what "
            "is the smallest rank that suffices; which attention heads carry the difference."
        ),
        "## Results",
        f"**RQ2 (causal transport).** {_conditions(patches)}",
        bullets([wording.transport(patch) for patch in patches] or ["No site yet."]),
        *([bullets(scales)] if scales else ()),
        *_rank_control(evidence),
    ]
    if evidence.atlas is not None:
        blocks.append(f"**Where.** {first_difference(evidence.atlas)}")
    blocks += [
        "## Tables",
        "Quoted above, one row a site:",
        _patch_table(patches),
        *([f"All {len(cells)} cells:", _patch_table(cells)] if cells else ()),
        *curve_figures(evidence.patches),
        *_controls(patches),
    ]
    if evidence.atlas is not None:
        blocks += [
            "## Atlas",
            f"Every layer and hook, from run `{evidence.atlas['run_id'].iloc[0]}`; grey has no value.",
            *atlas_figures(evidence.atlas),
        ]
    if evidence.layers is not None:
        blocks += layers_blocks(evidence.layers)
    for site, table in evidence.heads.items():
        blocks += heads_blocks(site, table)
    blocks += [
        "## Caveats",
        bullets(caveats(evidence)),
        "## Reproduce",
        "\n".join(["```bash", *_commands(evidence), "```"]),
        "## Runs",
        _run_table(evidence),
    ]
    return Document(f"What the fine-tune changed: {evidence.pair}", blocks)


def caveats(evidence: Evidence) -> list[str]:
    """Caveats that apply to these runs."""
    found, quoted = [], evidence.quoted()
    intervals = [p for p in evidence.patches if p.drop is not None and p.drop.low is not None]
    if intervals:
        found.append(
            "Percentile bootstrap intervals under-cover a little when KL has heavy tails (93 % measured for "
            "95 % at n=150)."
        )
    if small := sorted({p.conditions.n for p in evidence.patches if p.conditions.n < wording.SMALL_N}):
        found.append(
            f"Some runs have only n={', '.join(map(str, small))} prompts; their intervals are too narrow."
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


def _conditions(patches: Sequence[Measured]) -> str:
    if not patches:
        return "No site was patched outside an atlas."
    solvers = sorted({f"`{p.solver}` ({p.family} family)" for p in patches})
    conditions = sorted({str(p.conditions) for p in patches})
    return f"{', '.join(solvers)}; {'; '.join(conditions)}."


def _rank_control(evidence: Evidence) -> list[Block]:
    rows = wording.rows_of(evidence.least_ranks)
    if not rows:
        return ["**RQ3 (rank-k control).** Not measured: no sweep has been run."]
    cells = []
    for row in rows:
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
    return [
        (
            "**RQ3 (rank-k control).** The smallest tested rank from which on every rank reaches the target; "
            "k ≪ d is said up to a quarter of the width. Family update counts rank(W − I), content rank(W)."
        ),
        bullets([wording.low_rank(row, evidence.patches, LOW_RANK_SHARE) for row in rows]),
        grid(cells),
    ]


def _patch_table(patches: Sequence[Measured]) -> str:
    return grid(
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


def _run_table(evidence: Evidence) -> str:
    return grid(
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
