"""From hidden states to logits with the model's own final norm, output layer, scaling and soft-capping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mechdiff_mlflow.engine.model.forward import PromptForward


class _Stub(nn.Module):
    """Stands for a block: returns what it is told, and looks like the block to whoever asks."""

    def __init__(self, block: nn.Module, answer: Callable[[], Any]) -> None:
        super().__init__()
        self.__dict__.update(_block=block, _answer=answer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_answer"]()


@contextmanager
def head(forward: PromptForward, output_length: int | None) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from rows [r, width] that leave the last block to logits [r, vocabulary].

    The model is called with every block replaced by one that hands over the rows.

    Args:
        forward: Of the model.
        output_length: Length of the tuple that a block returns, or None for a plain tensor.
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
