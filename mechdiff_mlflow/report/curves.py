"""drop over k and over α, from the patches that differ in nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mechdiff_mlflow.report.evidence import Measured
from mechdiff_mlflow.report.figures import Curve, Figure, curves
from mechdiff_mlflow.text import text_of

Key = tuple[object, ...]


def curve_figures(patches: Sequence[Measured]) -> list[Figure]:
    """The charts that these patches allow: drop over k where two ranks are known, over α where three are."""
    ranks = sorted({p.k for p in patches if p.k is not None})
    full = 2.0 * max(ranks, default=1)
    over_k = _lines(
        patches,
        lambda p: (p.site, p.solver, p.family, p.alpha, p.settings, p.conditions),
        lambda p: full if p.k is None else float(p.k),
        lambda p: f"{p.site} α={text_of(p.alpha)} {p.family}",
        at_least=2,
    )
    over_alpha = _lines(
        patches,
        lambda p: (p.site, p.solver, p.family, p.k, p.settings, p.conditions),
        lambda p: p.alpha,
        lambda p: f"{p.site} k={p.rank} {p.family}",
        at_least=3,
    )
    figures = []
    if over_k:
        ticks = {float(k): str(k) for k in ranks}
        ticks |= {full: "full"} if any(p.k is None for p in patches) else {}
        figures.append(
            curves(
                "drop-over-k",
                "KL drop over rank",
                over_k,
                x_label="rank k",
                y_label="drop, %",
                log_x=True,
                ticks=ticks,
            )
        )
    if over_alpha:
        figures.append(
            curves("drop-over-alpha", "KL drop over scale", over_alpha, x_label="α", y_label="drop, %")
        )
    return figures


def _lines(
    patches: Sequence[Measured],
    group: Callable[[Measured], Key],
    place: Callable[[Measured], float],
    name: Callable[[Measured], str],
    *,
    at_least: int,
) -> list[Curve]:
    groups: dict[Key, list[Measured]] = {}
    for patch in patches:
        if patch.drop is not None:
            groups.setdefault(group(patch), []).append(patch)
    lines = []
    for members in groups.values():
        members = sorted(members, key=place)
        if len({place(patch) for patch in members}) < at_least:
            continue
        drops = [patch.drop for patch in members if patch.drop is not None]
        lines.append(
            Curve(
                name(members[0]),
                [place(patch) for patch in members],
                [_value(drop.estimate) for drop in drops],
                [_value(drop.low) for drop in drops],
                [_value(drop.high) for drop in drops],
            )
        )
    return lines


def _value(end: float | None) -> float:
    return math.nan if end is None else end
