"""The front door: capture activations and score patches of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine.architecture import Decoder, ModuleNames
from mechdiff_mlflow.engine.chunks import check_prompts, in_chunks
from mechdiff_mlflow.engine.forward import PromptForward, Recording
from mechdiff_mlflow.engine.fusion import Fusion
from mechdiff_mlflow.engine.gradients import score_gradients
from mechdiff_mlflow.engine.heads import AttentionHeads
from mechdiff_mlflow.engine.scoreboard import ScoreBoard
from mechdiff_mlflow.engine.startup import MODES, choose_path
from mechdiff_mlflow.engine.variants import ScoreResult, VariantGroup
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.metrics import NextToken, compare_rows
from mechdiff_mlflow.prompts import TokenizedPrompts
from mechdiff_mlflow.sites import Site


class PatchEngine:
    """Captures activations of one causal language model and scores replacements of them.

    The engine pads on the left by itself and takes prompts in chunks of similar length, so no result depends
    on padding or chunk size beyond the rounding of the model's dtype. The model is as before after every
    call, also after one that fails.

    Args:
        model: A transformers causal LM (or a PEFT wrapper of one) in eval mode.
        overrides: Module names, for a model that is not recognised.
        batch_size: Prompts in one forward.
        max_rows: Patched tokens that go up the layers together.
        head_rows: Rows of logits in memory together.
        mode: Way of computing patched runs, of `MODES`; "auto" takes the first that agrees with "naive".
        fused: Compute norms, rotations, gated MLPs and attention with kernels, where there are kernels.

    Raises:
        MechdiffError: The model's modules are not recognised, replacing their outputs does not change the
            logits, the model is in training mode, or an argument is bad.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        overrides: ModuleNames | None = None,
        batch_size: int = 16,
        max_rows: int = 8192,
        head_rows: int = 2048,
        mode: str = "auto",
        fused: bool = True,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_rows", max_rows), ("head_rows", head_rows)):
            if value < 1:
                raise MechdiffError(f"{name} is {value}; give at least 1.")
        if mode not in MODES:
            raise MechdiffError(f"Mode {mode!r} is unknown; use one of {', '.join(MODES)}.")
        if model.training:
            raise MechdiffError(
                "The model is in training mode, where dropout is random; call model.eval() first."
            )
        self.forward = PromptForward(Decoder.of(model, overrides))
        self._batch_size = batch_size
        self._fusion = Fusion.of(self.forward.decoder) if fused else Fusion()
        self._path = choose_path(
            self.forward, mode, max_rows=max_rows, head_rows=head_rows, fusion=self._fusion
        )
        self.forward.n_prompts = 0

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.forward.decoder.blocks)

    @property
    def width(self) -> int:
        """Dimensions of the residual stream."""
        return self.forward.decoder.width

    @property
    def mode(self) -> str:
        """How patched runs are computed: "sweep", "concat", "masked" or "naive"."""
        return self._path.name

    @property
    def n_forwards(self) -> int:
        """Prompts run through the whole model so far, however they were batched; start-up checks apart."""
        return self.forward.n_prompts

    def capture(
        self, prompts: TokenizedPrompts, sites: Sequence[Site], *, device: torch.device | str = "cpu"
    ) -> dict[Site, Tensor]:
        """The model's own activations at `prompts.positions`.

        Args:
            prompts: N prompts.
            sites: Where to read.
            device: Where to keep what was read.

        Returns:
            For each site [N, width] in the model's dtype, in the order of the prompts.

        Raises:
            MechdiffError: A site, token or position does not exist, or an activation is not finite.
        """
        self._check(prompts, sites)
        captured = _Captured(len(prompts), sites, torch.device(device))
        for chunk in in_chunks(prompts, self._batch_size, self.forward.device):
            with self._fusion.applied():
                recording = self.forward.record(chunk, sites)
            recording.check_finite()
            captured.add(recording)
        return captured.by_site()

    def score_gradients(
        self, prompts: TokenizedPrompts, sites: Sequence[Site], *, seed: int = 0
    ) -> dict[Site, Tensor]:
        """For each site ∂ log p(t)/∂h of one sampled next token t a prompt, [N, width], float64 on the CPU.

        One forward and one backward pass through the blocks above the lowest site.

        Raises:
            MechdiffError: A site, token or position does not exist, or a gradient is not finite.
        """
        self._check(prompts, sites)
        generator = torch.Generator().manual_seed(seed)
        rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
        order = []
        for chunk in in_chunks(prompts, self._batch_size, self.forward.device):
            order.append(chunk.index)
            for site, gradient in score_gradients(self.forward, chunk, sites, generator).items():
                if not bool(torch.isfinite(gradient).all()):
                    raise MechdiffError(
                        f"A gradient at {site} is NaN or infinite; load the model in a wider dtype."
                    )
                rows[site].append(gradient)
        return {site: _in_order(chunks, order) for site, chunks in rows.items()}

    def heads(self, layer: int) -> AttentionHeads:
        """The attention heads of a layer.

        Raises:
            MechdiffError: The layer does not exist, or its heads cannot be told apart.
        """
        return AttentionHeads(self.forward, layer, self._batch_size)

    def score(
        self,
        prompts: TokenizedPrompts,
        groups: Sequence[VariantGroup],
        progress: Callable[[int], None] | None = None,
    ) -> ScoreResult:
        """Run every prompt once clean and once for every variant, and compare next-token distributions.

        However many groups there are, each prompt is run through the whole model once.

        Args:
            prompts: N prompts.
            groups: The variants; the same site may occur in several groups.
            progress: Called after each chunk with the number of prompts done so far.

        Raises:
            MechdiffError: A site, token or position does not exist, replacements have the wrong shape, or an
                activation or logit is not finite.
        """
        sites = list(dict.fromkeys(group.site for group in groups))
        self._check(prompts, sites)
        board = ScoreBoard(groups, len(prompts), self.width)
        captured = _Captured(len(prompts), sites, torch.device("cpu"))
        tops = torch.zeros(len(prompts), dtype=torch.long)
        done = 0
        for chunk in in_chunks(prompts, self._batch_size, self.forward.device):
            recording = self._path.record(chunk, sites)
            captured.add(recording)
            next_token = NextToken.of(recording.logits)
            variants, same = board.variants(recording)
            scored = [
                (rows.owner, rows.column, compare_rows(rows.logits, next_token, rows.owner))
                for rows in self._path.run(recording, variants)
            ]
            board.add(recording, same, scored)
            tops[chunk.index] = next_token.top.cpu()
            done += len(chunk)
            if progress is not None:
                progress(done)
        return board.result(captured.by_site(), tops)

    def _check(self, prompts: TokenizedPrompts, sites: Sequence[Site]) -> None:
        for site in sites:
            self.forward.decoder.check(site)
        check_prompts(prompts, self.forward.vocabulary)


