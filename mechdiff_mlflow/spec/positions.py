"""Positions: the tokens of a prompt that are read and replaced."""

from __future__ import annotations

from mechdiff_mlflow.spec.choices import Choice


class Position(Choice):
    """The token, or mean of tokens, that is read and replaced; KL is always read at the last token."""

    DECISION = "decision"
    """The last token of the templated prompt, whose next token is the first of the answer (K=1)."""
    LAST_CONTENT = "last_content"
    """The last non-special token of the user's text."""
    CONTENT_MEAN = "content_mean"
    """All tokens of the user's text: their mean is read, and all are moved by the same vector."""
