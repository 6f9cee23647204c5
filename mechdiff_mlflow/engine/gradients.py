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
) -> dict[Site, Tensor]:
    """∂ log p(t)/∂h at each site and prompt for one next token t ~ p, [n, width] each, float64 on the CPU.

    `drawn` is uniform in [0, 1), [n]: t is the token at that place of the cumulated p.

    Over prompts gᵀg/n estimates the mean Fisher information F of the next token in the activation h, and
    KL(patched ‖ clean) is ½·δᵀFδ for a small replacement h + δ.

    Reference: Kunstner, Balles & Hennig (2019), Limitations of the empirical Fisher approximation: t is drawn
        from the model's own distribution, not taken from data.
    """
    added: dict[Site, Tensor] = {}

    def add(site: Site, hidden: Tensor) -> Tensor:
        zeros = hidden.new_zeros(hidden.shape[0], hidden.shape[-1]).requires_grad_()
        added[site] = zeros
        moved = hidden.clone()
        span = chunk.spanned(moved)
        span.copy_(span + zeros.unsqueeze(1))
        return moved

    with torch.enable_grad(), ExitStack() as taps:
        for site in sites:
            taps.enter_context(activation_hook(forward.decoder, site, partial(add, site), len(chunk)))
        log_p = forward.logits(chunk).float().log_softmax(-1)  # [n, vocabulary]
        cumulated = log_p.detach().cpu().double().exp().cumsum(-1)
        places = drawn.double().unsqueeze(1) * cumulated[:, -1:]
        tokens = torch.searchsorted(cumulated, places, right=True).clamp(max=log_p.shape[1] - 1)
        chosen = log_p.gather(1, tokens.to(log_p.device))
        gradients = torch.autograd.grad(chosen.sum(), [added[site] for site in sites])
    return {site: g.double().cpu() for site, g in zip(sites, gradients, strict=True)}
