"""A map at work in a live model: every forward and every `generate` while a context is open.

Inside `generate`, tokens are counted from the prompt's last, whatever the cache, the beams or an assistant's
candidates; outside, one token onto a filled cache is a generated token and any other forward is a prompt.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine.model.architecture import Decoder, ModuleNames
from mechdiff_mlflow.engine.model.hooks import activation_hook
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.spec.choices import Choice
from mechdiff_mlflow.spec.sites import Site

_CACHE_EDITS = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices")

_source_runs: ContextVar[bool] = ContextVar("_source_runs", default=False)  # no attached map touches it


class Tokens(Choice):
    """The tokens whose activations an attached map replaces."""

    NEW = "new"
    """The decision token and every generated one: each token from which a new one is predicted."""
    DECISION = "decision"
    """The decision token alone, as in the experiments."""
    ALL = "all"
    """Every token, those of the prompt too, as an adapter does."""


@contextmanager
def attached(
    the_map: AffineMap,
    model: nn.Module,
    site: Site | str | None = None,
    *,
    alpha: float | None = None,
    tokens: Tokens | str = Tokens.NEW,
    source: nn.Module | Tensor | None = None,
    source_context: Callable[[], AbstractContextManager[object]] = nullcontext,
    modules: ModuleNames | None = None,
) -> Iterator[nn.Module]:
    """Put the mapped activation in place of `model`'s own at `site` while the context is open.

    with attached(the_map, base): ...  # the base's own activation is mapped: base acts as tuned there
    with attached(the_map, tuned, source=base): ...  # the experiments' patch: base's mapped one in tuned

    Works with any batch and padding, with and without a cache, with beams and assistants. Of maps attached
    together, one attached later at the same site sees what the earlier one left.

    Args:
        the_map: The map.
        model: A transformers causal LM, or a PEFT wrapper of one; afterwards as before, whatever happens.
        site: By default where the map says that it was fitted.
        alpha: Instead of the map's own.
        tokens: Whose activations are replaced: `new`, `decision` or `all`.
        source: The map's input. None: the model's own activation at the site. A model: its activation there
            on the same tokens, in a clean run with its own cache. A tensor [n_prompts, d_in]: activations at
            the decision tokens, with `tokens="decision"`.
        source_context: Context of every run of the source, e.g. `peft_model.disable_adapter`.
        modules: Module names, for a model that is not recognised.

    Raises:
        MechdiffError: The site is unknown or does not exist, or the widths do not fit; later, from a
            forward: a call in which the decision token or the source's cache cannot be known.
    """
    named = the_map.meta.get("site") if site is None else site
    if named is None:
        raise MechdiffError("The map does not say at which site it was fitted; name one, e.g. L26/attn_out.")
    site = named if isinstance(named, Site) else Site.parse(str(named))
    chosen_tokens = Tokens.parse(str(tokens))
    decoder = Decoder.of(model, modules)
    decoder.check(site)
    reader = _reader(source, site, source_context, modules, chosen_tokens, model)
    d_in = decoder.width if reader is None else reader.width
    if (the_map.d_in, the_map.d_out) != (d_in, decoder.width):
        raise MechdiffError(
            f"The map goes from {the_map.d_in} to {the_map.d_out} dimensions and cannot be attached at "
            f"{site}, where {d_in}-wide activations come in and {decoder.width}-wide ones go out; use a map "
            "of these models."
        )
    own = the_map if alpha is None else the_map.with_alpha(alpha)
    attachment = _Attachment(own, chosen_tokens, reader)
    with ExitStack() as hooks:
        hooks.enter_context(attachment.watching(without_peft(model)))
        hooks.enter_context(activation_hook(decoder, site, attachment.edit, attachment.n_rows))
        yield model


@dataclass(frozen=True, slots=True)
class _Call:
    """One forward of the model: n rows of q tokens after `past` cached ones."""

    arguments: dict[str, Any]
    n: int
    q: int
    past: int

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        signature = inspect.signature(type(model).forward)
        bound = signature.bind_partial(model, *args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.update(bound.pop(parameter.name, {}))
        ids = bound.get("input_ids")
        given = bound.get("inputs_embeds") if ids is None else ids
        if not isinstance(given, Tensor):
            raise MechdiffError("A model with a map attached was called without input_ids; pass token ids.")
        length = getattr(bound.get("past_key_values"), "get_seq_length", lambda: 0)()
        return cls(bound, given.shape[0], given.shape[1], int(length))

    @property
    def mask(self) -> Tensor | None:
        """The attention mask [n, past + q]; None when every token is real."""
        mask = self.arguments.get("attention_mask")
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            return mask
        raise MechdiffError(
            "An attached map finds the decision token by a mask of shape [prompts, tokens] and the model was "
            "called with another kind; pass a plain attention_mask and no static cache."
        )


class _Attachment:
    """The edit of the running forward: which activations are replaced, and by what."""

    def __init__(
        self, the_map: AffineMap, tokens: Tokens, reader: _GivenActivations | _SourceModel | None
    ) -> None:
        self._map, self._tokens, self._reader = the_map, tokens, reader
        self._n_prompt: int | None = None  # columns of the prompt, inside generate
        self._chosen: Tensor | None = None  # [n, q], of the running forward
        self._x: Tensor | None = None  # what the map is given [n, q, d_in], if it is not the model's own

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = (
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        )
        try:
            with self._counting(model):
                yield
        finally:
            for handle in handles:
                handle.remove()
            if isinstance(self._reader, _SourceModel):
                self._reader.close()

    def n_rows(self) -> int:
        """Rows of the running forward."""
        if self._chosen is not None:
            return len(self._chosen)
        if _source_runs.get():
            return 1
        raise MechdiffError(
            "A part of a model with a map attached was called by itself; call the model it is attached to."
        )

    def edit(self, hidden: Tensor) -> Tensor | None:
        """Hidden states [n, q, width] with the chosen ones replaced."""
        if _source_runs.get() or self._chosen is None or not bool(self._chosen.any()):
            return None
        chosen = self._chosen.to(hidden.device)
        x = hidden[chosen] if self._x is None else self._x.to(hidden.device)[chosen]
        if self._map.mean_in.device != x.device:
            self._map = self._map.to(device=x.device)
        new = hidden.clone()
        new[chosen] = self._map(x).to(hidden.dtype)
        return new

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _source_runs.get():
            return
        call = _Call.of(model, args, kwargs)
        self._chosen = self._choose(call)
        self._x = None if self._reader is None else self._reader.read(call)

    def _after(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if _source_runs.get():
            return
        self._chosen = self._x = None
        cache = getattr(out, "past_key_values", None)
        if isinstance(self._reader, _SourceModel) and cache is not None:
            self._reader.pair_caches(cache)

    def _choose(self, call: _Call) -> Tensor:
        chosen = torch.zeros(call.n, call.q, dtype=torch.bool)
        if self._tokens is Tokens.ALL:
            return ~chosen
        if self._n_prompt is not None:
            decision = self._n_prompt - 1
            mask = call.arguments.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, decision:][:, :1].all()):
                raise MechdiffError("A prompt ends with padding; generate with padding_side='left'.")
            columns = call.past + torch.arange(call.q)
            is_new = columns == decision if self._tokens is Tokens.DECISION else columns >= decision
            return is_new.expand(call.n, -1)
        if call.past and call.q == 1:
            return ~chosen if self._tokens is Tokens.NEW else chosen
        mask = call.mask
        if mask is None:
            chosen[:, -1] = True
            return chosen
        real = mask[:, -call.q :].cpu() != 0
        last = call.q - 1 - real.flip(1).int().argmax(1)
        chosen[torch.arange(call.n), last] = real.any(1)
        return chosen

    @contextmanager
    def _counting(self, model: Any) -> Iterator[None]:
        """Tell the prompt's length while `generate` runs; a forward without a cache does not show it."""
        generate = getattr(model, "generate", None)
        if generate is None:
            yield
            return
        own = model.__dict__.get("generate")

        @functools.wraps(generate)
        def counted(*args: Any, **kwargs: Any) -> Any:
            prompts = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
            lengths = [p.shape[1] for p in prompts if isinstance(p, Tensor)]
            if not lengths:
                raise MechdiffError("generate was called without a prompt; pass input_ids.")
            outer, self._n_prompt = self._n_prompt, lengths[0]
            try:
                return generate(*args, **kwargs)
            finally:
                self._n_prompt = outer

        model.generate = counted
        try:
            yield
        finally:
            del model.generate
            if own is not None:
                model.generate = own


