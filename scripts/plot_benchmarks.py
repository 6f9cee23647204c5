"""Draw the figures of docs/speed.md from benchmarks/results.

python scripts/plot_benchmarks.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    tables = json.loads((ROOT / "benchmarks" / "results" / "gpu-h100.json").read_text(encoding="utf-8"))
    by_head: dict[str, list[list[Any]]] = {table[0][0]: table[1:] for table in tables}
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), constrained_layout=True)

    prompts = by_head["prompts, atlas"]
    n, seconds = [row[0] for row in prompts], [row[1] for row in prompts]
    axes[0].plot(n, seconds, "o-")
    axes[0].plot([0, n[-1]], [0, seconds[-1]], "k:", linewidth=1)
    axes[0].set(title="Atlas: prompts", xlabel="prompts", ylabel="seconds", xlim=0, ylim=0)

    for head, rows in by_head.items():
        if head.startswith("variants at "):
            known = [row for row in rows if isinstance(row[0], int)]
            axes[1].plot(
                [r[0] for r in known], [r[1] for r in known], "o-", label=head.removeprefix("variants at ")
            )
    forward = next(rows for head, rows in by_head.items() if head.startswith("variants at "))[0][1]
    axes[1].axhline(forward, color="k", linestyle=":", linewidth=1, label="forward alone")
    axes[1].set(
        title="One site: variants", xlabel="variants of every prompt", ylabel="seconds", xlim=0, ylim=0
    )
    axes[1].legend(fontsize=8)

    sizes = [(*map(int, row[0].replace(",", "").split()[::3]), row[1]) for row in by_head["model"]]
    layers = sorted((x, s) for x, v, s in sizes if v == 128256)
    axes[2].plot(*zip(*layers, strict=True), "o-")
    axes[2].set(title="Atlas: layers", xlabel="layers, vocabulary 128,256", ylabel="seconds", xlim=0, ylim=0)
    words = sorted((v, s) for x, v, s in sizes if x == 8)
    axes[3].plot(*zip(*words, strict=True), "o-")
    axes[3].set(title="Atlas: vocabulary", xlabel="vocabulary, 8 layers", ylabel="seconds", xlim=0, ylim=0)
    figure.savefig(ROOT / "docs" / "img" / "speed-gpu.png", dpi=80)


if __name__ == "__main__":
    main()
