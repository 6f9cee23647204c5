"""Figures, each drawn twice from the same values: a PNG for papers and Markdown, plotly for the browser.

The plotly half needs plotly.js once a page and never the network.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import plotly.io
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray
from plotly.offline import get_plotlyjs

from mechdiff_mlflow.measures.bootstrap import Interval
from mechdiff_mlflow.report.evidence import Measured
from mechdiff_mlflow.text import text_of

_DPI = 110
_COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#337ea9", "#cb912f", "#787774")


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure in both forms."""

    name: str  # stem of its files
    title: str  # what it shows
    png: bytes  # of a PNG file
    div: str  # an HTML fragment that needs plotly.js on its page


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart."""

    name: str  # in the legend
    x: Sequence[float]  # places on the axis, rising
    y: Sequence[float]
    low: Sequence[float] = ()  # lower ends of the intervals, NaN where there is none; none at all if empty
    high: Sequence[float] = ()  # upper ends


def curves(
    name: str,
    title: str,
    lines: Sequence[Curve],
    *,
    x_label: str,
    y_label: str = "drop, %",
    log_x: bool = False,
    ticks: Mapping[float, str] | None = None,
) -> Figure:
    """At least one line with interval bars; `ticks` names places on the x axis, e.g. {128: "full"}."""
    canvas, axes = _canvas(7.0, 4.2)
    chart = go.Figure()
    for i, line in enumerate(lines):
        y = np.asarray(line.y, dtype=float)
        below, above = _arms(y, line.low), _arms(y, line.high)
        colour = _COLOURS[i % len(_COLOURS)]
        axes.errorbar(line.x, y, yerr=[below, above], color=colour, marker="o", capsize=3, label=line.name)
        chart.add_scatter(
            x=list(line.x),
            y=list(line.y),
            name=line.name,
            mode="lines+markers",
            line={"color": colour},
            error_y={"array": above.tolist(), "arrayminus": below.tolist(), "symmetric": False},
        )
    if log_x:
        axes.set_xscale("log", base=2)
        chart.update_xaxes(type="log")
    if ticks:
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        chart.update_xaxes(tickmode="array", tickvals=list(ticks), ticktext=list(ticks.values()))
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    chart.update_layout(xaxis_title=x_label, yaxis_title=y_label)
    return _finished(name, title, canvas, chart)


def curve_figures(patches: Sequence[Measured]) -> list[Figure]:
    """Drop over k where two ranks are known, over α where three are, all else being equal."""
    ranks = sorted({patch.k for patch in patches if patch.k is not None})
    full = 2.0 * max(ranks, default=1)
    over_k: dict[tuple[object, ...], dict[float, Interval]] = {}
    over_alpha: dict[tuple[object, ...], dict[float, Interval]] = {}
    for p in patches:
        if p.drop is not None:
            rest = p.solver, p.settings, p.conditions
            at_alpha = f"{p.site} α={text_of(p.alpha)} {p.family}", *rest
            over_k.setdefault(at_alpha, {})[full if p.k is None else float(p.k)] = p.drop
            over_alpha.setdefault((f"{p.site} k={p.rank} {p.family}", *rest), {})[p.alpha] = p.drop
    k_lines = [_curve(str(key[0]), drops) for key, drops in over_k.items() if len(drops) >= 2]
    alpha_lines = [_curve(str(key[0]), drops) for key, drops in over_alpha.items() if len(drops) >= 3]
    figures = []
    if k_lines:
        ticks = {float(k): str(k) for k in ranks}
        ticks |= {full: "full"} if any(patch.k is None for patch in patches) else {}
        title = "KL drop over rank"
        figures.append(curves("drop-over-k", title, k_lines, x_label="rank k", log_x=True, ticks=ticks))
    if alpha_lines:
        figures.append(curves("drop-over-alpha", "KL drop over scale", alpha_lines, x_label="α"))
    return figures


def _curve(name: str, drops: Mapping[float, Interval]) -> Curve:
    """Drops by their places on the axis as a line."""
    rows = [(drop.estimate, drop.low, drop.high) for _, drop in sorted(drops.items())]
    return Curve(name, sorted(drops), *np.array(rows, dtype=float).T.tolist())  # None becomes NaN


def bars(name: str, title: str, values: Mapping[str, float], *, x_label: str, marked: str = "") -> Figure:
    """Horizontal bars in the order given, the one called `marked` in another colour."""
    names, sizes = list(values), list(values.values())
    colours = [_COLOURS[1] if label == marked else _COLOURS[0] for label in names]
    canvas, axes = _canvas(7.0, 0.9 + 0.34 * len(names))
    axes.barh(names[::-1], sizes[::-1], color=colours[::-1])
    axes.set(xlabel=x_label, title=title)
    axes.grid(axis="x", alpha=0.25)
    chart = go.Figure(go.Bar(x=sizes[::-1], y=names[::-1], orientation="h", marker_color=colours[::-1]))
    chart.update_layout(xaxis_title=x_label, height=160 + 28 * len(names))
    return _finished(name, title, canvas, chart)


def heatmap(
    name: str,
    title: str,
    values: NDArray[np.float64],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    diverging: bool = False,
    bounds: tuple[float, float] | None = None,
) -> Figure:
    """One coloured cell a value [len(rows), len(columns)], the first row at the bottom: layers read upwards.

    NaN cells stay grey; what lies outside `bounds` gets the end's colour; diverging ones lie about 0.
    """
    defined = values[np.isfinite(values)]
    low, high = bounds or ((float(defined.min()), float(defined.max())) if len(defined) else (0.0, 1.0))
    high = high if high > low else low + 1
    canvas, axes = _canvas(1.6 + 1.1 * len(columns), 1.4 + 0.2 * len(rows))
    axes.set_facecolor("#dddddd")
    colours = "RdBu" if diverging else "viridis"
    image = axes.imshow(values, origin="lower", aspect="auto", cmap=colours, vmin=low, vmax=high)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_title(title, fontsize=10)
    canvas.colorbar(image, label=unit)
    chart = go.Figure(
        go.Heatmap(
            z=[[None if not np.isfinite(v) else float(v) for v in row] for row in values],
            x=list(columns),
            y=list(rows),
            zmin=low,
            zmax=high,
            colorscale=colours,
            colorbar={"title": unit},
            hoverongaps=False,
        )
    )
    chart.update_layout(height=180 + 17 * len(rows))
    return _finished(name, title, canvas, chart)


def page(title: str, body: str) -> str:
    """A whole HTML page that needs nothing from the network."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n"
        f"<script>{get_plotlyjs()}</script>\n</head>\n<body>\n{body}\n</body></html>\n"
    )


