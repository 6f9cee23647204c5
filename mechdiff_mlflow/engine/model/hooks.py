"""Reading and replacing the activation at a site with a hook that is gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Hook, Site

Edit = Callable[[Tensor], Tensor | None]
"""Receives hidden states [n_prompts, tokens, width]; returns new ones, or None to leave them."""


@contextmanager
def activation_hook(
    decoder: Decoder, site: Site, edit: Edit, n_prompts: int | Callable[[], int]
) -> Iterator[None]:
    """Call `edit` on the activations at `site` in every forward while the context is open.

    A forward has `n_prompts`; where that differs from one to the next, a function says it of the running one.
    """

    def edited(hidden: Tensor) -> Tensor | None:
        if not 2 <= hidden.dim() <= 3:
            raise MechdiffError(
                f"The activation at {site} has the shape {list(hidden.shape)}, where prompts, tokens and "
                "width were expected; such a stream cannot be patched, so take a model of another family."
            )
        # OPT flattens prompts and tokens before its MLP.
        n = n_prompts if isinstance(n_prompts, int) else n_prompts()
        new = edit(hidden.view(n, -1, hidden.shape[-1]))
        return None if new is None else new.view(hidden.shape)

    def on_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = edited(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    def on_output(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        new = edited(first_output(out))
        return None if new is None else with_first_output(out, new)

    module = decoder.module(site)
    if site.hook is Hook.RESID_PRE:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def first_output(out: Any) -> Tensor:
    """The hidden states in a module's output, which may be a tuple."""
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def with_first_output(out: Any, hidden: Tensor) -> Any:
    """A module's output with other hidden states."""
    return (hidden, *out[1:]) if isinstance(out, tuple) else hidden
