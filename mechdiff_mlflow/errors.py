"""The one error that users see."""

import unicodedata


class MechdiffError(Exception):
    """A problem the user can mend: one sentence saying what is wrong, with values, then what to do.

    Characters of its values that a terminal would obey, or that turn the direction of writing, are shown as
    escapes: file names and names in files come from anywhere.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("".join(map(_shown, str(message))))


def is_text(text: str) -> bool:
    """Whether a text can be stored: it has no lone surrogates, which stand for bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(character: str) -> str:
    # Controls, formats (bidi among them), lone surrogates, separators of lines and paragraphs.
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character != "\n"
    return ascii(character)[1:-1] if hidden else character
