"""One forward of the whole model on whole prompts."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine.architecture import Decoder, text_config
from mechdiff_mlflow.engine.chunks import Chunk
from mechdiff_mlflow.engine.routing import plain_attention
from mechdiff_mlflow.engine.taps import tapped
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.sites import Site


@dataclass(frozen=True, slots=True)
class Recording:
    """What a clean run leaves of a chunk of n prompts.

    Args:
        chunk: The prompts.
        clean: The model's own activation [n, width] at each site, at the position or mean of its span.
        logits: Next-token logits [n, vocabulary].
    """

    chunk: Chunk
    clean: dict[Site, Tensor]
    logits: Tensor

    def check_finite(self) -> None:
        """Raise unless activations and logits are numbers.

        Raises:
            MechdiffError: One is NaN or infinite; names it and the prompt.
        """
        tensors = {f"The activation at {site}": x for site, x in self.clean.items()}
        tensors["The next-token logits"] = self.logits
        device = self.logits.device  # asked once: every answer of a GPU is waited for
        finite = torch.stack(
            [torch.isfinite(x).all(-1).to(device) for x in tensors.values()]
        ).cpu()  # [tensors, n]
        if not finite.all():
            which, row = (int(i) for i in (~finite).nonzero()[0])
            raise MechdiffError(
                f"{list(tensors)[which]} of prompt {int(self.chunk.index[row])} is NaN or infinite; load "
                "the model in bfloat16 or float32, or look for broken weights."
            )


class PromptForward:
    """Runs whole prompts, and counts them in `n_prompts`."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.n_prompts = 0
        self._accepts = _forward_parameters(decoder.model)
        embeddings: Any = decoder.model.get_input_embeddings()  # type: ignore[operator]
        self.device = _place_of(embeddings)
        self.vocabulary: int = embeddings.weight.shape[0]
        # Some models warn of padding tokens without a mask.
        self._filler = int(text_config(decoder.model).pad_token_id == 0)

    @torch.no_grad()
    def __call__(self, chunk: Chunk, **more: Any) -> Tensor:
        """Next-token logits [n, vocabulary]; `more` goes to the model."""
        return self.logits(chunk, **more)

    def logits(self, chunk: Chunk, **more: Any) -> Tensor:
        """The same with the gradients that are asked for outside."""
        self.n_prompts += len(chunk)
        kwargs: dict[str, Any] = {}
        # Without a mask the model may use a causal kernel, which is faster.
        if chunk.is_padded or "position_ids" not in self._accepts:
            kwargs["attention_mask"] = chunk.mask.long()
        if "logits_to_keep" in self._accepts:
            kwargs["logits_to_keep"] = 1
        return self._last_logits(chunk.ids, chunk.positions, **{**kwargs, **more})

    @torch.no_grad()
    def tokens(self, n: int) -> Tensor:
        """Logits [n, vocabulary] of n prompts of one token; they are not counted."""
        positions = torch.zeros(n, 1, dtype=torch.long, device=self.device)
        return self._last_logits(torch.full_like(positions, self._filler), positions)

    def _last_logits(self, ids: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
        if "position_ids" in self._accepts:
            kwargs["position_ids"] = positions
        kwargs.setdefault("use_cache", False)
        with plain_attention(self.decoder):
            logits: Tensor = self.decoder.model(input_ids=ids, **kwargs).logits
        return logits[:, -1]

    def record(self, chunk: Chunk, sites: Sequence[Site], **more: Any) -> Recording:
        """The clean run of a chunk, with its activations at `sites`; `more` goes to the model."""
        clean: dict[Site, Tensor] = {}

        def keep(site: Site, hidden: Tensor) -> None:
            clean[site] = chunk.read(hidden)

        with ExitStack() as taps:
            for site in set(sites):
                edit = lambda hidden, site=site: keep(site, hidden)  # noqa: E731
                taps.enter_context(tapped(self.decoder, site, edit, len(chunk)))
            return Recording(chunk, clean, self(chunk, **more))


def _place_of(module: nn.Module) -> torch.device:
    """Where a module computes; accelerate keeps the weights of an offloaded one elsewhere."""
    device: torch.device = next(module.parameters()).device
    hook: Any = getattr(module, "_hf_hook", None)
    if device.type == "meta" and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return device


def _forward_parameters(model: nn.Module) -> frozenset[str]:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return frozenset(inspect.signature(type(base).forward).parameters)
