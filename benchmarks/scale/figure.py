"""The figure of docs/scale.md: where a sweep's hours go, by number of slots."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.scale.report import SLOTS, Model, ways
from benchmarks.scale.simulation import Faults, simulate

PARTS = {
    "record and score (slots)": ("load", "record", "score val", "score test"),
    "fit": ("fit",),
    "controls": ("controls",),
    "statistics": ("statistics",),
    "track": ("track",),
}


def draw(model: Model, path: Path) -> None:
    """Write the PNG."""
    plt.switch_backend("agg")
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), constrained_layout=True)
    at = range(len(SLOTS))
    for axis, (work, way) in zip(axes, ways(model), strict=True):
        runs = [simulate(model.plan(work, n, way), Faults(cv=model.scatter)).stage_s for n in SLOTS]
        below = [0.0] * len(SLOTS)
        for name, stages in PARTS.items():
            hours = [sum(run[stage] for stage in stages) / 3600 for run in runs]
            axis.bar(at, hours, bottom=below, label=name)
            below = [a + b for a, b in zip(below, hours, strict=True)]
        axis.set(title=f"{way.name}, {work.n_train:,} train prompts", xlabel="slots", ylabel="hours")
        axis.set_xticks(list(at), [str(n) for n in SLOTS])
    figure.legend(
        *axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), fontsize=8
    )
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
