"""The page of numbers and the script that fills it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "is-my-number-real.md"
sys.path.append(str(ROOT / "scripts"))

import make_docs_numbers as script  # noqa: E402


def test_every_block_of_the_page_is_filled_by_the_script_and_none_is_empty() -> None:
    page = PAGE.read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- numbers: (\w+) -->\n(.*?)<!-- end -->", page, re.DOTALL))
    assert blocks.keys() == {"worked", "table", "planted"}
    for name, lines in blocks.items():
        assert lines.count("\n") > 3
        assert script.with_block(page, name, lines.rstrip("\n")) == page
    for image in re.findall(r"\(img/(\S+)\)", page):
        assert (PAGE.parent / "img" / image).stat().st_size < 100_000


def test_the_table_has_both_pairs_at_every_hook_of_both_layers() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for pair in script.PAIRS:
        for site in script.SITES:
            assert f"| {pair} | {site} |" in page


def test_a_block_that_is_not_there_is_an_error() -> None:
    with pytest.raises(SystemExit, match="0 blocks called nothing"):
        script.with_block("text", "nothing", "lines")
