"""The reference, and what is tried on a model before it is trusted: a few short prompts, padded and not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from mechdiff_mlflow.engine.kernels.fusion import Fusion
from mechdiff_mlflow.engine.memory.oom_retry import ChunkLimits, is_out_of_memory
from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.engine.model.attention_routing import UnsupportedError
from mechdiff_mlflow.engine.model.chunks import Chunk, in_chunks
from mechdiff_mlflow.engine.model.forward import PromptForward, Recording
from mechdiff_mlflow.engine.model.hooks import activation_hook
from mechdiff_mlflow.engine.paths.masked import MaskedPath
from mechdiff_mlflow.engine.paths.sweep import SweepPath
from mechdiff_mlflow.engine.paths.variants import Rows, Variants, moved
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts


class NaivePath:
    """The reference: a full forward of every prompt for every variant, with one hook.

    Slow, obvious, and right for any model whose sites can be hooked.
    """

    name = "naive"

    def __init__(self, forward: PromptForward) -> None:
        self._forward = forward

    def record(self, chunk: Chunk, sites: Sequence[Site]) -> Recording:
        """The clean run of a chunk."""
        return self._forward.record(chunk, sites)

    def run(self, recording: Recording, variants: Sequence[Variants], limits: ChunkLimits) -> Iterator[Rows]:
        """Logits of every prompt under every variant, one variant at a time."""
        chunk = recording.chunk
        owner = torch.arange(len(recording.logits))
        for group in variants:
            clean = recording.clean[group.site]
            for i, column in enumerate(group.columns):
                edit = partial(_replace, chunk, group.values[:, i], clean)
                with activation_hook(self._forward.decoder, group.site, edit, len(chunk)):
                    yield Rows(owner, torch.full_like(owner, column), self._forward(chunk))


def _replace(chunk: Chunk, value: Tensor, clean: Tensor, hidden: Tensor) -> Tensor:
    hidden = hidden.clone()
    span = chunk.spanned(hidden)
    span.copy_(moved(span, value, clean))
    return hidden


ComputePath: TypeAlias = SweepPath | MaskedPath | NaivePath
"""A way of computing patched runs."""

MODES = ("auto", "sweep", "masked", "naive")

ONE, EACH, MEAN = "one", "each", "mean"
"""What of a span of tokens is replaced."""

_WITH_SPANS = ("masked", "naive")
_CROWD = 20

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
"""How far logits may be from the reference, relative to the patch's effect on them.

