"""Text from anywhere, made safe for where it is shown: a terminal, Markdown, HTML."""

from __future__ import annotations

import html as _html
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
    return line.translate(_LOOKALIKES).replace("](", "] (").replace("**", "* *")


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
