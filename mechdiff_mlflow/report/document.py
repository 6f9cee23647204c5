"""A report as a list of blocks, written as Markdown with pictures beside it or as one HTML file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.report.figures import Figure, page
from mechdiff_mlflow.text import html as escape_html


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading of level 2, below the title's."""

    text: str


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list of short texts."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of texts."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Code:
    """Lines to type."""

    lines: Sequence[str]


Block: TypeAlias = str | Heading | Bullets | Grid | Code | Figure
"""A string is a paragraph, in which `**bold**` and `` `code` `` are understood."""


@dataclass(frozen=True)
class Document:
    """A titled list of blocks."""

    title: str
    blocks: Sequence[Block]

    def markdown(self, pictures: str) -> str:
        """The Markdown, whose pictures lie in the folder `pictures`."""
        parts = [f"# {self.title}", *(_markdown(block, pictures) for block in self.blocks)]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """One HTML file with interactive figures, which needs nothing from the network."""
        body = "\n".join([f"<h1>{escape_html(self.title)}</h1>", *map(_html, self.blocks)])
        return page(escape_html(self.title), body)

    @property
    def figures(self) -> list[Figure]:
        """Its figures, in order."""
        return [block for block in self.blocks if isinstance(block, Figure)]

    def write(self, out: Path) -> list[Path]:
        """Write `out` (.md), the same as .html, and the pictures in `<stem>-figures/`; what was written.

        Raises:
            MechdiffError: `out` is neither .md nor .html, or cannot be written.
        """
        check_out(out)
        folder = out.with_name(f"{out.stem}-figures")
        contents: dict[Path, bytes] = {
            out.with_suffix(".md"): self.markdown(folder.name).encode(),
            out.with_suffix(".html"): self.html().encode(),
        }
        contents |= {folder / f"{figure.name}.png": figure.png for figure in self.figures}
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            for path, content in contents.items():
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
        except OSError as error:
            raise _cannot_write(out, error) from error
        return list(contents)


def check_out(out: Path) -> None:
    """Make sure that a report can be written there, before it is made.

    Raises:
        MechdiffError: `out` is neither .md nor .html, what is there cannot be replaced, or the name is not
            possible.
    """
    if out.suffix not in (".md", ".html"):
        raise MechdiffError(
            f"{str(out)[:200]} has an unknown suffix; name a .md or .html file, both are written."
        )
    try:
        folder = out.with_name(f"{out.stem}-figures")
        for path in (out.with_suffix(".md"), out.with_suffix(".html"), folder):
            if path.exists() and path.is_dir() != (path == folder):
                what = "a file" if path == folder else "a folder"
                raise MechdiffError(f"{path} is {what} that is there already; choose another --out.")
        above = next(parent for parent in out.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise MechdiffError(f"Nothing can be written in {above}; choose another --out.")
    except OSError as error:
        raise _cannot_write(out, error) from error


def _cannot_write(out: Path, error: OSError) -> MechdiffError:
    return MechdiffError(f"Cannot write {str(out)[:200]} ({error.strerror}); choose another --out.")


def joined(documents: Sequence[Document]) -> Document:
    """Several documents as one; a single one stays as it is."""
    if len(documents) == 1:
        return documents[0]
    blocks: list[Block] = []
    for document in documents:
        blocks += [Heading(document.title), *document.blocks]
    return Document("; ".join(document.title for document in documents), blocks)


def _markdown(block: Block, pictures: str) -> str:
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, str):
        return block
    if isinstance(block, Bullets):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Code):
        return "\n".join(["```bash", *block.lines, "```"])
    if isinstance(block, Figure):
        return f"![{block.title}]({pictures}/{block.name}.png)"
    rows = [block.columns, ["---"] * len(block.columns), *block.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{_inline(block.text)}</h2>"
    if isinstance(block, str):
        return f"<p>{_inline(block)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        return f"<pre>{escape_html(chr(10).join(block.lines))}</pre>"
    if isinstance(block, Figure):
        return f"<figure>{block.div}</figure>"
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in block.columns)
    rows = "".join("<tr>" + "".join(f"<td>{_inline(c)}</td>" for c in row) + "</tr>" for row in block.rows)
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _inline(text: str) -> str:
    """Escaped text with bold and code marked up."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape_html(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