class _Captured:
    """Activations of N prompts, filled chunk by chunk."""

    def __init__(self, n_prompts: int, sites: Sequence[Site], device: torch.device) -> None:
        self._n_prompts, self._sites, self._device = n_prompts, list(dict.fromkeys(sites)), device
        self._rows: Tensor | None = None  # [N, sites, width]

    def add(self, recording: Recording) -> None:
        if not self._sites:
            return
        device = recording.clean[self._sites[0]].device
        # One copy between devices, not one a site.
        rows = torch.stack([recording.clean[site].to(device) for site in self._sites], 1)
        index = recording.chunk.index
        if self._rows is None:
            # A copy into pinned memory goes on while the GPU computes.
            pinned = rows.is_cuda and self._device.type == "cpu"
            shape = (self._n_prompts, *rows.shape[1:])
            self._rows = torch.empty(shape, dtype=rows.dtype, device=self._device, pin_memory=pinned)
        if self._rows.is_pinned():
            for i, row in zip(index.tolist(), rows, strict=True):
                self._rows[i].copy_(row, non_blocking=True)
        else:
            self._rows[index.to(self._device)] = rows.to(self._device)

    def by_site(self) -> dict[Site, Tensor]:
        """[N, width] each."""
        if self._rows is None:
            return {}
        if self._rows.is_pinned():
            torch.cuda.synchronize()
        return dict(zip(self._sites, self._rows.unbind(1), strict=True))


def _in_order(chunks: list[Tensor], order: list[Tensor]) -> Tensor:
    """Rows that came chunk by chunk, in the order of the prompts."""
    return torch.cat(chunks)[torch.argsort(torch.cat(order))]
