"""Drop over k and over α, from the patches that differ in nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial

from mechdiff_mlflow.report.evidence import Measured
from mechdiff_mlflow.report.figures import Curve, Figure, curves
from mechdiff_mlflow.text import text_of


def curve_figures(patches: Sequence[Measured]) -> list[Figure]:
    """The charts that these patches allow: drop over k where two ranks are known, over α where three are."""
    ranks = sorted({patch.k for patch in patches if patch.k is not None})
    full = 2.0 * max(ranks, default=1)
    over_k = _lines(
        patches,
        lambda p: f"{p.site} α={text_of(p.alpha)} {p.family}",
        lambda p: (p.solver, p.alpha, p.settings, p.conditions),
        lambda p: full if p.k is None else float(p.k),
        at_least=2,
    )
    over_alpha = _lines(
        patches,
        lambda p: f"{p.site} k={p.rank} {p.family}",
        lambda p: (p.solver, p.settings, p.conditions),
        lambda p: p.alpha,
        at_least=3,
    )
    figures = []
    if over_k:
        ticks = {float(k): str(k) for k in ranks}
        ticks |= {full: "full"} if any(patch.k is None for patch in patches) else {}
        draw = partial(curves, "drop-over-k", "KL drop over rank", over_k, x_label="rank k")
        figures.append(draw(y_label="drop, %", log_x=True, ticks=ticks))
    if over_alpha:
        draw = partial(curves, "drop-over-alpha", "KL drop over scale", over_alpha, x_label="α")
        figures.append(draw(y_label="drop, %"))
    return figures


def _lines(
    patches: Sequence[Measured],
    name: Callable[[Measured], str],
    group: Callable[[Measured], Hashable],
    place: Callable[[Measured], float],
    *,
    at_least: int,
) -> list[Curve]:
    """One line of each name and group that has patches at `at_least` places."""
    groups: dict[Hashable, list[Measured]] = {}
    for patch in patches:
        if patch.drop is not None:
            groups.setdefault((name(patch), group(patch)), []).append(patch)
    lines = []
    for members in groups.values():
        members = sorted(members, key=place)
        if len({place(patch) for patch in members}) < at_least:
            continue
        drops = [patch.drop for patch in members if patch.drop is not None]
        ends = [(drop.estimate, drop.low, drop.high) for drop in drops]
        columns = [[math.nan if end is None else end for end in column] for column in zip(*ends, strict=True)]
        lines.append(Curve(name(members[0]), [place(patch) for patch in members], *columns))
    return lines
