"""A report of Markdown and figures, written as a Markdown file with pictures and as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from markdown_it import MarkdownIt

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.report.figures import Figure, page
from mechdiff_mlflow.text import html as escape_html
from mechdiff_mlflow.text import plain


@dataclass(frozen=True)
class Grid:
    """A table of texts by column, the same in every row."""

    rows: Sequence[Mapping[str, str]]

    @property
    def heads(self) -> list[str]:
        """Its columns."""
        return list(self.rows[0]) if self.rows else []

    def markdown(self) -> str:
        """The table in Markdown, or `None.` where it is empty."""
        lines = [self.heads, ["---"] * len(self.heads), *(row.values() for row in self.rows)]
        cells = ([cell.replace("|", "&#124;") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in cells) if self.rows else "None."


Block: TypeAlias = str | Grid | Figure
"""A string is Markdown."""

_TO_HTML = MarkdownIt("commonmark", {"html": False}).enable("table")


def bullets(items: Sequence[str]) -> str:
    """A list of short texts."""
    return "\n".join(f"- {item}" for item in items)


@dataclass(frozen=True)
class Document:
    """A titled list of blocks."""

    title: str
    blocks: Sequence[Block]

    def markdown(self, pictures: str) -> str:
        """The Markdown, whose pictures lie in the folder `pictures`."""
        parts = [
            f"![{block.title}]({pictures}/{block.name}.png)" if isinstance(block, Figure) else _text(block)
            for block in (f"# {self.title}", *self.blocks)
        ]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """One HTML file with interactive figures, which needs nothing from the network."""
        parts = [
            f"<figure>{block.div}</figure>" if isinstance(block, Figure) else _TO_HTML.render(_text(block))
            for block in (f"# {self.title}", *self.blocks)
        ]
        return page(escape_html(self.title), "\n".join(parts))

    def write(self, out: Path) -> list[Path]:
        """Write `out` (.md), the same as .html, and the pictures in `<stem>-figures/`; what was written.

        Raises:
            MechdiffError: They cannot be written.
        """
        folder = out.with_name(f"{out.stem}-figures")
        contents: dict[Path, bytes] = {
            out.with_suffix(".md"): self.markdown(folder.name).encode(),
            out.with_suffix(".html"): self.html().encode(),
        }
        figures = [block for block in self.blocks if isinstance(block, Figure)]
        contents |= {folder / f"{figure.name}.png": figure.png for figure in figures}
        try:
            for path, content in contents.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        except OSError as error:
            raise MechdiffError(
                f"Cannot write {str(out)[:200]} ({error.strerror}); choose another --out."
            ) from error
        return list(contents)


def _text(block: str | Grid) -> str:
    return plain(block.markdown() if isinstance(block, Grid) else block)


def joined(documents: Sequence[Document]) -> Document:
    """Several documents as one; a single one stays as it is."""
    if len(documents) == 1:
        return documents[0]
    blocks: list[Block] = []
    for document in documents:
        blocks += [f"## {document.title}", *document.blocks]
    return Document("; ".join(document.title for document in documents), blocks)
