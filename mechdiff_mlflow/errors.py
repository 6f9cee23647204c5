"""The one error that users see."""

from mechdiff_mlflow.text import cut, plain

MAX_CHARS = 2000
"""Of a message: what is wrong stands at its start and what to do at its end, so that both are kept."""


class MechdiffError(Exception):
    """A problem the user can mend: one sentence saying what is wrong, with values, then what to do.

    Characters of its values that a terminal would obey, or that turn the direction of writing, are shown as
    escapes: file names and names in files come from anywhere.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(cut(plain(cut(str(message), MAX_CHARS)), MAX_CHARS))
