"""Tasks about answers: what models say, with or without a map, and how probable the right words are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mechdiff_mlflow.engine import VariantGroup
from mechdiff_mlflow.engine.model.chunks import Chunk
from mechdiff_mlflow.engine.paths.variants import Rows
from mechdiff_mlflow.experiments import rows
from mechdiff_mlflow.experiments.rows import patchable
from mechdiff_mlflow.experiments.workers.tasks import Task, Tensors, variants_of
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.models.attach import Tokens, attached
from mechdiff_mlflow.models.generation import continued
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.sites import Site

_AT_ONCE = 64
"""Rows of logits that are made float64 together."""


@dataclass(frozen=True, eq=False)
class Greedy(Task):
    """Greedy continuations of one model up to a token: `tokens` [n, v, n_tokens], −1 after the end.

    v are the maps at work in it, each at the decision token, or with `each` at that and every new token, on
    the base model's activations there; without maps the model itself alone.
    """

    role: str
    n_tokens: int  # at most
    end: int | None  # a token that ends a turn, beside those that the checkpoint names
    site: Site | None = None
    maps: tuple[AffineMap, ...] = ()
    each: bool = False

    def _settings(self) -> list[str]:
        """Maps are told apart by what they compute."""
        plain = (self.role, self.n_tokens, self.end, self.site, self.each)
        return [*map(str, plain), *(map_.digest for map_ in self.maps)]

    def run(self, pair: Pair) -> Tensors:
        """See above."""
        tokens = pair.tokens(self.role, self.prompts, self.position)
        found = []
        for attachment in self._attachments(pair) if self.maps else [lambda index: nullcontext()]:
            said, _ = continued(
                pair.side(self.role),
                tokens,
                self.n_tokens,
                attachment=attachment,
                ends=() if self.end is None else (self.end,),
            )
            found.append([[*ids, *[-1] * (self.n_tokens - len(ids))] for ids in said])
        return {"tokens": torch.tensor(found).transpose(0, 1)}

    def _attachments(self, pair: Pair) -> list[Callable[[Tensor], AbstractContextManager[object]]]:
        """For each map the context of a batch of prompts, given which they are."""
        assert self.site is not None
        known = None
        if not self.each:
            known = rows.capture(pair, "base", self.prompts, self.position, [self.site])[self.site]
        at, site = (Tokens.NEW if self.each else Tokens.DECISION), self.site

        def attach(map_: AffineMap, index: Tensor) -> AbstractContextManager[object]:
            source = pair.base.model if known is None else known[index]
            context = pair.base.switch if known is None else nullcontext
            return attached(
                map_,
                pair.side(self.role).model,
                site,
                tokens=at,
                source=source,
                source_context=context,
                modules=pair.modules,
            )

        return [partial(attach, map_) for map_ in self.maps]


@dataclass(frozen=True, eq=False)
class Forced(Task):
    """What models think of answers that are read to them: `log_p` in float64, [n, 2 + v, T, 3] in nats.

    The rows are base, tuned (its identity patch) and tuned with each of v maps at a site; the columns are of
    the answer's token, the one that tuned prefers there and the one that base does. NaN after the end.
    """

    site: Site
    maps: tuple[AffineMap, ...]

    def _settings(self) -> list[str]:
        """Maps are told apart by what they compute."""
        return [str(self.site), *(map_.digest for map_ in self.maps)]

    def run(self, pair: Pair) -> Tensors:
        """See above."""
        answers = self.prompts.answers
        assert answers is not None
        tokens = torch.zeros(len(self.prompts), answers.n_tokens, 3, dtype=torch.long)
        for i, ids in enumerate(answers.ids):
            tokens[i, : len(ids), 0] = torch.tensor(ids)
        shape = (len(tokens), 2 + len(self.maps), *tokens.shape[1:])
        found = torch.full(shape, torch.nan, dtype=torch.float64)

        def prefer(column: int, chunk: Chunk, some: Rows) -> None:
            prompt, step = _places(chunk, some)
            tokens[prompt, step, column] = some.logits.argmax(-1).cpu()

        def watch(first: int, chunk: Chunk, some: Rows) -> None:
            prompt, step = _places(chunk, some)
            found[prompt, first + some.column, step] = _log_probs(some.logits, tokens[prompt, step])

        where = (self.prompts, self.position, [self.site])
        itself = VariantGroup.identity(self.site)
        with patchable(pair, "tuned", *where) as (engine, recorded):
            engine.score(recorded, [itself], look=partial(prefer, 1))
        base = rows.capture(pair, "base", *where, to_patch=True)
        with patchable(pair, "base", *where) as (engine, recorded):
            engine.score(recorded, [itself], look=partial(prefer, 2))
            engine.score(recorded, [itself], look=partial(watch, 0))
        with patchable(pair, "tuned", *where) as (engine, recorded):
            n_replaced = answers.most_replaced
            groups = variants_of(self.site, base, self.maps, engine.width, n_replaced, raw=False)
            always = [replace(group, always_run=True) for group in groups]
            engine.score(recorded, [itself, *always], look=partial(watch, 1))
        return {"log_p": found}


def _places(chunk: Chunk, some: Rows) -> tuple[Tensor, Tensor]:
    """Which prompt and which token of its answer each row is about."""
    return chunk.index[some.owner // chunk.steps], some.owner % chunk.steps


def _log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [r, w] of tokens [r, w] under logits [r, vocabulary], float64 on the CPU."""
    total = torch.cat([part.double().logsumexp(-1) for part in torch.split(logits, _AT_ONCE)])
    return (logits.gather(1, tokens.to(logits.device)).double() - total.unsqueeze(1)).cpu()
