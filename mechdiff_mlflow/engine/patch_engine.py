"""The front door: capture activations and score patches of one model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine.kernels.fusion import Fusion
from mechdiff_mlflow.engine.memory.budget import Load, ModelShape, limits_within
from mechdiff_mlflow.engine.memory.clean_runs import CleanRunCache, CleanRuns
from mechdiff_mlflow.engine.memory.oom_retry import ChunkLimits, ChunkRunner, does_not_fit, is_out_of_memory
from mechdiff_mlflow.engine.model.architecture import Decoder, ModuleNames
from mechdiff_mlflow.engine.model.attention_routing import implementation
from mechdiff_mlflow.engine.model.chunks import Chunk, ChunkPlan, check_prompts, in_chunks
from mechdiff_mlflow.engine.model.forward import PromptForward, Recording, score_gradients
from mechdiff_mlflow.engine.model.sums import without_unlike
from mechdiff_mlflow.engine.paths.attention_heads import AttentionHeads
from mechdiff_mlflow.engine.paths.startup_check import EACH, MEAN, MODES, ONE, ComputePath, choose_path
from mechdiff_mlflow.engine.paths.variants import Rows, ScoreBoard, ScoreResult, VariantGroup
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures.metrics import NextToken, compare_rows, next_token_divergences, rounding_kl
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

_R = TypeVar("_R")


class PatchEngine:
    """Captures activations of one causal language model and scores replacements of them.

    The engine pads on the left by itself and takes prompts in chunks of similar length, so no result depends
    on padding or chunk size beyond the rounding of the model's dtype. When memory runs out it says so, takes
    smaller chunks and goes on. The model is as before after every call, also after one that fails.

    The model is a transformers causal LM in eval mode, or a PEFT wrapper of one. Patched runs are computed in
    a mode of `MODES`; "auto" takes the first that agrees with "naive". The limits are those of `ChunkLimits`;
    from the budget of `cache` smaller ones follow call by call. `fused` computes norms, rotations and gated
    MLPs by the engine's kernels where they give the same. Engines that share a cache of clean runs give way
    to each other when memory runs out.

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
        cache: CleanRunCache | None = None,
    ) -> None:
        limits = ChunkLimits(batch_size, max_rows, head_rows)
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
        self._cache = cache or CleanRunCache()
        self._runner = ChunkRunner(limits, self._cache.give_up)
        # By weak references, in both directions: what was recorded must not keep a model in memory.
        self._recorded: weakref.WeakSet[CleanRuns] = weakref.WeakSet()
        self._mode = mode
        self._paths = {ONE: self._chosen(ONE)}
        if self.mode != "sweep":
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
        """How patched runs are computed: "sweep", "masked" or "naive"."""
        return self._paths[ONE].name

    @property
    def limits(self) -> ChunkLimits:
        """What is held at a time; smaller than asked for once memory has run out."""
        return self._runner.limits

    @property
    def n_forwards(self) -> int:
        """Prompts run through the whole model so far, however batched; checks and `clean_noise` apart."""
        return self.forward.n_prompts

    def capture(
        self, prompts: TokenizedPrompts, sites: Sequence[Site], *, device: torch.device | str = "cpu"
    ) -> dict[Site, Tensor]:
        """The model's own activations at `prompts.positions`, kept on a device.

        For each site [N, width] in the model's dtype, in the order of the N prompts.

        Raises:
            MechdiffError: A site, token or position does not exist, an activation is not finite, or a prompt
                does not fit in memory.
        """
        return self.run_clean(prompts, sites, device=device).activations

    def run_clean(
        self, prompts: TokenizedPrompts, sites: Sequence[Site], *, device: torch.device | str = "cpu"
    ) -> CleanRuns:
        """As `capture`, with the most probable next tokens."""
        self._check(prompts, sites)
        captured = CleanRuns(prompts, sites, self.forward.device, rows_on=device)
        self.complete(captured)
        return captured

    def record(
        self,
        prompts: TokenizedPrompts,
        sites: Sequence[Site],
        *,
        device: torch.device | str = "cpu",
        now: bool = True,
    ) -> CleanRuns:
        """Run every prompt once clean, and keep what patches at the sites need, as far as memory allows.

        Activations are kept on `device`, the rest on the model's own. Unless `now`, the first `score` of what
        is returned runs the prompts, or `complete` does. Raises as `capture`.
        """
        self._check(prompts, sites)
        recorded = CleanRuns(prompts, sites, self.forward.device, self._cache, device)
        self._recorded.add(recorded)
        if now:
            self.complete(recorded)
        return recorded

    def owns(self, recorded: CleanRuns) -> bool:
        """Whether this engine made a recording, and so can score it."""
        return recorded in self._recorded

    def give_up(self) -> int:
        """Free all clean runs that are kept, of so many prompts."""
        return sum(recorded.give_up() for recorded in list(self._recorded))

    def complete(self, recorded: CleanRuns) -> None:
        """Run the prompts that were not run yet; raises as `capture`."""
        if recorded.is_complete:
            return
        sites = recorded.sites

        def record(chunk: Chunk, limits: ChunkLimits) -> None:
            if recorded.kept(chunk) is not None:
                return
            if recorded.is_full:
                recording = self._forward_alone(chunk, sites)
            else:
                recording = self._path(chunk).record(chunk, sites)
            recording.check_finite()
            recorded.add(recording)
            recorded.keep(recording)

        self._each_chunk(recorded, record, len(sites), n_columns=0 if recorded.is_full else 1)

    def clean_noise(self, prompts: TokenizedPrompts) -> Tensor:
        """How far apart two clean runs of the same prompts are, in nats: [N, 2], float64 on the CPU.

        First KL(batched ‖ alone), then what rounding alone would leave, see `rounding_kl`; with an answer,
        the sums over its tokens. `n_forwards` leaves out the two forwards a prompt that this costs.

        Raises:
            MechdiffError: A token or position does not exist, or a logit is not finite.
        """
        self._check(prompts, [])
        counted, limits = self.forward.n_prompts, self._affordable(prompts, 1, 0) or self.limits
        runs = []
        with self._fusion.applied():
            for size in (limits.batch_size, 1):
                logits: dict[int, Tensor] = {}
                for chunk in in_chunks(prompts, size, self.forward.device):
                    rows = self.forward.record(chunk, []).logits
                    logits.update(zip(chunk.index.tolist(), torch.split(rows, chunk.steps), strict=True))
                runs.append(torch.cat([logits[i] for i in range(len(prompts))]))
        self.forward.n_prompts = counted
        apart = next_token_divergences(*runs).kl_patched_clean
        by_step = torch.stack([apart, rounding_kl(runs[1])], 1)
        steps = [prompts.n_steps(i) for i in range(len(prompts))]
        return torch.stack([of_prompt.sum(0) for of_prompt in torch.split(by_step, steps)])

    def score_gradients(
        self, prompts: TokenizedPrompts, sites: Sequence[Site], *, seed: int = 0
    ) -> dict[Site, Tensor]:
        """For each site ∂ log p(t)/∂h of one sampled next token t a prompt, [N, width], float64 on the CPU.

        One forward and one backward pass through the blocks above the lowest site. Over prompts gᵀg/N
        estimates the mean Fisher information F of the next token in the activation h, and KL(patched ‖ clean)
        is ½·δᵀFδ for a small replacement h + δ.

        Raises:
            MechdiffError: A site, token or position does not exist, or a gradient is not finite.

        Reference: Kunstner, Balles & Hennig (2019), Limitations of the empirical Fisher approximation: t is
            drawn from the model's own distribution, not taken from data.
        """
        self._check(prompts, sites)
        # One number a prompt, drawn here: tokens then depend on no chunk.
        drawn = torch.rand(len(prompts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows = {site: torch.zeros(len(prompts), self.width, dtype=torch.float64) for site in sites}

        def differentiate(chunk: Chunk, limits: ChunkLimits) -> None:
            found = score_gradients(self.forward, chunk, sites, drawn[chunk.index])
            for site, gradient in zip(sites, found, strict=True):
                if not bool(torch.isfinite(gradient).all()):
                    raise MechdiffError(
                        f"A gradient at {site} is NaN or infinite; load the model in a wider dtype."
                    )
                rows[site][chunk.index] = gradient.double().cpu()

        self._each_chunk(ChunkPlan(prompts, self.forward.device), differentiate, len(sites))
        return rows

    def heads(self, layer: int) -> AttentionHeads:
        """The attention heads of a layer; see `AttentionHeads` for what is raised."""
        return AttentionHeads(self.forward, layer, self._runner)

    def score(
        self,
        prompts: TokenizedPrompts | CleanRuns,
        groups: Sequence[VariantGroup],
        *,
        look: Callable[[Chunk, Rows], None] = lambda chunk, rows: None,
    ) -> ScoreResult:
        """Run every prompt once clean and once for every variant, and compare next-token distributions.

        `look` is called with the logits of patched runs as they are there.

        However many groups there are, at one site or several, each prompt is run through the whole model
        once; where a clean run of it was recorded and kept, not at all.

        Raises:
            MechdiffError: A site, token or position does not exist, an activation or logit is not finite, or
                the recording is another engine's or lacks a site.
        """
        sites = list(dict.fromkeys(group.site for group in groups))
        recorded = self._to_score(prompts, sites)
        board = ScoreBoard(groups, recorded.prompts)

        def run(chunk: Chunk, limits: ChunkLimits) -> None:
            path = self._path(chunk)
            recording = recorded.kept(chunk)
            if recording is None:
                recording = path.record(chunk, recorded.to_record(sites))
            next_token = NextToken.of(recording.logits)
            variants, same = board.variants(recording)  # and all that was recorded is finite
            recorded.add(recording)
            scored = []
            for rows in path.run(recording, variants, limits):
                look(chunk, rows)
                scored.append((rows.owner, rows.column, compare_rows(rows.logits, next_token, rows.owner)))
            board.add(chunk, same, next_token.unchanged(), scored)
            recorded.keep(recording)

        self._each_chunk(recorded, run, len(sites), n_columns=max(1, board.n_columns), patched=True)
        clean = recorded.activations
        return board.result({site: clean[site] for site in sites})

    def _forward_alone(self, chunk: Chunk, sites: Sequence[Site]) -> Recording:
        # As the path does that scores such a chunk: both must give the same to the bit.
        fusion = Fusion() if _span_of(chunk) == MEAN else self._fusion
        with fusion.applied():
            return self.forward.record(chunk, sites)

    def _to_score(self, prompts: TokenizedPrompts | CleanRuns, sites: Sequence[Site]) -> CleanRuns:
        if not isinstance(prompts, CleanRuns):
            self._check(prompts, sites)
            return CleanRuns(prompts, sites, self.forward.device)
        if not self.owns(prompts):
            raise MechdiffError("The prompts were recorded by another engine; record them with this one.")
        for site in sites:
            self.forward.decoder.check(site)
            if not prompts.has([site]):
                raise MechdiffError(f"{site} was not recorded; name it among the sites to record.")
        return prompts

    def _each_chunk(
        self,
        plan: ChunkPlan,
        work: Callable[[Chunk, ChunkLimits], None],
        n_sites: int,
        *,
        n_columns: int = 0,
        patched: bool = False,
    ) -> None:
        """Call `work` on every chunk; on the same prompts again, in smaller chunks, when memory runs out."""
        at_most = self._affordable(plan.prompts, n_sites, n_columns)
        self._runner.run(plan, work, patched=patched, at_most=at_most)

    def _affordable(self, prompts: TokenizedPrompts, n_sites: int, n_columns: int) -> ChunkLimits | None:
        """The limits that the budget allows for a call."""
        if self._cache.budget is None:
            return None
        decoder = self.forward.decoder
        eager = implementation(decoder) == "eager"
        shape = ModelShape.of(decoder, self.forward.vocabulary, keeps_scores=eager)
        load = Load(
            n_tokens=max(map(len, prompts.ids)),
            suffix=max(len(ids) - i for ids, i in zip(prompts.ids, prompts.positions, strict=True)),
            n_sites=n_sites,
            n_columns=n_columns,
            tree=self.mode == "masked" or (bool(prompts.spans) and not prompts.each),
            steps=max(prompts.steps, default=1),
            n_replaced=prompts.most_replaced,
        )
        return limits_within(self._cache.budget, self.limits, shape, load)

    def _path(self, chunk: Chunk) -> ComputePath:
        """How patched runs of a chunk are computed."""
        span = _span_of(chunk)
        if span not in self._paths:
            counted = self.forward.n_prompts
            self._paths[span] = self._chosen(span)
            self.forward.n_prompts = counted
        return self._paths[span]

    def _chosen(self, span: str) -> ComputePath:
        limits = self._runner.limits
        return self._tried(lambda: choose_path(self.forward, self._mode, limits, self._fusion, span=span))

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


def _span_of(chunk: Chunk) -> str:
    """What of the chunk's span is replaced."""
    if chunk.span == 1:
        return ONE
    return EACH if chunk.each else MEAN
