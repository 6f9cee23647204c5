"""One forward of the whole model on whole prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine.model.architecture import Decoder, text_config
from mechdiff_mlflow.engine.model.attention_routing import plain_attention
from mechdiff_mlflow.engine.model.chunks import Chunk
from mechdiff_mlflow.engine.model.hooks import activation_hook
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Site


@dataclass(frozen=True, slots=True)
class Recording:
    """What a clean run leaves of a chunk of n prompts."""

    chunk: Chunk
    clean: dict[Site, Tensor]  # the model's own activation, see `Chunk.read`
    logits: Tensor  # next-token logits [n * steps, vocabulary], prompt by prompt

    def __len__(self) -> int:
        return len(self.chunk)

    def finite(self) -> Tensor:
        """Whether activations and logits are numbers [n, sites + 1], on the logits' device."""
        device = self.logits.device
        tensors = (*self.clean.values(), self.logits.view(len(self), -1))
        return torch.stack([torch.isfinite(x).all(-1).to(device) for x in tensors], 1)

    def check_finite(self, finite: Tensor | None = None) -> None:
        """Refuse activations or logits that are not numbers; `finite` is what `finite()` said, if asked."""
        finite = (self.finite() if finite is None else finite).cpu()
        if not finite.all():
            row, which = (int(i) for i in (~finite).nonzero()[0])
            names = [*(f"The activation at {site}" for site in self.clean), "The next-token logits"]
            raise MechdiffError(
                f"{names[which]} of prompt {int(self.chunk.index[row])} is NaN or infinite; load "
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
        self._head: Any = decoder.model.get_output_embeddings()  # type: ignore[operator]
        # Some models warn of padding tokens without a mask.
        self._filler = int(getattr(text_config(decoder.model), "pad_token_id", None) == 0)

    @torch.no_grad()
    def __call__(self, chunk: Chunk, **more: Any) -> Tensor:
        """Next-token logits [n * steps, vocabulary]; `more` goes to the model."""
        return self.logits(chunk, **more)

    def logits(self, chunk: Chunk, **more: Any) -> Tensor:
        """Next-token logits with the gradients that are asked for outside."""
        self.n_prompts += len(chunk)
        kwargs: dict[str, Any] = {}
        # Without a mask the model may use a causal kernel, which is faster.
        if chunk.is_padded or "position_ids" not in self._accepts:
            kwargs["attention_mask"] = chunk.mask.long()
        if "logits_to_keep" in self._accepts:
            kwargs["logits_to_keep"] = chunk.steps
        return self._last_logits(chunk.ids, chunk.positions, chunk.steps, **{**kwargs, **more})

    @torch.no_grad()
    def tokens(self, n: int) -> Tensor:
        """Logits [n, vocabulary] of n prompts of one token; they are not counted."""
        positions = torch.zeros(n, 1, dtype=torch.long, device=self.device)
        return self._last_logits(torch.full_like(positions, self._filler), positions, 1)

    def _last_logits(self, ids: Tensor, positions: Tensor, steps: int, **kwargs: Any) -> Tensor:
        if "position_ids" in self._accepts:
            kwargs["position_ids"] = positions
        kwargs.setdefault("use_cache", False)
        with plain_attention(self.decoder), _contiguous_input(self._head):
            logits: Tensor = self.decoder.model(input_ids=ids, **kwargs).logits
        return logits[:, -steps:].flatten(0, 1)

    def record(self, chunk: Chunk, sites: Sequence[Site], **more: Any) -> Recording:
        """The clean run of a chunk, with its activations at `sites`; `more` goes to the model."""
        clean: dict[Site, Tensor] = {}

        def keep(site: Site, hidden: Tensor) -> None:
            clean[site] = chunk.read(hidden)

        with ExitStack() as hooks:
            for site in set(sites):
                hooks.enter_context(activation_hook(self.decoder, site, partial(keep, site), len(chunk)))
            return Recording(chunk, clean, self(chunk, **more))


@contextmanager
def head(forward: PromptForward, output_length: int | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from rows [r, width] that leave the last block to logits [r, vocabulary].

    The model's own final norm, output layer, scaling and soft-capping come from calling the model with every
    block replaced by one that hands over the rows, in a tuple of `output_length` if the blocks return one.
    """
    rows: list[Tensor] = []

    def answer() -> Any:
        hidden = rows[0].unsqueeze(1)  # [r, 1, width]: as many prompts of one token
        return hidden if output_length is None else (hidden, *(None,) * (output_length - 1))

    def logits(hidden: Tensor) -> Tensor:
        rows[:] = [hidden]
        return forward.tokens(len(hidden))

    layers = forward.decoder.layers
    own = dict(layers._modules)
    try:
        for name, block in own.items():
            assert block is not None
            layers._modules[name] = _Stub(block, answer)
        yield logits
    finally:
        layers._modules.update(own)


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


class _Stub(nn.Module):
    """Stands for a block: returns what it is told, and looks like the block to whoever asks."""

    def __init__(self, block: nn.Module, answer: Callable[[], Any]) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _answer=answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_answer"]()


def _place_of(module: nn.Module) -> torch.device:
    """Where a module computes; accelerate keeps the weights of an offloaded one elsewhere."""
    device: torch.device = next(module.parameters()).device
    hook: Any = getattr(module, "_hf_hook", None)
    if device.type == "meta" and getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return device


@contextmanager
def _contiguous_input(head: nn.Module | None) -> Iterator[None]:
    """Give a linear layer its input without gaps.

    The last token of every prompt is a view with gaps, for which torch multiplies prompt by prompt and reads
    all weights each time: on a GPU that took as long as two blocks.
    """
    if not isinstance(head, nn.Linear):
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _forward_parameters(model: nn.Module) -> frozenset[str]:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return frozenset(inspect.signature(type(base).forward).parameters)
