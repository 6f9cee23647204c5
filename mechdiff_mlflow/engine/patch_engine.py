"""The front door: capture activations and score patches of one model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine.gradients import score_gradients
from mechdiff_mlflow.engine.kernels.fusion import Fusion
from mechdiff_mlflow.engine.memory.activations import Activations
from mechdiff_mlflow.engine.memory.budget import Load, MemoryBudget, Shape, bounds_within
from mechdiff_mlflow.engine.memory.clean_runs import Recorded, Shelf
from mechdiff_mlflow.engine.memory.oom_retry import Bounds, Elastic, Source, T, does_not_fit, is_out_of_memory
from mechdiff_mlflow.engine.model.architecture import Decoder, ModuleNames
from mechdiff_mlflow.engine.model.attention_routing import implementation
from mechdiff_mlflow.engine.model.chunks import Chunk, Cuts, check_prompts, in_chunks
from mechdiff_mlflow.engine.model.forward import PromptForward, Recording
from mechdiff_mlflow.engine.model.sums import without_unlike
from mechdiff_mlflow.engine.paths.attention_heads import AttentionHeads
from mechdiff_mlflow.engine.paths.scoreboard import ScoreBoard
from mechdiff_mlflow.engine.paths.startup_check import MODES, choose_path, path_named
from mechdiff_mlflow.engine.paths.sweep import SweepPath
from mechdiff_mlflow.engine.paths.variants import Path, ScoreResult, VariantGroup
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.metrics import NextToken, compare_rows, next_token_divergences, rounding_kl
from mechdiff_mlflow.spec.prompts import TokenizedPrompts
from mechdiff_mlflow.spec.sites import Site

_R = TypeVar("_R")


class PatchEngine:
    """Captures activations of one causal language model and scores replacements of them.

    The engine pads on the left by itself and takes prompts in chunks of similar length, so no result depends
    on padding or chunk size beyond the rounding of the model's dtype. When memory runs out it says so, takes
    smaller chunks and goes on. The model is as before after every call, also after one that fails.

    Args:
        model: A transformers causal LM (or a PEFT wrapper of one) in eval mode.
        overrides: Module names, for a model that is not recognised.
        batch_size: Prompts in one forward.
        max_rows: Patched tokens that go up the layers together.
        head_rows: Rows of logits in memory together.
        mode: Way of computing patched runs, of `MODES`; "auto" takes the first that agrees with "naive".
        budget: Bytes beside the weights, from which smaller bounds follow call by call, and beyond which
            captured activations go to disk and clean runs are not kept.
        fused: Compute norms, rotations and gated MLPs with the engine's kernels, where they give the same.
        shelf: Where clean runs are kept; engines that share one give way to each other when memory runs out.

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
        budget: MemoryBudget | None = None,
        fused: bool = True,
        shelf: Shelf | None = None,
    ) -> None:
        bounds = Bounds(batch_size, max_rows, head_rows)
        if mode not in MODES:
            raise MechdiffError(f"Mode {mode!r} is unknown; use one of {', '.join(MODES)}.")
        if model.training:
            raise MechdiffError(
                "The model is in training mode, where dropout is random; call model.eval() first."
            )
        self.forward = PromptForward(Decoder.of(model, overrides))
        if overrides is None or overrides == ModuleNames(layers=overrides.layers):
            self.forward.decoder = self._tried(lambda: without_unlike(self.forward))
        self._fusion = Fusion.of(self.forward.decoder) if fused else Fusion()
        self._shelf = shelf or Shelf(budget)
        self._elastic = Elastic(bounds, self._shelf.give_up)
        # By weak references, in both directions: what was recorded must not keep a model in memory.
        self._recorded: weakref.WeakSet[Recorded] = weakref.WeakSet()
        self._mode = mode
        self._paths = {False: (self._chosen(bounds, spans=False), bounds)}
        self._budget = budget
        if not isinstance(self._paths[False][0], SweepPath):
            self._fusion = Fusion()  # what is captured is what a clean run of the path has
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
        return self._paths[False][0].name

    @property
    def bounds(self) -> Bounds:
        """What is held at a time; smaller than asked for once memory has run out."""
        return self._elastic.bounds

    @property
    def n_forwards(self) -> int:
        """Prompts run through the whole model so far, however batched; checks and `clean_noise` apart."""
        return self.forward.n_prompts

    def capture(
        self, prompts: TokenizedPrompts, sites: Sequence[Site], *, device: torch.device | str = "cpu"
    ) -> Mapping[Site, Tensor]:
        """The model's own activations at `prompts.positions`.

        Args:
            prompts: N prompts.
            sites: Where to read.
            device: Where to keep what was read.

        Returns:
            For each site [N, width] in the model's dtype, in the order of the prompts. Over the budget each
            look-up reads a file.

        Raises:
            MechdiffError: A site, token or position does not exist, an activation is not finite, or a prompt
                does not fit in memory.
        """
        self._check(prompts, sites)
        captured = Activations(len(prompts), sites, device, self._budget)

        def record(chunk: Chunk, bounds: Bounds) -> None:
            # As the path does that scores such a chunk: both must give the same to the bit.
            fusion = self._fusion if chunk.span == 1 else Fusion()
            with fusion.applied():
                recording = self.forward.record(chunk, sites)
            recording.check_finite()
            captured.add(recording)

        self._each_chunk(prompts, Cuts(prompts, self.forward.device), record, n_sites=len(sites))
        return captured

    def record(
        self,
        prompts: TokenizedPrompts,
        sites: Sequence[Site],
        *,
        device: torch.device | str = "cpu",
        now: bool = True,
    ) -> Recorded:
        """Run every prompt once clean, and keep what patches of it need, as far as memory allows.

        Args:
            prompts: N prompts.
            sites: Where activations are read, and may be patched.
            device: Where to keep what was read; the rest stays on the model's device.
            now: Otherwise the first `score` of what is returned runs the prompts, or `complete` does.

        Raises:
            MechdiffError: As `capture`.
        """
        self._check(prompts, sites)
        recorded = self._blank(prompts, sites, device, self._shelf)
        self._recorded.add(recorded)
        if now:
            self.complete(recorded)
        return recorded

    def owns(self, recorded: Recorded) -> bool:
        """Whether this engine made a recording, and so can score it."""
        return recorded in self._recorded

    def give_up(self) -> int:
        """Keep none of its clean runs any more; says of how many prompts some were kept."""
        return sum(recorded.give_up() for recorded in list(self._recorded))

    def complete(self, recorded: Recorded) -> None:
        """Run the prompts that were not run yet.

        Raises:
            MechdiffError: An activation is not finite, or a prompt does not fit in memory.
        """
        if recorded.is_complete:
            return
        prompts, sites = recorded.prompts, recorded.sites

        def record(piece: Chunk | Recording, bounds: Bounds) -> None:
            if isinstance(piece, Recording):
                return
            if recorded.is_full:
                fusion = self._fusion if piece.span == 1 else Fusion()
                with fusion.applied():
                    recording = self.forward.record(piece, sites)
            else:
                recording = self._path(bounds, spans=piece.span > 1).record(piece, sites)
            recording.check_finite()
            recorded.add(recording)
            recorded.keep(recording)

        self._each_chunk(prompts, recorded, record, n_sites=len(sites), is_taped=True)

    def clean_noise(self, prompts: TokenizedPrompts) -> Tensor:
        """How far apart two clean runs of the same prompts are, in nats: [N, 2], float64 on the CPU.

        First KL(batched ‖ alone), then what rounding alone would leave, see `rounding_kl`. Costs two forwards
        a prompt, which `n_forwards` leaves out.

        Raises:
            MechdiffError: A token or position does not exist, or a logit is not finite.
        """
        self._check(prompts, [])
        counted, bounds = self.forward.n_prompts, self._affordable(prompts, 1, 0) or self.bounds
        runs = []
        with self._fusion.applied():
            for size in (bounds.batch_size, 1):
                logits: dict[int, Tensor] = {}
                for chunk in in_chunks(prompts, size, self.forward.device):
                    rows = self.forward.record(chunk, []).logits
                    logits.update(zip(chunk.index.tolist(), rows, strict=True))
                runs.append(torch.stack([logits[i] for i in range(len(prompts))]))
        self.forward.n_prompts = counted
        apart = next_token_divergences(*runs).kl_patched_clean
        return torch.stack([apart, rounding_kl(runs[1])], 1)

    def score_gradients(
        self, prompts: TokenizedPrompts, sites: Sequence[Site], *, seed: int = 0
    ) -> dict[Site, Tensor]:
        """For each site ∂ log p(t)/∂h of one sampled next token t a prompt, [N, width], float64 on the CPU.

        One forward and one backward pass through the blocks above the lowest site.

        Raises:
            MechdiffError: A site, token or position does not exist, or a gradient is not finite.
        """
        self._check(prompts, sites)
        # One number a prompt, drawn here: tokens then depend on no chunk.
        drawn = torch.rand(len(prompts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows = {site: torch.zeros(len(prompts), self.width, dtype=torch.float64) for site in sites}

        def differentiate(chunk: Chunk, bounds: Bounds) -> None:
            found = score_gradients(self.forward, chunk, sites, drawn[chunk.index])
            for site, gradient in found.items():
                if not bool(torch.isfinite(gradient).all()):
                    raise MechdiffError(
                        f"A gradient at {site} is NaN or infinite; load the model in a wider dtype."
                    )
                rows[site][chunk.index] = gradient

        self._each_chunk(prompts, Cuts(prompts, self.forward.device), differentiate, n_sites=len(sites))
        return rows

    def heads(self, layer: int) -> AttentionHeads:
        """The attention heads of a layer.

        Raises:
            MechdiffError: The layer does not exist, or its heads cannot be told apart.
        """
        return AttentionHeads(self.forward, layer, self._elastic)

    def score(
        self,
        prompts: TokenizedPrompts | Recorded,
        groups: Sequence[VariantGroup],
        progress: Callable[[int], None] | None = None,
    ) -> ScoreResult:
        """Run every prompt once clean and once for every variant, and compare next-token distributions.

        However many groups there are, each prompt is run through the whole model once; where a clean run of
        it was kept, not at all.

        Args:
            prompts: N prompts, or what was recorded of them.
            groups: The variants; the same site may occur in several groups.
            progress: Called after each chunk with the number of prompts done so far.

        Raises:
            MechdiffError: A site, token or position does not exist, replacements have the wrong shape, an
                activation or logit is not finite, or the recording is another engine's or lacks a site.
        """
        sites = list(dict.fromkeys(group.site for group in groups))
        recorded = self._to_score(prompts, sites)
        n_prompts = len(recorded)
        board = ScoreBoard(groups, n_prompts, self.width)
        tops = torch.zeros(n_prompts, dtype=torch.long)

        def run(piece: Chunk | Recording, bounds: Bounds) -> None:
            chunk = piece.chunk if isinstance(piece, Recording) else piece
            path = self._path(bounds, spans=chunk.span > 1)
            recording = (
                piece if isinstance(piece, Recording) else path.record(chunk, recorded.to_record(sites))
            )
            next_token = NextToken.of(recording.logits)
            variants, same = board.variants(recording)  # and all that was recorded is finite
            recorded.add(recording)
            scored = [
                (rows.owner, rows.column, compare_rows(rows.logits, next_token, rows.owner))
                for rows in path.run(recording, variants)
            ]
            board.add(recording, same, scored)
            tops[chunk.index] = next_token.top.cpu()
            if piece is chunk:
                recorded.keep(recording)

        self._each_chunk(
            *(recorded.prompts, recorded, run),
            n_sites=len(sites),
            n_columns=board.n_columns,
            is_taped=True,
            progress=progress,
        )
        return board.result(recorded.clean(sites), tops)

    def _to_score(self, prompts: TokenizedPrompts | Recorded, sites: Sequence[Site]) -> Recorded:
        if not isinstance(prompts, Recorded):
            self._check(prompts, sites)
            return self._blank(prompts, sites, "cpu", None)
        if not self.owns(prompts):
            raise MechdiffError("The prompts were recorded by another engine; record them with this one.")
        for site in sites:
            self.forward.decoder.check(site)
            if not prompts.has([site]):
                raise MechdiffError(f"{site} was not recorded; name it among the sites to record.")
        return prompts

    def _blank(
        self,
        prompts: TokenizedPrompts,
        sites: Sequence[Site],
        device: torch.device | str,
        shelf: Shelf | None,
    ) -> Recorded:
        rows = Activations(len(prompts), sites, device, self._budget)
        return Recorded(prompts, list(rows), rows, self.forward.device, shelf)

    def _each_chunk(
        self,
        prompts: TokenizedPrompts,
        source: Source[T],
        work: Callable[[T, Bounds], None],
        *,
        n_sites: int,
        n_columns: int = 0,
        is_taped: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Call `work` on every chunk; on the same prompts again, in smaller chunks, when memory runs out."""
        done, at_most = 0, self._affordable(prompts, n_sites, max(n_columns, int(is_taped)))
        for n in self._elastic.run(source, work, patched=n_columns > 0, at_most=at_most):
            done += n
            if progress is not None:
                progress(done)

    def _affordable(self, prompts: TokenizedPrompts, n_sites: int, n_columns: int) -> Bounds | None:
        """The bounds that the budget allows for a call."""
        if self._budget is None:
            return None
        decoder = self.forward.decoder
        shape = Shape.of(decoder, self.forward.vocabulary, keeps_scores=implementation(decoder) == "eager")
        load = Load(
            n_tokens=max(map(len, prompts.ids)),
            suffix=max(len(ids) - i for ids, i in zip(prompts.ids, prompts.positions, strict=True)),
            n_sites=n_sites,
            n_columns=n_columns,
            tree=self.mode in ("concat", "masked") or bool(prompts.spans),
        )
        return bounds_within(self._budget.working, self.bounds, shape, load)

    def _path(self, bounds: Bounds, *, spans: bool) -> Path:
        """How patched runs are computed within some bounds."""
        if spans not in self._paths:
            counted = self.forward.n_prompts
            self._paths[spans] = self._chosen(bounds, spans=spans), bounds
            self.forward.n_prompts = counted
        path, made_for = self._paths[spans]
        if made_for != bounds:
            path = path_named(path.name, self.forward, bounds, self._fusion)
            self._paths[spans] = path, bounds
        return path

    def _chosen(self, bounds: Bounds, *, spans: bool) -> Path:
        choose = partial(choose_path, fusion=self._fusion, spans=spans)
        return self._tried(lambda: choose(self.forward, self._mode, bounds))

    def _tried(self, work: Callable[[], _R]) -> _R:
        try:
            return work()
        except MechdiffError:
            raise
        except Exception as error:  # models of strangers fail in every way
            if is_out_of_memory(error):
                raise does_not_fit("The short prompts of the start-up check do", str(error)) from error
            raise MechdiffError(
                f"{type(self.forward.decoder.model).__name__} cannot be run on short prompts with hooks on "
                f"its blocks ({type(error).__name__}: {str(error)[:200]}); take a model of a family that "
                "docs/supported-models.md lists, or set modules.layers in the pair's spec to other blocks."
            ) from error

    def _check(self, prompts: TokenizedPrompts, sites: Sequence[Site]) -> None:
        for site in sites:
            self.forward.decoder.check(site)
        check_prompts(prompts, self.forward.vocabulary)