def write_figures(figures: Sequence[Figure], title: str, folder: Path) -> dict[str, Path]:
    """Write each figure as a PNG and all of them as one page; by a run's artifact path, where they are."""
    files = {"figures.html": folder / "figures.html"}
    files["figures.html"].write_text(page(title, "\n".join(f.div for f in figures)), encoding="utf-8")
    for figure in figures:
        path = files[f"figures/{figure.name}.png"] = folder / f"{figure.name}.png"
        path.write_bytes(figure.png)
    return files


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:.85rem;display:block;overflow-x:auto}"
    "th,td{border:1px solid #ddd;padding:.25rem .5rem;text-align:left}th{background:#f4f4f4}"
    "code,pre{background:#f4f4f4;border-radius:3px;font-size:.85rem}code{padding:0 .2rem}"
    "td code{overflow-wrap:anywhere}pre{padding:.6rem;overflow-x:auto}figure{margin:1rem 0}"
)


def _canvas(width_inches: float, height_inches: float) -> tuple[Canvas, Axes]:
    canvas = Canvas(figsize=(width_inches, height_inches), dpi=_DPI, layout="constrained")
    return canvas, canvas.subplots()


def _arms(y: NDArray[np.float64], ends: Sequence[float]) -> NDArray[np.float64]:
    """Lengths of error bars, 0 where an interval has no end."""
    return np.nan_to_num(np.abs(np.asarray(ends, dtype=float) - y)) if len(ends) else np.zeros_like(y)


def _finished(name: str, title: str, canvas: Canvas, chart: go.Figure) -> Figure:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", metadata={"Software": None})
    chart.update_layout(title=title, template="plotly_white", margin={"l": 60, "r": 20, "t": 50, "b": 50})
    div = plotly.io.to_html(chart, full_html=False, include_plotlyjs=False, div_id=f"figure-{name}")
    return Figure(name, title, buffer.getvalue(), div)
