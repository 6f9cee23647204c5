"""What the shipped models do, measured the slow and obvious way: one hook, one forward pass a question.

The training script and the tests share it. It knows nothing of the engine, and so can judge it. Prompts are
batched with prompts of the same length only: no padding, no mask, nothing to get wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechdiff_mlflow.spec.sites import Hook, Site

Act = Callable[[list[int], Tensor], Tensor | None]
"""What to do in a site: gets the rows of the prompts and their activations [rows, tokens, d]; what it
returns, unless None, takes the activations' place."""


@torch.no_grad()
def next_token_logits(
    model: Any, prompts: Sequence[Sequence[int]], acts: Mapping[Site, Act] | None = None, *, batch: int = 128
) -> Tensor:
    """Logits after the last token of each prompt, [n, vocabulary], on the CPU in float32."""
    logits: list[Tensor] = [torch.empty(0)] * len(prompts)
    for rows in _equal_length_batches(prompts, batch):
        ids = torch.tensor([prompts[row] for row in rows], device=model.device)
        with ExitStack() as hooks:
            for site, act in (acts or {}).items():
                hooks.enter_context(_hooked(model, site, partial(act, rows)))
            last = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        for row, value in zip(rows, last.float().cpu(), strict=True):
            logits[row] = value
    return torch.stack(logits)


def accuracy(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> float:
    """Share of the prompts after which the likeliest token is the answer."""
    return float((next_token_logits(model, prompts).argmax(-1) == torch.tensor(answers)).double().mean())


def activations(
    model: Any, prompts: Sequence[Sequence[int]], sites: Sequence[Site]
) -> tuple[dict[Site, Tensor], Tensor]:
    """The activation of each site at the decision tokens, [n, d], and the next-token logits."""
    taken = {site: torch.empty(len(prompts), model.config.hidden_size) for site in sites}

    def take(site: Site, rows: list[int], activation: Tensor) -> None:
        taken[site][rows] = activation[:, -1].float().cpu()

    logits = next_token_logits(model, prompts, {site: partial(take, site) for site in sites})
    return taken, logits


def kl_patched_clean_nats(
    model: Any, prompts: Sequence[Sequence[int]], site: Site, values: Tensor, clean_logits: Tensor
) -> Tensor:
    """KL(patched || clean) of each prompt, [n], with `values` [n, d] put at the site's decision tokens."""

    def replace(rows: list[int], activation: Tensor) -> Tensor:
        patched = activation.clone()
        patched[:, -1] = values[rows].to(activation)
        return patched

    patched = next_token_logits(model, prompts, {site: replace}).double().log_softmax(-1)
    clean = clean_logits.double().log_softmax(-1)
    return (patched.exp() * (patched - clean)).sum(-1)


def _equal_length_batches(prompts: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    rows_of_length: dict[int, list[int]] = defaultdict(list)
    for row, ids in enumerate(prompts):
        rows_of_length[len(ids)].append(row)
    for rows in rows_of_length.values():
        yield from (rows[start : start + batch] for start in range(0, len(rows), batch))


@contextmanager
def _hooked(model: Any, site: Site, act: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    layer = model.model.layers[site.layer]

    def before(_: nn.Module, args: tuple[Any, ...]) -> Any:
        new = act(args[0])
        return None if new is None else (new, *args[1:])

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = act(first)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    if site.hook is Hook.RESID_PRE:
        handle = layer.register_forward_pre_hook(before)
    else:
        module = {Hook.ATTN_OUT: layer.self_attn, Hook.MLP_OUT: layer.mlp, Hook.RESID_POST: layer}[site.hook]
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
