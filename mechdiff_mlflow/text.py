"""Text: numbers written exactly, and text from anywhere made safe for a terminal, Markdown or HTML."""

from __future__ import annotations

import html as _html
import re
import unicodedata


def cut(text: str, limit: int = 80) -> str:
    """A text of at most `limit` characters: the first and the last of a longer one, with … between."""
    tail = limit // 3
    return text if len(text) <= limit else f"{text[: limit - tail - 1]}…{text[-tail:]}"


def plain(text: str) -> str:
    """For a terminal: what it would obey, or what turns the direction of writing, as escapes."""
    return text if text.isascii() and text.isprintable() else "".join(map(_visible, text))


def markdown(text: object, limit: int = 300) -> str:
    """For one line of Markdown, in a sentence, in a table or between backticks: nothing in it is markup."""
    line = " ".join(plain(cut(str(text), limit)).split())
    line = line.translate(_LOOKALIKES).replace("](", "] (")
    return re.sub(r"\*(?=\*)", "* ", line)


def html(text: str) -> str:
    """For the text of an HTML element."""
    return _html.escape(plain(text), quote=False)


_LOOKALIKES = str.maketrans({"`": "'", "<": "‹", "|": "¦"})


def _visible(character: str) -> str:
    # Controls, formats (bidi among them), lone surrogates, separators of lines and paragraphs.
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character == "\n":
        return character
    if character < "\x7f":
        return ascii(character)[1:-1]
    code = ord(character)  # as JSON has them, for it is also what is shown
    high = f"\\u{0xD7C0 + (code >> 10):04x}" if code > 0xFFFF else ""
    return f"{high}\\u{0xDC00 + code % 0x400 if high else code:04x}"


def text_of(value: float) -> str:
    """The shortest text that reads as this very number: `0.3`, `1`, `1e-07`, `1e22`.

    Without a `+`, which MLflow refuses in the names of metrics.
    """
    return repr(float(value)).removesuffix(".0").replace("e+", "e")


def number_in(text: str) -> float:
    """The number that a text is, as a person writes it: no underscores, no digits of other scripts.

    Raises:
        ValueError: It is none; `nan` and `inf` are.
    """
    if not text.isascii() or "_" in text:
        raise ValueError(f"not a number: {text[:40]!r}")
    return float(text)


def is_text(text: str) -> bool:
    """Whether a text can be stored: it has no lone surrogates, which stand for bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
