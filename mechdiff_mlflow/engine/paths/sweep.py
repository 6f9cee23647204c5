"""Every variant of every prompt in one pass up the blocks.

A variant is a row at the patched position that enters at its site, and sees the prompt's recorded keys and
values and itself. Where the position is not the last, the row is followed by its own copy of the tokens after
it, up to S in all, clean up to the block where it enters; where each of the first R is replaced, R enter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine.kernels.attention import split_attention
from mechdiff_mlflow.engine.kernels.fusion import Fusion
from mechdiff_mlflow.engine.memory.oom_retry import ChunkLimits
from mechdiff_mlflow.engine.model import attention_routing as routing
from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.engine.model.attention_routing import UnsupportedError
from mechdiff_mlflow.engine.model.chunks import Chunk
from mechdiff_mlflow.engine.model.forward import PromptForward, Recording, head
from mechdiff_mlflow.engine.model.hooks import first_output, with_first_output
from mechdiff_mlflow.engine.paths.sweep_recording import SweepRecorder, SweepRecording, map_tensors
from mechdiff_mlflow.engine.paths.variants import Rows, Variants, in_parts
from mechdiff_mlflow.spec.sites import Hook, Site

_UNDERSTOOD = frozenset({"s_aux", "position_ids", "cache_position"})
"""Tensors among the arguments of attention that we know to use or to leave."""


class SweepPath:
    """One recording forward, then one pass up the blocks for all variants together."""

    name = "sweep"

    def __init__(self, forward: PromptForward, fusion: Fusion) -> None:
        self._forward, self._decoder, self._fusion = forward, forward.decoder, fusion
        self._kind = routing.implementation(self._decoder)
        self._own = [routing.own_attention(block.attention, self._kind) for block in self._decoder.blocks]

    def record(self, chunk: Chunk, sites: Sequence[Site]) -> SweepRecording:
        """The clean run of a chunk, with what its variants will need."""
        # Rows that enter after the MLP have the clean attention output behind them.
        needed = {*sites, *(Site(site.layer, Hook.ATTN_OUT) for site in sites if site.hook is Hook.MLP_OUT)}
        first = min((site.layer for site in sites), default=len(self._own))
        recorder = SweepRecorder(chunk, self._own, first)
        with (
            self._fusion.applied(),
            routing.routed(self._decoder, recorder.attends()),
            recorder.listening(self._decoder.blocks),
        ):
            return recorder.recording(self._forward.record(chunk, sorted(needed)))

    def run(self, recording: Recording, variants: Sequence[Variants], limits: ChunkLimits) -> Iterator[Rows]:
        """Logits of every prompt under every variant, `head_rows` at a time."""
        assert isinstance(recording, SweepRecording)
        chunk = recording.chunk
        for prompts, part in in_parts(len(chunk), variants, limits.max_rows // chunk.suffix):
            ascent = _Ascent(self._decoder, recording, prompts, eager=self._kind == "eager")
            with self._fusion.applied():
                hidden = ascent.run(part)  # [V, b, steps, width]
            n_variants, n_prompts, steps, width = hidden.shape
            rows = hidden.movedim(0, 2).reshape(-1, width)
            owner = torch.arange(prompts.start * steps, prompts.stop * steps).repeat_interleave(n_variants)
            column = torch.tensor(ascent.columns).repeat(n_prompts * steps)
            with self._fusion.applied(), head(self._forward, recording.output_length) as logits:
                for start in range(0, len(rows), limits.head_rows):
                    some = slice(start, start + limits.head_rows)
                    yield Rows(owner[some], column[some], logits(rows[some]))


class _Ascent:
    """Rows of some prompts, b of them, on their way up.

    The blocks see all rows as one prompt of many tokens, variant by variant: what enters last then lies last,
    and is joined and left out without a copy of the rest. Attention alone has to know whose rows they are.
    """

    def __init__(self, decoder: Decoder, recording: SweepRecording, prompts: slice, *, eager: bool) -> None:
        self._decoder, self._recording, self._prompts, self._eager = decoder, recording, prompts, eager
        self._n_prompts = prompts.stop - prompts.start
        self._rows: list[Tensor] = []  # [v, b, S, width] each, one above the other
        self._suffix, self._steps = recording.chunk.suffix, recording.chunk.steps
        self._replaced = recording.chunk.span  # R; the sweep moves no means
        self.columns: list[int] = []

    @torch.no_grad()
    def run(self, variants: Sequence[Variants]) -> Tensor:
        """Hidden states [V, b, steps, width] of the last tokens behind the last block, V as in `columns`."""
        by_site: dict[Site, list[Variants]] = {}
        for group in variants:
            by_site.setdefault(group.site, []).append(group)
        n_blocks = len(self._decoder.blocks)
        with routing.routed(self._decoder, [partial(self._attend, i) for i in range(n_blocks)]):
            for i in range(min(site.layer for site in by_site), n_blocks):
                at = {hook: by_site.get(Site(i, hook), []) for hook in Hook}
                self._join(at[Hook.RESID_PRE], self._recording.entering[i])
                self._block(i, at[Hook.ATTN_OUT], at[Hook.MLP_OUT])
                self._join(at[Hook.RESID_POST], self._recording.leaving[i])
        return torch.cat([rows[:, :, -self._steps :].to(self._rows[-1].device) for rows in self._rows])

    def _join(self, groups: Sequence[Variants], residual: Tensor) -> None:
        for group in groups:
            self._add(self._values(group), group.columns, residual)

    def _values(self, group: Variants) -> Tensor:
        """Replacements [v, b, R, width]."""
        return self._by_token(group.values[self._prompts].transpose(0, 1))

    def _by_token(self, x: Tensor) -> Tensor:
        """From activations as they are recorded, [..., R * width], to those of each token."""
        return x.reshape(*x.shape[:-1], self._replaced, -1)

    def _add(self, rows: Tensor, columns: Sequence[int], residual: Tensor) -> None:
        """Rows [v, b, R, width] join the others, each before its own copy of the suffix after it."""
        if self._suffix > self._replaced:
            after = residual[None, self._prompts, self._replaced :].expand(len(rows), -1, -1, -1)
            rows = torch.cat([rows, after], 2)
        self._rows.append(rows)
        self.columns.extend(columns)

    def _block(self, i: int, attn: Sequence[Variants], mlp: Sequence[Variants]) -> None:
        """Take the rows through block i; those that replace a sublayer's output enter amid it."""
        start = self._recording.entering[i][self._prompts, : self._replaced]  # [b, R, width]
        entering = [column for group in (*attn, *mlp) for column in group.columns]
        n_variants = sum(len(rows) for rows in self._rows)
        if n_variants + len(entering) == 0:
            return
        tokens = [rows.to(start.device).flatten(0, 2) for rows in self._rows]
        if entering:
            tokens.append(start.expand(len(entering), -1, -1, -1).flatten(0, 2))
        arguments = map_tensors(
            self._recording.arguments[i], partial(self._a_row_each, n_variants, len(entering))
        )
        n_live = n_variants * self._n_prompts * self._suffix
        with self._entering_rows(i, n_live, attn, mlp):
            out = first_output(self._decoder.blocks[i].module(torch.cat(tokens).unsqueeze(0), **arguments))[0]
        width = out.shape[-1]
        self._rows = [out[:n_live].view(n_variants, -1, self._suffix, width)] if n_variants else []
        if entering:
            entered = out[n_live:].view(len(entering), -1, self._replaced, width)
            self._add(entered, entering, self._recording.leaving[i])

    def _a_row_each(self, n_variants: int, n_entering: int, x: Tensor) -> Tensor:
        """From one value a suffix token [n or 1, S, ...] to one a row [1, rows, ...]."""
        x = x[self._prompts] if x.shape[0] > 1 else x
        rest = (-1,) * (x.dim() - 2)
        live, entering = (
            y.expand(n, self._n_prompts, -1, *rest).flatten(0, 2)
            for y, n in ((x, n_variants), (x[:, : self._replaced], n_entering))
        )
        return torch.cat([live, entering]).unsqueeze(0)

    def _attend(
        self, i: int, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        unknown = {name for name, v in kwargs.items() if isinstance(v, Tensor)} - _UNDERSTOOD
        if unknown:
            raise UnsupportedError(
                f"{type(module).__name__} has {', '.join(sorted(unknown))} in its attention."
            )
        prefix = self._recording.prefixes[i].of(self._prompts)
        suffix = self._suffix
        if not self._rows and suffix > self._replaced:  # nothing but entering rows
            prefix, suffix = prefix.first(self._replaced), self._replaced
        query, key, value = (self._by_prompt(x, suffix) for x in (query, key, value))
        scale = kwargs.get("scaling")
        out = split_attention(
            query,
            key,
            value,
            prefix,
            suffix=suffix,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            # Fused attention has neither.
            softcap=kwargs.get("softcap") if self._eager else None,
            sinks=kwargs.get("s_aux") if self._eager else None,
        )
        # [b, V * S, heads, width] to [1, rows, heads, width]
        out = out.reshape(self._n_prompts, -1, suffix, *out.shape[2:])
        return out.transpose(0, 1).flatten(0, 2).unsqueeze(0), None

    def _by_prompt(self, x: Tensor, suffix: int) -> Tensor:
        """From [1, heads, rows, width] to [b, heads, V * S, width]; without a copy where S is 1."""
        x = x[0].reshape(x.shape[1], -1, self._n_prompts, suffix, x.shape[3])
        return x.permute(2, 0, 1, 3, 4).flatten(2, 3)

    @contextmanager
    def _entering_rows(
        self, i: int, n_live: int, attn: Sequence[Variants], mlp: Sequence[Variants]
    ) -> Iterator[None]:
        """Replace the sublayers' outputs for the rows after `n_live`, and compute no more than is used."""
        block = self._decoder.blocks[i]
        into_attn, into_mlp = ([self._values(group) for group in groups] for groups in (attn, mlp))
        if mlp:
            clean = self._by_token(self._recording.clean[Site(i, Hook.ATTN_OUT)][self._prompts])
            into_attn.append(clean.expand(sum(len(x) for x in into_mlp), -1, -1, -1))
        n_rows = n_live + self._n_prompts * self._replaced * sum(len(x) for x in into_attn)
        with ExitStack() as stack:
            if into_attn:
                assert block.attn_out is not None
                # Entering rows of fewer tokens than the others: our attention could not tell them apart.
                must_cut = self._suffix > self._replaced
                last = _LastRows(torch.cat(into_attn).flatten(0, 2), n_rows, must_cut=must_cut)
                stack.enter_context(last.replaced(block.attention, block.attn_out))
            if into_mlp:
                assert block.mlp_out is not None
                last = _LastRows(torch.cat(into_mlp).flatten(0, 2), n_rows, must_cut=False)
                stack.enter_context(last.replaced(block.mlp, block.mlp_out))
            yield


class _LastRows:
    """Replacements [e, width] of what a sublayer gives for the last of the rows that a block is called with.

    With `must_cut` the sublayer must not see these rows.
    """

    def __init__(self, values: Tensor, n_rows: int, *, must_cut: bool) -> None:
        self._values, self._n_rows = values, n_rows
        self._n_kept = n_rows - len(values)
        # To copy what comes of many rows costs more than to compute a few in vain; with none it might fail.
        self._cut = self._n_kept > 0 and (must_cut or 32 * len(values) > self._n_kept)

    @contextmanager
    def replaced(self, sublayer: nn.Module | None, source: nn.Module) -> Iterator[None]:
        """Have `source` give the replacements: the sublayer, a norm after it, or a part of it.

        A sublayer of which the source is a part sees all rows.
        """
        with ExitStack() as stack:
            whole = source is sublayer or (sublayer is not None and source not in set(sublayer.modules()))
            if self._cut and sublayer is not None and whole:
                stack.callback(sublayer.register_forward_pre_hook(self._cut_rows, with_kwargs=True).remove)
                if source is not sublayer:
                    stack.callback(sublayer.register_forward_hook(self._pad_rows).remove)
            stack.callback(source.register_forward_hook(self._replace_rows).remove)
            yield

    def _cut_rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def cut(x: Tensor) -> Tensor:
            return x[0, : self._n_kept].unsqueeze(0) if x.shape[:2] == (1, self._n_rows) else x

        return map_tensors(args, cut), map_tensors(kwargs, cut)

    def _pad_rows(self, module: nn.Module, args: Any, out: Any) -> Any:
        hidden = first_output(out)
        if hidden.dim() == 3 and hidden.shape[1] == self._n_kept:
            hidden = torch.cat([hidden, hidden.new_zeros(1, *self._values.shape)], 1)
        return with_first_output(out, hidden)

    def _replace_rows(self, module: nn.Module, args: Any, out: Any) -> Any:
        hidden = first_output(out)
        values = self._values.to(hidden.device)
        rows = hidden.view(-1, hidden.shape[-1])  # OPT flattens prompts and rows before its MLP
        if len(rows) == self._n_kept:
            new = torch.cat([rows, values])
            return with_first_output(out, new.view(*hidden.shape[:-2], *new.shape))
        rows[self._n_kept :] = values
        return out
