"""Atlas, layers and heads: figures, and the sentences that their tables allow."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from mechdiff_mlflow.measures.stats import above_floor
from mechdiff_mlflow.report import wording
from mechdiff_mlflow.report.document import Block, Grid, bullets
from mechdiff_mlflow.report.figures import Curve, Figure, curves, heatmap
from mechdiff_mlflow.spec.sites import SUBLAYERS, Hook, Site

_HOOKS = tuple(str(hook) for hook in Hook)
_CARRIERS = {
    Hook.ATTN_OUT: "the attention of",
    Hook.MLP_OUT: "the MLP of",
    Hook.RESID_PRE: "what enters",
    Hook.RESID_POST: "what leaves",
}
MOST_SITES = 8
"""Sites that get a sentence each."""
_SHARES = (0.5, 0.9)
"""Shares of the effect of all heads: how few heads carry them?"""


def atlas_figures(table: pd.DataFrame, min_effect_nats: float) -> list[Figure]:
    """KL_raw, and where it is an effect drop, skill and ρ, layers × hooks, of an atlas's table."""
    no_effect = pd.to_numeric(table["KL_raw"]) < min_effect_nats  # False where nothing was patched raw

    def drawn(key: str, title: str, unit: str = "", **scale: Any) -> Figure:
        numbers = pd.to_numeric(table[key])
        numbers = table.assign(value=numbers if key == "KL_raw" else numbers.mask(no_effect))
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
    ]


def effects(table: pd.DataFrame, min_effect_nats: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of an atlas at attention and MLP outputs: all, and those with an effect, the largest first.

    Where the atlas visited no such outputs, of the residual stream.
    """
    places = table[table["hook"].isin(list(map(str, SUBLAYERS)))]
    places = places if len(places) else table
    kl = pd.to_numeric(places["KL_raw"])
    return places, places[kl >= min_effect_nats].sort_values("KL_raw", ascending=False)


def where(table: pd.DataFrame, min_effect_nats: float) -> list[str]:
    """Sentences on an atlas: which layers carry the difference, each of their sites, where it begins."""
    places, found = effects(table, min_effect_nats)
    if places["KL_raw"].isna().all():
        return [
            "Base and tuned differ in width, so no site can be patched raw.",
            "Where they differ is open: look at the maps below.",
        ]
    are_sums = not set(places["hook"]) & set(map(str, SUBLAYERS))
    kind = "residual sites, which are sums of all before them" if are_sums else "attention and MLP outputs"
    least = f"{min_effect_nats:g} nats"
    if not len(found):
        most = places.iloc[int(pd.to_numeric(places["KL_raw"]).to_numpy().argmax())]
        sentences = [
            f"None of {len(places)} {kind} has an effect: base's activation in place of tuned's moves the "
            f"next token by less than {least} everywhere ({most['KL_raw']:.2g} at most, at `{most['site']}`)."
        ]
    else:
        sentences = [
            f"At {len(found)} of {len(places)} {kind} base's activation in place of tuned's moves the next "
            f"token by {least} or more: **{_layers(found)}**."
        ]
        sentences += [_site_sentence(row) for row in found.head(MOST_SITES).to_dict("records")]
        if len(found) > MOST_SITES:
            sentences.append(f"{len(found) - MOST_SITES} more sites have less; the atlas shows them all.")
    differs = (table["change"] > 0).to_numpy()
    if not differs.any():
        return [*sentences, f"Base and tuned activations are equal at all {len(table)} sites."]
    n_equal = int(differs.argmax())
    before = f"; the {n_equal} sites before it are bit-identical" if n_equal else ""
    last = f"The first site whose activations differ is `{table.iloc[n_equal]['site']}`{before}."
    sums = table[~table["site"].isin(places["site"])]
    if len(sums):
        top = sums.iloc[int(pd.to_numeric(sums["KL_raw"]).to_numpy().argmax())]
        last += f" The residual stream, which sums all, has up to {top['KL_raw']:.3g} nats (`{top['site']}`)."
    return [*sentences, last]


def _layers(found: pd.DataFrame) -> str:
    """`the attention of L24–L27 and the MLP of L3, L5`: layers by hook, neighbours as ranges."""
    parts = []
    for hook, name in _CARRIERS.items():
        layers = sorted(found[found["hook"] == str(hook)]["layer"].astype(int))
        starts = [layer for layer in layers if layer - 1 not in layers]
        ends = [layer for layer in layers if layer + 1 not in layers]
        runs = [f"L{a}" if a == b else f"L{a}–L{b}" for a, b in zip(starts, ends, strict=True)]
        parts += [f"{name} {', '.join(runs)}"] if runs else []
    return " and ".join(parts)


def _site_sentence(row: Mapping[Hashable, Any]) -> str:
    site = Site.parse(str(row["site"]))
    what = wording.WHERE[site.hook.value].format(layer=site.layer)
    return f"`{site}`, {what}: {row['KL_raw']:.3g} nats."


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
        "## Layers",
        f"{layers_sentence(table)} Run `{table['run_id'].iloc[0]}`.",
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
        f"## Heads of {site}",
        heads_sentence(table),
        bullets(
            [
                "Heads are replaced before o_proj, on val chosen greedily, reported on the report split.",
                "Coverage need not add up: heads interact through everything downstream.",
            ]
        ),
        Grid(rows),
        *heads_figures(table),
    ]
