"""What one forward of a chunk leaves behind for its variants."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from mechdiff_mlflow.engine.kernels.attention import Prefix
from mechdiff_mlflow.engine.model.architecture import Block
from mechdiff_mlflow.engine.model.attention_routing import Attend, UnsupportedError
from mechdiff_mlflow.engine.model.chunks import Chunk
from mechdiff_mlflow.engine.model.forward import Recording
from mechdiff_mlflow.engine.model.hooks import first_output

_T = TypeVar("_T")

_NOT_KEPT = frozenset(
    {"attention_mask", "causal_mask", "past_key_values", "past_key_value", "layer_past", "cache_position"}
)
"""Arguments of a block that are masks, which the attention hands us, or caches, which are not in use."""


@dataclass(frozen=True, slots=True)
class SweepRecording(Recording):
    """A recording with all that patched tokens need; S is the chunk's suffix."""

    prefixes: dict[int, Prefix]  # what suffixes see, for every block from the first patched one up
    entering: list[Tensor]  # the suffix's hidden states as they enter each block, [n, S, width]
    leaving: list[Tensor]  # the same as they leave it
    arguments: list[dict[str, Any]]  # what else each block was called with, cut to the suffix
    output_length: int | None  # length of the tuple that a block returns, or None for a plain tensor


class SweepRecorder:
    """Listens to one forward of a chunk, from the first block on that a patched token goes through.

    `own` has the attention function of each block.
    """

    def __init__(self, chunk: Chunk, own: Sequence[Attend], first: int) -> None:
        self._chunk, self._own, self._first = chunk, own, first
        self._prefixes: dict[int, Prefix] = {}
        self._entering: dict[int, Tensor] = {}
        self._leaving: dict[int, Tensor] = {}
        self._arguments: dict[int, dict[str, Any]] = {}
        self._output_length: int | None = None

    def attends(self) -> list[Attend]:
        """What computes each block's attention while this listens."""
        # Not kept in the recorder: in a circle of references a whole chunk would outlive its use.
        return [partial(self._attend, i, own) for i, own in enumerate(self._own)]

    @contextmanager
    def listening(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Record the hidden states and arguments of every block while the context is open."""
        with ExitStack() as hooks:
            for i, block in enumerate(blocks):
                before = block.module.register_forward_pre_hook(partial(self._enter, i), with_kwargs=True)
                hooks.callback(before.remove)
                hooks.callback(block.module.register_forward_hook(partial(self._leave, i)).remove)
            yield

    def recording(self, recording: Recording) -> SweepRecording:
        """All that was heard, beside the forward's own recording; unsupported if an attention was not."""
        if self._prefixes.keys() != set(range(self._first, len(self._own))):
            raise UnsupportedError("Some blocks of the model do not use transformers' attention interface.")
        return SweepRecording(
            self._chunk,
            recording.clean,
            recording.logits,
            self._prefixes,
            _in_order(self._entering),
            _in_order(self._leaving),
            _in_order(self._arguments),
            self._output_length,
        )

    def _attend(
        self,
        i: int,
        own: Attend,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        suffix, length = self._chunk.suffix, self._chunk.ids.shape[1]
        if i < self._first:
            return own(module, query, key, value, mask, **kwargs)
        if query.shape[2] != length or key.shape[2] != length:
            raise UnsupportedError(f"{type(module).__name__} sees {key.shape[2]} tokens of {length}.")
        seen = None
        if mask is not None:
            if mask.dim() != 4 or mask.shape[1] != 1:
                raise UnsupportedError(f"{type(module).__name__} has a mask of shape {tuple(mask.shape)}.")
            seen = mask[:, :, -suffix:, :length].clone()
        n_prefix = length - suffix
        self._prefixes[i] = Prefix(
            key[:, :, :n_prefix].contiguous(), value[:, :, :n_prefix].contiguous(), seen
        )
        return own(module, query, key, value, mask, **kwargs)

    def _enter(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The class's forward: wrappers such as accelerate's replace it on the instance.
        signature = inspect.signature(type(module).forward)
        arguments: dict[str, Any] = dict(signature.bind(module, *args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL and arguments.get(name):
                raise UnsupportedError(f"{type(module).__name__} takes arguments without a name.")
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        itself, hidden, *_ = signature.parameters
        del arguments[itself]
        self._entering[i] = arguments.pop(hidden)[:, -self._chunk.suffix :].clone()
        kept = {name: None if name in _NOT_KEPT else value for name, value in arguments.items()}
        self._arguments[i] = {name: map_tensors(value, self._suffix) for name, value in kept.items()}

    def _leave(self, i: int, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        self._leaving[i] = first_output(out)[:, -self._chunk.suffix :].clone()
        self._output_length = len(out) if isinstance(out, tuple) else None

    def _suffix(self, x: Tensor) -> Tensor:
        """One value a token, such as a rotation or a position, for the last tokens."""
        length = self._chunk.ids.shape[1]
        if x.dim() < 2 or x.shape[0] not in (1, len(self._chunk)) or x.shape[1] != length:
            raise UnsupportedError(f"A block is called with a tensor of shape {tuple(x.shape)}.")
        return x[:, -self._chunk.suffix :].clone()


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of every tensor in `value`, which may be a tuple, list or dictionary."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, function) for v in value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    return value


def _in_order(by_block: dict[int, _T]) -> list[_T]:
    return [by_block[i] for i in sorted(by_block)]
