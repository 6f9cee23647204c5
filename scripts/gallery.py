"""Make the pages of docs/gallery from reports: one small HTML file each, with its pictures inside.

    python scripts/gallery.py reports/cultural-demo.md reports/smollm2-kazakh.md …

A report's own HTML has plotly in it (4.5 MB); this has what its Markdown has, in 64 colours.
"""

from __future__ import annotations

import base64
import html
import io
import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

GALLERY = Path(__file__).resolve().parent.parent / "docs" / "gallery"
MAX_BYTES = 300_000
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;display:block;overflow-x:auto;font-size:12px}"
    "td,th{border:1px solid #ddd;padding:2px 6px;text-align:left}img{max-width:100%}"
    "pre{background:#f6f6f6;padding:1em;overflow-x:auto}"
)


def picture(path: Path) -> str:
    """A PNG file as an address that holds it, in few colours."""
    small = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").quantize(64).save(small, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"


def page(report: Path) -> str:
    """A Markdown report as one HTML page."""
    text = report.read_text(encoding="utf-8")
    title = html.escape(text.partition("\n")[0].lstrip("# "))
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'src="([^":]+)"', lambda found: f'src="{picture(report.parent / found[1])}"', body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def main() -> None:
    """Write a page for each report that is named."""
    GALLERY.mkdir(exist_ok=True)
    for report in map(Path, sys.argv[1:]):
        made = page(report)
        if len(made) > MAX_BYTES:
            sys.exit(
                f"The page of {report} has {len(made)} bytes, over {MAX_BYTES}; it has too many figures."
            )
        (GALLERY / f"{report.stem}.html").write_text(made, encoding="utf-8")
        print(f"{GALLERY / report.stem}.html: {len(made) // 1000} kB")


if __name__ == "__main__":
    main()