class _GivenActivations:
    """Source activations at the decision tokens, [n_prompts, width]."""

    def __init__(self, rows: Tensor) -> None:
        self._rows, self.width = rows, rows.shape[1]

    def read(self, call: _Call) -> Tensor:
        """Activations for the tokens of a forward, [n, q, width]."""
        if call.n % len(self._rows):
            raise MechdiffError(
                f"{len(self._rows)} activations were given as the source and the model was called with "
                f"{call.n} prompts; give one activation a prompt."
            )
        rows = self._rows.repeat_interleave(call.n // len(self._rows), 0)  # beams of a prompt lie together
        return rows[:, None].expand(-1, call.q, -1)


class _SourceModel:
    """A source that runs clean on the same tokens, with a cache of its own for each cache of the model."""

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        context: Callable[[], AbstractContextManager[object]],
        modules: ModuleNames | None,
    ) -> None:
        self._decoder, self._site, self._context = Decoder.of(model, modules), site, context
        self._decoder.check(site)
        self.width = self._decoder.width
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        self._embedding: Tensor = embeddings.weight
        self._accepts = frozenset(inspect.signature(type(without_peft(model)).forward).parameters)
        self._twins: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._latest: Any = None

    def read(self, call: _Call) -> Tensor:
        """Activations for the tokens of a forward, [n, q, width]."""
        kept: list[Tensor] = []
        token = _source_runs.set(True)
        try:
            with (
                self._context(),
                torch.no_grad(),
                activation_hook(self._decoder, self._site, lambda h: kept.append(h.clone()), call.n),
            ):
                out = self._decoder.model(**self._arguments(call))
        finally:
            _source_runs.reset(token)
        self._latest = getattr(out, "past_key_values", None)
        return kept[0]

    def _arguments(self, call: _Call) -> dict[str, Any]:
        ids = call.arguments.get("input_ids")
        if ids is None:
            raise MechdiffError("A source model needs token ids; pass input_ids, not inputs_embeds.")
        if int(ids.max()) >= len(self._embedding):
            raise MechdiffError(
                f"Token {int(ids.max())} does not exist in the source, which has {len(self._embedding)}; "
                'give its activations as a tensor, with tokens="decision".'
            )
        arguments = {
            "input_ids": ids,
            "attention_mask": call.mask,
            "position_ids": call.arguments.get("position_ids"),
            "use_cache": call.arguments.get("use_cache") is not False,
            "logits_to_keep": 1,
        }
        if call.past:
            cache = self._twins.get(call.arguments["past_key_values"])
            if cache is None or int(cache.get_seq_length()) != call.past:
                raise MechdiffError(
                    f"The cache holds {call.past} tokens that the source model has not seen; pass the whole "
                    "sequence, or start with an empty cache inside the context."
                )
            arguments["past_key_values"] = cache
        device = self._embedding.device
        given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        return {name: x for name, x in given.items() if name in self._accepts and x is not None}

    def pair_caches(self, cache: Any) -> None:
        if self._latest is None or self._twins.get(cache) is self._latest:
            return
        self._release(cache)
        self._twins[cache] = self._latest
        for name in _CACHE_EDITS:  # beam search and assistants rearrange the cache behind our back
            if callable(edit := getattr(cache, name, None)):
                setattr(cache, name, _both(edit, getattr(self._latest, name)))

    def close(self) -> None:
        for cache in list(self._twins):
            self._release(cache)

    def _release(self, cache: Any) -> None:
        self._twins.pop(cache, None)
        for name in _CACHE_EDITS:
            cache.__dict__.pop(name, None)


