"""Numbers as text, exactly: what is read is what was written, whoever wrote it."""

from __future__ import annotations


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
