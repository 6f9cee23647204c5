"""Predict a 70B pair's sweep from the measured runs.

    python -m benchmarks.scale --out benchmarks/results/scale.md

Writes every table of docs/scale.md, and fills the page and draws its figure with `--page docs/scale.md`. With
`--probe` it first counts what a cell leaves in MLflow by a real sweep of a toy pair (half a minute).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.scale.driver_cost import PROBED
from benchmarks.scale.probe import probe
from benchmarks.scale.report import SECTIONS, Model


def filled(page: str, blocks: dict[str, str]) -> str:
    """The page with each block between `<!-- scale: NAME -->` and `<!-- end -->` replaced."""
    for name, text in blocks.items():
        page = re.sub(
            rf"(<!-- scale: {name} -->\n).*?(<!-- end -->)",
            lambda m, t=text: f"{m[1]}{t}\n{m[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--probe", action="store_true", help="count and time a cell on this machine first")
    parser.add_argument("--out", type=Path, help="write all tables there")
    parser.add_argument("--page", type=Path, help="fill this page's blocks, and draw its figure")
    args = parser.parse_args()
    if args.probe:
        probe().save(PROBED)
    model = Model.measured()
    blocks = {name: section(model) for name, section in SECTIONS.items()}
    command = " ".join(word for word in sys.argv[1:] if word != "--probe")
    lines = [f"`python -m benchmarks.scale {command}`", ""]
    for name, text in blocks.items():
        lines += [f"## {name}", "", text, ""]
    print("\n".join(lines))
    if args.out is not None:
        args.out.write_text("\n".join(lines), encoding="utf-8")
    if args.page is not None:
        args.page.write_text(filled(args.page.read_text(encoding="utf-8"), blocks), encoding="utf-8")
        from benchmarks.scale.figure import draw

        draw(model, args.page.parent / "img" / "scale.png")


if __name__ == "__main__":
    main()
