"""What may be held in memory beside the weights, and what follows for the engine's limits."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mechdiff_mlflow.engine.memory.oom_retry import ChunkLimits
from mechdiff_mlflow.engine.model.architecture import Decoder, text_config
from mechdiff_mlflow.errors import MechdiffError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions of a model from which its need of memory follows."""

    n_layers: int
    width: int  # of the residual stream
    inner: int  # width of the MLPs
    heads_width: int  # query heads times their width
    kv_width: int  # key heads times their width
    n_heads: int  # query heads
    vocabulary: int
    number: int  # bytes of a number
    keeps_scores: bool  # whether attention scores of a forward exist as a matrix (eager attention)

    @classmethod
    def of(cls, decoder: Decoder, vocabulary: int, *, keeps_scores: bool) -> ModelShape:
        """From a model's configuration; what is not there is guessed as for Llama and GPT-2."""
        config = text_config(decoder.model)
        n_heads = int(config.num_attention_heads)
        # Multi-head latent attention has keys that are wider than a head.
        latent = int(getattr(config, "qk_head_dim", 0) or 0)
        head = max(latent, int(getattr(config, "head_dim", None) or decoder.width // n_heads))
        key_heads = n_heads if latent else int(getattr(config, "num_key_value_heads", None) or n_heads)
        inner = [getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")]
        number = next(p for p in decoder.model.parameters() if p.is_floating_point()).element_size()
        return cls(
            n_layers=len(decoder.blocks),
            width=decoder.width,
            inner=max([int(n) for n in inner if n], default=4 * decoder.width),
            heads_width=n_heads * head,
            kv_width=key_heads * head,
            n_heads=n_heads,
            vocabulary=vocabulary,
            number=number,
            keeps_scores=keeps_scores,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """What a call asks of the model."""

    n_tokens: int  # of the longest prompt
    suffix: int = 1  # tokens from the patched position to the end, at most
    n_sites: int = 1  # sites that are read
    n_columns: int = 0  # patched runs of each prompt; 0 for a capture
    tree: bool = False  # whether variants stand side by side behind a mask (the path masked)
    steps: int = 1  # next tokens of each prompt that are compared
    n_replaced: int = 1  # vectors that a replacement has


def needed(limits: ChunkLimits, shape: ModelShape, load: Load) -> dict[str, int]:
    """Bytes that a call takes at most beside the weights and the activations it returns, by limit.

    With e bytes a number, T tokens a prompt, S of them re-run, R replaced, A read, w the width, i of the MLP,
    a of the query and k of the key heads, V the vocabulary, L layers, s sites and c patched runs a prompt:

    - a prompt: e·L·(2·T·k + 2·S·w) of recorded keys, values and suffixes, T·((6·w + 3·i + 2·a)·e + 8·w) for
      the block at work, A·V·(2·e + 8) of clean logits, (s + c)·R·w·(2·e + 8) of replacements; under eager
      attention e·heads·T² for each of two matrices of scores too;
    - a patched token: (10·w + 4·i)·e + 4·(6·a + 4·k), and as a tree 2·e·L·k of cache and its row of the mask;
    - a row of logits: V·(e + 4) + w·e.
    """
    e, t, w = shape.number, load.n_tokens, shape.width
    recorded = e * shape.n_layers * (2 * t * shape.kv_width + 2 * load.suffix * w) if load.n_columns else 0
    block = t * ((6 * w + 3 * shape.inner + 2 * shape.heads_width) * e + 8 * w)
    scores = 2 * e * shape.n_heads * t * t if shape.keeps_scores else 0
    logits = load.steps * shape.vocabulary * (2 * e + 8)
    replacements = (load.n_sites + load.n_columns) * load.n_replaced * w * (2 * e + 8)
    # No more rows than there are.
    n_rows = min(limits.max_rows, limits.batch_size * load.n_columns * load.suffix)
    row = (10 * w + 4 * shape.inner) * e + 4 * (6 * shape.heads_width + 4 * shape.kv_width)
    if load.tree:
        in_tree = min(n_rows, load.n_columns * load.suffix)
        row += 2 * e * shape.n_layers * shape.kv_width + (2 * e + 4 * shape.n_heads) * (t + in_tree)
    n_head = min(limits.head_rows, limits.batch_size * max(1, load.n_columns) * load.steps)
    return {
        "batch_size": limits.batch_size * (recorded + block + scores + logits + replacements),
        "max_rows": n_rows * row,
        "head_rows": n_head * (shape.vocabulary * (e + 4) + w * e),
    }


def limits_within(budget: int, most: ChunkLimits, shape: ModelShape, load: Load) -> ChunkLimits:
    """The largest limits, found by halving what takes most, that need three quarters of the budget (bytes).

    Raises:
        MechdiffError: Not even one prompt and one row fit.
    """
    limits, working = most, budget * 3 // 4
    while (total := sum((need := needed(limits, shape, load)).values())) > working:
        halves = {name: n_bytes for name, n_bytes in need.items() if getattr(limits, name) > 1}
        if not any(halves.values()):
            raise MechdiffError(
                f"One prompt of {load.n_tokens} tokens needs more than the memory budget leaves for it "
                f"({size(working)}); give --memory-budget {size(-(-total * 4 // 3))} or more."
            )
        name = max(halves, key=lambda name: halves[name])
        limits = replace(limits, **{name: getattr(limits, name) // 2})
    return limits


def parse_bytes(text: str) -> int:
    """Read `8GiB`, `500MB`, `1.5GB` or a number of bytes; refuse other texts, and sizes under one byte."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]?i?B)?", text)
    unit = _UNITS.get(found[2] or "B") if found else None
    if found is None or unit is None or int(float(found[1]) * unit) < 1:
        raise MechdiffError(f"Memory budget {text!r} is not a size; write e.g. 8GiB or 500MB.")
    return int(float(found[1]) * unit)


def size(n_bytes: int) -> str:
    """A number of bytes as `parse_bytes` reads it, rounded up to three digits."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if n_bytes >= _UNITS[unit]:
            tenths = -(-n_bytes * 10 // _UNITS[unit])
            return f"{tenths / 10:g}{unit}"
    return f"{n_bytes}B"