def _both(one: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(one)
    def both(*args: Any, **kwargs: Any) -> Any:
        other(*args, **kwargs)
        return one(*args, **kwargs)

    return both


def _reader(
    source: nn.Module | Tensor | None,
    site: Site,
    context: Callable[[], AbstractContextManager[object]],
    modules: ModuleNames | None,
    tokens: Tokens,
    model: nn.Module,
) -> _GivenActivations | _SourceModel | None:
    if source is None:
        return None
    if isinstance(source, Tensor):
        if source.ndim != 2 or not len(source) or tokens is not Tokens.DECISION:
            raise MechdiffError(
                f"Activations {list(source.shape)} were given as the source with tokens={str(tokens)!r}; "
                'give [n_prompts, width] of the decision tokens with tokens="decision", or a model.'
            )
        return _GivenActivations(source)
    if without_peft(source) is without_peft(model) and context is nullcontext:
        raise MechdiffError(
            "The source is the model itself; leave it out to map the model's own activation, or pass "
            "source_context=model.disable_adapter to read a PEFT model without its adapter."
        )
    return _SourceModel(source, site, context, modules)


def without_peft(model: nn.Module) -> nn.Module:
    """The transformers model in a PEFT wrapper, or the model itself."""
    get: Any = getattr(model, "get_base_model", None)
    inner: nn.Module = model if get is None else get()
    return inner
