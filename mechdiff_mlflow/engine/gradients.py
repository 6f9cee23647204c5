"""How the next-token distribution moves with an activation: gradients of sampled log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from mechdiff_mlflow.engine.model.chunks import Chunk
from mechdiff_mlflow.engine.model.forward import PromptForward
from mechdiff_mlflow.engine.model.hooks import activation_hook
from mechdiff_mlflow.spec.sites import Site


def score_gradients(
    forward: PromptForward, chunk: Chunk, sites: Sequence[Site], drawn: Tensor
) -> Sequence[Tensor]:
    """∂ log p(t)/∂h of each site [n, width], where t is at the place `drawn` [n] of p cumulated to [0, 1)."""
    added: dict[Site, Tensor] = {}

    def add(site: Site, hidden: Tensor) -> Tensor:
        zeros = hidden.new_zeros(hidden.shape[0], hidden.shape[-1]).requires_grad_()
        added[site] = zeros
        moved = hidden.clone()
        span = chunk.spanned(moved)
        span.copy_(span + zeros.unsqueeze(1))
        return moved

    with torch.enable_grad(), ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(activation_hook(forward.decoder, site, partial(add, site), len(chunk)))
        log_p = forward.logits(chunk).float().log_softmax(-1)  # [n, vocabulary]
        cumulated = log_p.detach().cpu().double().exp().cumsum(-1)
        places = drawn.double().unsqueeze(1) * cumulated[:, -1:]
        tokens = torch.searchsorted(cumulated, places, right=True).clamp(max=log_p.shape[1] - 1)
        chosen = log_p.gather(1, tokens.to(log_p.device))
        return torch.autograd.grad(chosen.sum(), [added[site] for site in sites])
