"""The one error that users see."""

import unicodedata

MAX_CHARS = 2000
"""Of a message: what is wrong stands at its start and what to do at its end, so that both are kept."""


class MechdiffError(Exception):
    """A problem the user can mend: one sentence saying what is wrong, with values, then what to do.

    Characters of its values that a terminal would obey, or that turn the direction of writing, are shown as
    escapes: file names and names in files come from anywhere.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(cut(plain(cut(str(message), MAX_CHARS)), MAX_CHARS))


def cut(text: str, limit: int = 80) -> str:
    """A text of at most `limit` characters: the first and the last of a longer one, with … between."""
    tail = limit // 3
    return text if len(text) <= limit else f"{text[: limit - tail - 1]}…{text[-tail:]}"


def plain(text: str) -> str:
    """A text whose characters all show as themselves: controls, bidi and lone surrogates as escapes."""
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    # Controls, formats (bidi among them), lone surrogates, separators of lines and paragraphs.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character != "\n"
    return ascii(character)[1:-1] if hidden else character