A wrong path is off by about 1. An exact one was off by 0.1 in bfloat16, on an 8B-shaped model with random
weights.
"""


@dataclass(frozen=True, slots=True)
class Trial:
    """A few variants, and their logits by the reference [n * steps, columns, vocabulary]."""

    recording: Recording
    variants: Sequence[Variants]
    logits: Tensor

    @classmethod
    def of(cls, forward: PromptForward, chunk: Chunk, sites: Sequence[Site]) -> Trial:
        """One disturbed variant at each site; refuses sites that are not reached or change no logits."""
        naive = NaivePath(forward)
        recording = naive.record(chunk, sites)
        for site in sites:
            if site not in recording.clean:
                raise MechdiffError(
                    f"The activation at {site} was not reached by a forward of {_name(forward.decoder)}; "
                    f"set {_override(site)} in the pair's spec."
                )
        recording.check_finite()
        variants = [_disturbed(recording, site, column) for column, site in enumerate(sites)]
        rows = [row.logits for row in naive.run(recording, variants, ChunkLimits())]
        for site, logits in zip(sites, rows, strict=True):
            if torch.equal(logits, recording.logits):
                raise MechdiffError(
                    f"Replacing the activation at {site} leaves the logits of {_name(forward.decoder)} as "
                    f"they were, so it is not what the model computes with; set {_override(site)} in the "
                    "pair's spec."
                )
        return cls(recording, variants, torch.stack(rows, 1))  # [n * steps, variants, vocabulary]

    def check(self, path: ComputePath, limits: ChunkLimits) -> None:
        """Refuse a path whose logits are off by too much of what the patch does to them."""
        recording = path.record(self.recording.chunk, [group.site for group in self.variants])
        # Rows that enter among many may be treated differently from rows that enter among few.
        first, n = self.variants[0], len(self.variants)
        crowd = Variants(first.site, first.values.repeat(1, _CROWD, 1), range(n, n + _CROWD))
        among_many = torch.cat([self.logits, self.logits[:, :1].expand(-1, _CROWD, -1)], 1)
        for variants, expected in ((self.variants, self.logits), ([*self.variants, crowd], among_many)):
            found = torch.full_like(expected, torch.nan)
            for rows in path.run(recording, variants, limits):
                found[rows.owner, rows.column] = rows.logits
            error = (found.double() - expected.double()).norm(dim=-1)
            effect = (expected.double() - self.recording.logits.double().unsqueeze(1)).norm(dim=-1)
            off = float((error / effect).max())
            if not off <= _TOLERANCE.get(expected.dtype, 0.3):
                raise UnsupportedError(f"Its logits are off by {off:.1e} of the effect of a patch.")


def choose_path(
    forward: PromptForward, mode: str, limits: ChunkLimits, fusion: Fusion, *, span: str = ONE
) -> ComputePath:
    """The fastest way of computing patched runs, of `MODES`, that agrees with the reference on this model.

    `span` says for which prompts: where `ONE` token is replaced, `EACH` of several, or their `MEAN`, by which
    the sweep cannot move them.

    Raises:
        MechdiffError: Some hook of the model does not change its logits, or `mode` does not fit the model.
    """
    modes: tuple[str, ...] = MODES[1:] if mode == "auto" else (mode,)
    if span == MEAN:
        modes = tuple(name for name in modes if name in _WITH_SPANS) or _WITH_SPANS
    trials = list(_trials(forward, span))
    reasons: list[str] = []
    for name in modes:
        try:
            path = _path_named(name, forward, fusion)
            for trial in trials:
                trial.check(path, limits)
        except Exception as error:  # whatever a model not foreseen may raise, another way may do
            if is_out_of_memory(error):
                raise
            known = isinstance(error, MechdiffError)
            reasons.append(str(error) if known else f"{type(error).__name__}: {error}")
            continue
        if mode == "auto" and reasons:
            warnings.warn(
                f"Patches of {_name(forward.decoder)} are computed the slower way {name!r}: {reasons[0]}",
                stacklevel=4,
            )
        return path
    remedy = "take a model of another family" if mode == "auto" else "use mode 'auto'"
    raise MechdiffError(
        f"Mode {mode!r} does not fit {_name(forward.decoder)} ({reasons[-1].rstrip('.')}); {remedy}."
    )


def _path_named(name: str, forward: PromptForward, fusion: Fusion) -> ComputePath:
    if name == "naive":
        return NaivePath(forward)
    return MaskedPath(forward) if name == "masked" else SweepPath(forward, fusion)


def _trials(forward: PromptForward, span: str) -> Iterable[Trial]:
    """Every hook half-way up on a padded chunk, and two more on one that is not, before its last token."""
    decoder = forward.decoder
    n = len(decoder.blocks)
    middle = [Site(n // 2, hook) for hook in Hook]
    others = [Site(0, Hook.MLP_OUT), Site(max(0, n - 2), Hook.RESID_PRE)]
    # A block without a recognised MLP still has its other hooks.
    suffix = 1 if span == ONE else 2
    yield Trial.of(forward, _chunk(forward, (5, 9), suffix, span), list(filter(decoder.has, middle)))
    yield Trial.of(forward, _chunk(forward, (7,), 3, span), list(filter(decoder.has, others)))


def _chunk(forward: PromptForward, lengths: Sequence[int], suffix: int, span: str) -> Chunk:
    ids = tuple(tuple((17 * i + 5 * n) % forward.vocabulary for i in range(n)) for n in lengths)
    n_replaced = {ONE: 1, MEAN: 2, EACH: suffix}[span]
    spans = (n_replaced,) * len(lengths)
    steps = spans if span == EACH else ()
    positions = tuple(n - suffix for n in lengths)
    prompts = TokenizedPrompts(ids, positions, spans, steps, each=span == EACH)
    return next(in_chunks(prompts, len(lengths), forward.device))


def _disturbed(recording: Recording, site: Site, column: int) -> Variants:
    """The clean activation plus a random vector of its own length."""
    clean = recording.clean[site]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(column), dtype=torch.float32)
    direction = (noise / noise.norm(dim=-1, keepdim=True)).to(clean.device)
    size = clean.float().norm(dim=-1, keepdim=True).clamp(min=1e-3)
    return Variants(site, (clean.float() + size * direction).to(clean.dtype).unsqueeze(1), [column])


def _override(site: Site) -> str:
    key = {Hook.ATTN_OUT: "attn_out", Hook.MLP_OUT: "mlp_out"}.get(site.hook, "layers")
    return f"modules.{key}"


def _name(decoder: Decoder) -> str:
    return type(decoder.model).__name__
