"""Write the table of docs/supported-models.md from the list that the engine's tests walk.

python scripts/supported_models.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "supported-models.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "engine")]

from families import FAMILIES  # noqa: E402


def table() -> str:
    """The rows below the head of the table."""
    return "".join(
        f"| {f.name} | {f.mode} | {', '.join(f.attentions)} | `{f.attn_out}` | `{f.mlp_out}` | {f.note} |\n"
        for f in FAMILIES
    )


def main() -> None:
    """Put the table in place of the page's own."""
    text = PAGE.read_text(encoding="utf-8")
    head = re.search(r"^\| family .*\n\|[ :|-]+\n", text, re.MULTILINE)
    assert head is not None
    rest = re.sub(r"\A(\|.*\n)*", "", text[head.end() :])
    PAGE.write_text(text[: head.end()] + table() + rest, encoding="utf-8")


if __name__ == "__main__":
    main()
