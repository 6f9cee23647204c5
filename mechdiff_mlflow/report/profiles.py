"""Atlas, layers and heads: figures, and the sentences that their tables allow."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mechdiff_mlflow.measures.stats import above_floor
from mechdiff_mlflow.report.document import Block, bullets, grid
from mechdiff_mlflow.report.figures import Curve, Figure, curves, heatmap
from mechdiff_mlflow.spec.sites import Hook

_HOOKS = tuple(str(hook) for hook in Hook)
_SHARES = (0.5, 0.9)
"""Shares of the effect of all heads: how few heads carry them?"""


def atlas_figures(table: pd.DataFrame) -> list[Figure]:
    """KL_raw, drop, skill, ρ and where KL_raw is above its floor, layers × hooks, of an atlas's table."""

    def drawn(key: str, title: str, unit: str = "", **scale: Any) -> Figure:
        numbers = table.assign(value=pd.to_numeric(table[key]))
        wide = numbers.pivot(index="layer", columns="hook", values="value")
        values = wide.reindex(columns=list(_HOOKS)).to_numpy(dtype=float)  # NaN where there is no value
        rows = [f"L{int(layer)}" for layer in wide.index]
        name = f"atlas-{key.replace('_', '-').lower()}"
        return heatmap(name, title, values, rows=rows, columns=_HOOKS, unit=unit, **scale)

    diverging: dict[str, Any] = {"diverging": True, "bounds": (-100, 100)}
    return [
        drawn("KL_raw", "KL of the raw cross-patch", "nats"),
        drawn("drop_pct", "KL drop of the mapped patch", "%", **diverging),
        drawn("skill_pct", "skill over the best control", "%", **diverging),
        drawn("rho", "ρ: part of the change that the map leaves", bounds=(0, 1)),
        drawn("above_floor", "KL_raw above ten noise floors (1) or not (0)", bounds=(0, 1)),
    ]


def first_difference(table: pd.DataFrame) -> str:
    """Say where activations first differ, where patching first matters, how many sites are significant."""
    differs = table[table["change"] > 0]
    if not len(differs):
        return f"Base and tuned activations are equal at all {len(table)} sites."
    first = differs.iloc[0]
    n_below = int((table["change"] > 0).to_numpy().argmax())
    text = (
        f"The first site whose activations differ is `{first['site']}` (‖Y − X‖/‖Y‖ = {first['change']:.2g})"
        f"{f'; the {n_below} sites before it are bit-identical' if n_below else ''}."
    )
    matters = table[table["above_floor"].astype(bool)]
    if not len(matters):
        return f"{text} Nowhere is KL_raw above its noise floor."
    text += f" A raw patch first moves next-token KL above the noise floor at `{matters.iloc[0]['site']}`"
    text += f" and does so at {len(matters)} of {len(table)} sites."
    tested = table["p_holm"].dropna()
    return (
        f"{text} The map beats the best control at {int((tested < 0.05).sum())} of {len(tested)} of them "
        "(sign-flip test, Holm-corrected p < 0.05)."
    )


def layer_figures(table: pd.DataFrame) -> list[Figure]:
    """CKA over layers, and the KL of unmapped layer patches in both directions."""
    known = table.dropna(subset=["cka"])
    cka = Curve("debiased CKA", known["layer"].tolist(), known["cka"].tolist())
    patches = [
        _curve(name, table, "layer", key)
        for name, key in (("tuned ← base", "KL_tuned_from_base"), ("base ← tuned", "KL_base_from_tuned"))
    ]
    title = "Unmapped layer patch at resid_post"
    return [
        curves("layers-cka", "Likeness of base and tuned", [cka], x_label="layer", y_label="CKA"),
        curves("layers-patch", title, patches, x_label="layer", y_label="KL, nats"),
    ]


def _curve(name: str, table: pd.DataFrame, x: str, y: str) -> Curve:
    return Curve(name, *(table[key].astype(float).tolist() for key in (x, y, f"{y}_low", f"{y}_high")))


def layers_blocks(table: pd.DataFrame) -> list[Block]:
    """The section on layers."""
    return [
        "## Layers (RQ1: do the representations differ?)",
        f"**RQ1 (where).** {layers_sentence(table)} Run `{table['run_id'].iloc[0]}`.",
        *layer_figures(table),
    ]


def layers_sentence(table: pd.DataFrame) -> str:
    """Say where CKA is least, and from which layer on a patch matters."""
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
    lines = [
        _curve(kind, table[table["choice"] == kind].sort_values("size"), "size", "coverage")
        for kind in ("greedy", "random")
    ]
    return [
        curves(
            f"heads-{site.replace('/', '-')}",
            f"{site}: share of the effect that some heads carry",
            lines,
            x_label="number of heads replaced",
            y_label="coverage KL_S / KL_all",
        )
    ]


def heads_sentence(table: pd.DataFrame) -> str:
    """Say how few heads carry half and most of the effect, and whether that beats random heads."""
    site, n_heads = str(table["site"].iloc[0]), int(table["n_heads"].iloc[0])
    greedy = table[table["choice"] == "greedy"].sort_values("size")
    random = table[table["choice"] == "random"].set_index("size")
    parts = []
    for share in _SHARES:
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
    """The section on the heads of one site."""
    single = table[table["choice"] == "single"].sort_values("coverage", ascending=False)
    rows = [
        {"head alone": str(r["heads"]), "KL, nats": f"{r['KL']:.4g}", "coverage": f"{r['coverage']:.3f}"}
        for r in single.to_dict("records")
    ]
    return [
        f"## Heads of {site} (RQ4: which heads carry the difference?)",
        f"**RQ4 (heads).** {heads_sentence(table)}",
        bullets(
            [
                "Heads are replaced before o_proj, on val chosen greedily, reported on the report split.",
                "Coverage need not add up: heads interact through everything downstream.",
            ]
        ),
        grid(rows),
        *heads_figures(table),
    ]
