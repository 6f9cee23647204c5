"""Prompts as the models see them: text to tokens, positions and splits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenizedPrompts:
    """Unpadded token ids of n prompts, and the position of each that is read and replaced.

    Args:
        ids: Token ids, one tuple a prompt; the decision token is the last of each.
        positions: For each prompt the index into `ids` of the token whose activations are captured and
            patched; `len(ids) - 1` is the decision token.
    """

    ids: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)
