"""Requests: one frozen, checked value for each command, which the command line and Python build alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.options import (
    LAYER,
    SPLIT,
    AliasOptions,
    AnswerOptions,
    CellOptions,
    EffectOptions,
    ForceOptions,
    MapOptions,
    MismatchOptions,
    ModelOptions,
    NamedPairOptions,
    PairOptions,
    PermutationOptions,
    PositionOptions,
    ReportedOptions,
    SeedOptions,
    SolverOptions,
    StoreOptions,
    TrackingOptions,
    TrainOptions,
    WhyOptions,
    count,
    one_alpha,
)
from mechdiff_mlflow.experiments.protocol import Protocol
from mechdiff_mlflow.experiments.sweep import SweepSite, Targets, cells_of
from mechdiff_mlflow.spec.options import PATH, TEXT, Kind, listed, one_of, option, technical, whole
from mechdiff_mlflow.spec.pair_spec import Cell, Rank
from mechdiff_mlflow.spec.sites import Hook

ORIGINAL_N = 500
"""Prompts that the original experiment reports on."""
AS_IN_ORIGINAL = f"{ORIGINAL_N}-or-all"
"""As the number of prompts: as many as the original experiment, or all where there are fewer."""


@dataclass(frozen=True, kw_only=True)
class ExperimentRequest(NamedPairOptions, SeedOptions, ModelOptions, TrackingOptions):
    """A request that loads a pair, measures it, and keeps what it finds as runs.

    It writes nothing else, so that what a run's tag says of it can be begun again.
    """

    engine: str = technical(
        "local",
        one_of("--engine", "local", "ray"),
        "Who runs the models: local, this process; ray, workers of a Ray cluster.",
    )
    address: str = technical(
        "own",
        TEXT,
        "With --engine ray: own starts a cluster on this machine; auto or host:port joins one.",
        is_resumed=False,
    )
    workers: int = technical(
        "1", whole("--workers", 4, least=1, most=4096), "With --engine ray: how many workers hold the pair."
    )
    gpus_per_worker: int | None = technical(
        "auto",
        whole("--gpus-per-worker", 2, least=1, most=64, none="auto"),
        "With --engine ray: GPUs of each worker; more than one for a pair with a device map.",
    )

    @property
    def kind(self) -> str:
        """What its top run is called."""
        return self.command.replace("-", "_")

    @property
    def protocol(self) -> Protocol:
        """What all cells share; what the request has no field for keeps its default."""
        asked = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(Protocol)
            if hasattr(self, field.name)
        }
        return Protocol(**asked)


@dataclass(frozen=True, kw_only=True)
class RunRequest(
    CellOptions,
    PositionOptions,
    AnswerOptions,
    ReportedOptions,
    TrainOptions,
    PermutationOptions,
    ForceOptions,
    ExperimentRequest,
):
    """Fit a map at one site, patch with it, and report: the main job.

    One parent run with a fit and a patch run under it.

    \b
    Example:
      mechdiff run --layer 26 --hook attn_out --k 8 --alpha 0.3 --promote
    """

    promote: str | None = option(
        "none",
        Kind("alias", str, none="none"),
        "Register the map under this alias (champion when none is given).",
        bare="champion",
        metavar="[ALIAS]",
    )


@dataclass(frozen=True, kw_only=True)
class FitRequest(CellOptions, PositionOptions, AnswerOptions, TrainOptions, ExperimentRequest):
    """Fit a map at one site; val chooses what is left open.

    \b
    Example:
      mechdiff fit --layer 24 --hook resid_post --solver reduced_rank --k 8 --alpha 0.7
    """


@dataclass(frozen=True, kw_only=True)
class PatchRequest(
    MapOptions, AnswerOptions, ReportedOptions, TrainOptions, MismatchOptions, ExperimentRequest
):
    """Patch with a map that exists, and report.

    \b
    Example:
      mechdiff patch --map cultural-demo-L26-attn_out@champion --alpha 0.3
    """


@dataclass(frozen=True, kw_only=True)
class SweepRequest(
    SolverOptions,
    PositionOptions,
    AnswerOptions,
    ReportedOptions,
    TrainOptions,
    PermutationOptions,
    ExperimentRequest,
):
    """Sweep ranks (and scales) over sites: drop%(k) and the smallest rank that reaches a target.

    \b
    Example:
      mechdiff sweep --sites L26/attn_out:0.3 --ranks 1,8,32,full --targets 30
    """

    sites: tuple[SweepSite, ...] = option(
        "L26/attn_out:0.3,L24/resid_post:0.7",
        listed("sites", SweepSite.parse),
        "Sites, each with its alpha after a colon; a site without one takes every one of --alphas.",
    )
    ranks: tuple[Rank, ...] = option("1,8,32,full", listed("ranks", Rank.parse), "Ranks k.")
    alphas: tuple[float, ...] = option("1", listed("alphas", one_alpha), "Scales for sites without one.")
    targets: Targets = option(
        "auto",
        Kind("targets", Targets.parse),
        "Drop in percent whose smallest rank is sought: 30 for all sites, 30,12 one a site in order, or by "
        "site, L26/attn_out:30,L24/resid_post:12; auto: those for the default sites, 30 for others.",
    )

    @property
    def cells(self) -> list[Cell]:
        """Every site × α × rank."""
        return cells_of(self.sites, self.ranks, self.alphas, self.solver, self.family)


def _count_or_original(text: str) -> int | str:
    return text if text == AS_IN_ORIGINAL else int(count("--n").parse(text))


@dataclass(frozen=True, kw_only=True)
class ReportPassRequest(AnswerOptions, TrainOptions, MismatchOptions, ExperimentRequest):
    """Measure the registered winners of a pair again, each with the α kept on its version.

    One patch run per winner. Nothing is fitted or chosen, so no number is picked from several.

    \b
    Example:
      mechdiff report-pass --pair cultural-demo --alias champion
    """

    alias: str = option("champion", TEXT, "Which winners: those of this alias.")
    n: int | str | None = option(
        AS_IN_ORIGINAL,
        Kind("count", _count_or_original, none="all"),
        "Reported prompts, all, or 500 where there are as many and else all.",
    )
    split: str = option("test", SPLIT, "Reported split.")

    @property
    def protocol(self) -> Protocol:
        """What all winners share; the number of prompts that may be as in the original experiment is open."""
        return Protocol(
            split=self.split,
            n=None if isinstance(self.n, str) else self.n,
            n_train=self.n_train,
            answer_tokens=self.answer_tokens,
            patch_at=self.patch_at,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class AtlasRequest(
    EffectOptions,
    ForceOptions,
    SolverOptions,
    PositionOptions,
    AnswerOptions,
    ReportedOptions,
    TrainOptions,
    ExperimentRequest,
):
    """Patch every layer at every hook, raw and mapped: where do the models differ, and how transportably?

    Maps have full rank. Sites whose raw patch stays below the noise floor get no map and no run of their own,
    only their row in the table.

    \b
    Example:
      mechdiff atlas --hooks attn_out,resid_post --promote-best 1
    """

    hooks: tuple[Hook, ...] = option(
        ",".join(map(str, Hook)), listed("hooks", Hook.parse), "Hooks to visit at every layer."
    )
    alpha: float = option("1", Kind("alpha", one_alpha), "Scale of every map.")
    promote_best: int = option(
        "0",
        whole("--promote-best", 3, most=100_000),
        "Register the maps of this many attention and MLP outputs: those with an effect and the highest "
        "drop on val.",
    )
    alias: str = option("champion", TEXT, "Alias of what is registered.")


@dataclass(frozen=True, kw_only=True)
class LayersRequest(PositionOptions, ReportedOptions, ExperimentRequest):
    """Compare base and tuned layer by layer: CKA, and unmapped layer patches both ways.

    \b
    Example:
      mechdiff layers --pair cultural-demo
    """


@dataclass(frozen=True, kw_only=True)
class HeadsRequest(PositionOptions, ReportedOptions, ExperimentRequest):
    """Find the heads of a layer that carry the difference: coverage KL_S / KL_all of sets S.

    Heads get the base model's values before the output projection. val chooses sets greedily.

    \b
    Example:
      mechdiff heads --layer 26
    """

    layer: int = option("26", LAYER, "Layer whose attention heads are tried.")
    n_random: int = option(
        "20",
        whole("--n-random", 20, least=2, most=10_000),
        "Random sets of every size, to compare the greedy ones with.",
    )


def _document(text: str) -> str:
    if not text.endswith((".md", ".html")):
        raise MechdiffError(
            f"{text[:200]} has an unknown suffix; name a .md or .html file, both are written."
        )
    return text


DOCUMENT = Kind("file", _document)


@dataclass(frozen=True, kw_only=True)
class ReportRequest(EffectOptions, PairOptions, TrackingOptions):
    """Write up what the runs of a pair show: where, how, how low-rank; then tables, controls and caveats.

    No model is loaded and nothing is measured again; deleting the report's run loses nothing.

    \b
    Example:
      mechdiff report --pair cultural-demo --out mechdiff-report.md
    """

    out: str = technical("mechdiff-report.md", DOCUMENT, "File to write; .md and .html are both written.")


@dataclass(frozen=True, kw_only=True)
class CompareRequest(EffectOptions, SeedOptions, StoreOptions):
    """Compare fine-tunes by their runs: where, how transportable, how low-rank, and how sure.

    PAIRS are two or more; each is compared with the first. Every pair's runs are those of its own experiment,
    or of the one that MLFLOW_EXPERIMENT_NAME names.
    Measure both the same way first: mechdiff sweep (and atlas) on each.

    \b
    Example:
      mechdiff compare cultural-demo cognitive-demo
    """

    pairs: tuple[str, ...] = option(..., TEXT, "", is_argument=True, is_repeated=True)
    out: str = technical("mechdiff-compare.md", DOCUMENT, "File to write; .md and .html are both written.")


@dataclass(frozen=True, kw_only=True)
class ImportRequest(PositionOptions, AliasOptions, WhyOptions, ForceOptions, TrackingOptions):
    """Register the winners of a hand-made MANIFEST (pair, winners: path and alpha) with an alias.

    Its .pt bundles are read without unpickling, and become maps with the same outputs.

    \b
    Example:
      mechdiff import winners/manifest.json --pair cultural-demo --alias imported
    """

    manifest: Path = option(..., PATH, "", is_argument=True)
    root: Path | None = option(None, PATH, "Folder in which its paths lie; default the manifest's own.")
    pair: str | None = option(None, TEXT, "Name or spec of the pair; default what the manifest says.")
