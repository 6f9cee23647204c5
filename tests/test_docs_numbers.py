"""The page of numbers and the script that fills it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "is-my-number-real.md"
sys.path.append(str(ROOT / "scripts"))

import gallery  # noqa: E402
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


def test_pages_of_the_real_pairs_are_filled() -> None:
    for page, names in (
        ("docs/real-pairs.md", {"sites", "shares", "ranks", "heads", "compared"}),
        ("README.md", {"newcomer"}),
    ):
        blocks = dict(
            re.findall(r"<!-- numbers: (\w+) -->\n(.*?)<!-- end -->", (ROOT / page).read_text(), re.DOTALL)
        )
        assert blocks.keys() == names
        for name, lines in blocks.items():
            assert lines.count("\n") >= (2 if name == "heads" else 3), name


def test_the_gallery_has_a_small_page_of_each_pair_without_places_of_a_machine() -> None:
    linked = re.findall(r"\(gallery/(\S+\.html)\)", (ROOT / "docs" / "gallery.md").read_text())
    assert {"cultural-demo.html", "smollm2-kazakh.html"} < set(linked)
    assert set(linked) == {path.name for path in gallery.GALLERY.iterdir()}
    for name in linked:
        text = (gallery.GALLERY / name).read_text(encoding="utf-8")
        assert len(text) < gallery.MAX_BYTES
        assert "data:image/png" in text
        assert not re.search(r"/(work|root|home|tmp|Users)/", re.sub(r"base64,[^\"]+", "", text))


def test_a_page_of_the_gallery_holds_its_pictures(tmp_path: Path) -> None:
    report = tmp_path / "mine.md"
    report.write_text(
        "# What <changed>\n\n![A picture](mine-figures/a.png)\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    )
    (tmp_path / "mine-figures").mkdir()
    (tmp_path / "mine-figures" / "a.png").write_bytes((PAGE.parent / "img" / "planted.png").read_bytes())
    made = gallery.page(report)
    assert "<title>What &lt;changed&gt;</title>" in made
    assert 'src="data:image/png;base64,' in made
    assert "<td>2</td>" in made
