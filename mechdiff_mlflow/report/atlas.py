"""The atlas: every layer and hook as heatmaps, and the first place where the models differ."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mechdiff_mlflow.report.figures import Figure, heatmap
from mechdiff_mlflow.spec.sites import Hook

HOOKS = tuple(str(hook) for hook in Hook)


def atlas_figures(table: pd.DataFrame) -> list[Figure]:
    """KL_raw, drop, skill, ρ and where KL_raw is above its floor, layers × hooks.

    Args:
        table: `atlas.json`, with the columns of `experiments.atlas.COLUMNS`.
    """
    above = _grid(table, "above_floor")
    mask = np.where(np.isnan(above), np.nan, above)
    return [
        _heatmap(table, "KL_raw", "KL of the raw cross-patch", "nats"),
        _heatmap(table, "drop_pct", "KL drop of the mapped patch", "%", diverging=True, bounds=(-100, 100)),
        _heatmap(table, "skill_pct", "skill over the best control", "%", diverging=True, bounds=(-100, 100)),
        _heatmap(table, "rho", "ρ: part of the change that the map leaves", "", bounds=(0, 1)),
        heatmap(
            "atlas-above-floor",
            "KL_raw above ten noise floors (1) or not (0)",
            mask,
            rows=_layers(table),
            columns=HOOKS,
            unit="",
            bounds=(0, 1),
        ),
    ]


def first_difference(table: pd.DataFrame) -> str:
    """Where activations first differ, where patching first matters, and how many sites are significant."""
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


def _heatmap(
    table: pd.DataFrame,
    key: str,
    title: str,
    unit: str,
    *,
    diverging: bool = False,
    bounds: tuple[float, float] | None = None,
) -> Figure:
    return heatmap(
        f"atlas-{key.replace('_', '-').lower()}",
        title,
        _grid(table, key),
        rows=_layers(table),
        columns=HOOKS,
        unit=unit,
        diverging=diverging,
        bounds=bounds,
    )


def _layers(table: pd.DataFrame) -> list[str]:
    return [f"L{layer}" for layer in sorted({int(layer) for layer in table["layer"]})]


def _grid(table: pd.DataFrame, key: str) -> NDArray[np.float64]:
    """[layers, hooks], NaN where there is no value."""
    wide = table.assign(**{key: pd.to_numeric(table[key])}).pivot(index="layer", columns="hook", values=key)
    return np.asarray(wide.reindex(columns=list(HOOKS)).to_numpy(dtype=float))
