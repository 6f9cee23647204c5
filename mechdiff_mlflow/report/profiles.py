"""Layers (RQ1) and heads (RQ4) in a report: figures and the sentences that the tables allow."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from mechdiff_mlflow.measures.stats import above_floor
from mechdiff_mlflow.report.document import Block, Bullets, Grid, Heading, Text
from mechdiff_mlflow.report.figures import Curve, Figure, curves

HALF, MOST = 0.5, 0.9


def layer_figures(table: pd.DataFrame) -> list[Figure]:
    """CKA over layers, and the KL of unmapped layer patches in both directions."""
    layers = [float(layer) for layer in table["layer"]]
    none = [float("nan")] * len(layers)
    known = table.dropna(subset=["cka"])
    cka = Curve(
        "debiased CKA", [float(v) for v in known["layer"]], list(known["cka"]), *([none[: len(known)]] * 2)
    )
    patches = [
        Curve(name, layers, list(table[key]), list(table[f"{key}_low"]), list(table[f"{key}_high"]))
        for name, key in (("tuned ← base", "KL_tuned_from_base"), ("base ← tuned", "KL_base_from_tuned"))
    ]
    return [
        curves("layers-cka", "Likeness of base and tuned", [cka], x_label="layer", y_label="CKA"),
        curves(
            "layers-patch",
            "Unmapped layer patch at resid_post",
            patches,
            x_label="layer",
            y_label="KL, nats",
        ),
    ]


def layers_blocks(table: pd.DataFrame, run_id: str) -> list[Block]:
    """The RQ1 section."""
    return [
        Heading("Layers (RQ1)"),
        Text(f"**RQ1 (where).** {layers_sentence(table)} Run `{run_id}`."),
        *layer_figures(table),
    ]


def layers_sentence(table: pd.DataFrame) -> str:
    """Where CKA is least, and from which layer on a patch matters."""
    known = table.dropna(subset=["cka"])
    parts = []
    if len(known):
        least = known.iloc[int(known["cka"].to_numpy().argmin())]
        parts.append(f"CKA is least, {least['cka']:.3f}, after layer {int(least['layer'])}.")
    for name, key in (("base into tuned", "KL_tuned_from_base"), ("tuned into base", "KL_base_from_tuned")):
        floors = table.get(f"floor_{key.removeprefix('KL_')}", 0 * table[key])
        moving = table[[above_floor(kl, floor) for kl, floor in zip(table[key], floors, strict=True)]]
        if not len(moving):
            parts.append(f"Patching {name} changes nothing that can be told from noise, at any layer.")
            continue
        top = table.iloc[int(table[key].to_numpy().argmax())]
        parts.append(
            f"Patching {name} first changes the next token's distribution after layer "
            f"{int(moving.iloc[0]['layer'])} and most after layer {int(top['layer'])} ({top[key]:.3g} nats)."
        )
    return " ".join(parts)


def heads_figures(table: pd.DataFrame) -> list[Figure]:
    """Coverage over the number of heads: greedy against random sets."""
    site = str(table["site"].iloc[0])
    lines = []
    for kind in ("greedy", "random"):
        rows = table[table["choice"] == kind].sort_values("size")
        lines.append(
            Curve(
                kind,
                [float(v) for v in rows["size"]],
                *([float(v) for v in rows[key]] for key in ("coverage", "coverage_low", "coverage_high")),
            )
        )
    slug = site.replace("/", "-")
    return [
        curves(
            f"heads-{slug}",
            f"{site}: share of the effect that some heads carry",
            lines,
            x_label="number of heads replaced",
            y_label="coverage KL_S / KL_all",
        )
    ]


def heads_sentence(table: pd.DataFrame) -> str:
    """How few heads carry half and most of the effect, and whether that beats random heads."""
    site, n_heads = str(table["site"].iloc[0]), int(table["n_heads"].iloc[0])
    greedy = table[table["choice"] == "greedy"].sort_values("size")
    random = table[table["choice"] == "random"].set_index("size")
    parts = []
    for share in (HALF, MOST):
        enough = greedy[greedy["coverage"] >= share]
        row = enough.iloc[0]  # all heads together always reach it
        if int(row["size"]) == n_heads:
            parts.append(f"It takes all {n_heads} heads to carry {100 * share:.0f} % of the effect.")
            continue
        by_chance = random.loc[int(row["size"])]
        beats = row["coverage_low"] > by_chance["coverage_high"]
        against = (
            f"random sets of that size {by_chance['coverage']:.2f} "
            f"[{by_chance['coverage_low']:.2f}, {by_chance['coverage_high']:.2f}]"
        )
        verdict = "" if beats else "; the intervals overlap, so no evidence that these heads are special"
        parts.append(
            f"Heads {row['heads']} ({int(row['size'])} of {n_heads}) carry {row['coverage']:.2f} "
            f"[{row['coverage_low']:.2f}, {row['coverage_high']:.2f}] of it, {against}{verdict}."
        )
    return f"Replacing all heads at `{site}` costs {table['KL_all'].iloc[0]:.4g} nats. " + " ".join(parts)


def heads_blocks(site: str, table: pd.DataFrame) -> list[Block]:
    """The RQ4 section of one site."""
    single = table[table["choice"] == "single"].sort_values("coverage", ascending=False)
    rows: Sequence[Sequence[str]] = [
        [str(r["heads"]), f"{r['KL']:.4g}", f"{r['coverage']:.3f}"] for r in single.to_dict("records")
    ]
    return [
        Heading(f"Heads of {site} (RQ4)"),
        Text(f"**RQ4 (heads).** {heads_sentence(table)}"),
        Bullets(
            [
                "Heads are replaced before o_proj, on val chosen greedily, reported on the report split.",
                "Coverage need not add up: heads interact through everything downstream.",
            ]
        ),
        Grid(("head alone", "KL, nats", "coverage"), rows),
        *heads_figures(table),
    ]
