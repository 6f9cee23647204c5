"""Prompts as the tokens that a model of a shipped pair reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def encode(tokenizer: Any, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text as a user's message, up to the decision token."""
    ids = []
    for text in texts:
        message = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        ids.append(list(encoded["input_ids"]))
    return ids
