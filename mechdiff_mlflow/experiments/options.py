"""Groups of options that several requests share."""

from __future__ import annotations

from dataclasses import dataclass

from mechdiff_mlflow.engine.memory.budget import parse_bytes
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.protocol import MAX_ANSWER_TOKENS, MAX_PERMUTATIONS
from mechdiff_mlflow.maps.affine import Family
from mechdiff_mlflow.models.named_pair import named_pair, pair_name_of
from mechdiff_mlflow.models.pairs import EngineOptions
from mechdiff_mlflow.solvers import SOLVERS, Settings
from mechdiff_mlflow.spec.options import FLAG, TEXT, Kind, Request, number, one_of, option, technical, whole
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Position, Rank
from mechdiff_mlflow.spec.prompt_files import PromptFiles
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.text import text_of

DEFAULT_PAIR = "cultural-demo"


def one_alpha(text: str) -> float:
    """A single scale."""
    alpha = Alpha.parse(text)
    if alpha.is_choice:
        raise MechdiffError(f"α={text[:80]!r} is a choice of several; pass one number, e.g. 0.3.")
    return alpha.values[0]


def count(name: str) -> Kind:
    """`all` or a whole number from 1."""
    return whole(name, 100, least=1, none="all")


MIN_EFFECT_NATS = 0.01
"""KL_raw from which on a site has an effect: less may be above the noise, but no behaviour hangs on it."""
LAYER = whole("Layer", 26, most=99_999)
SPLIT = one_of("Split", "test", "val")


@dataclass(frozen=True, kw_only=True)
class StoreOptions(Request):
    """Which store."""

    tracking_uri: str | None = technical(
        None, TEXT, "MLflow server or store; default MLFLOW_TRACKING_URI, then ./mlflow.db.", is_resumed=False
    )


@dataclass(frozen=True, kw_only=True)
class TrackingOptions(StoreOptions):
    """Which store and experiment."""

    experiment: str | None = technical(
        None,
        TEXT,
        "MLflow experiment; default MLFLOW_EXPERIMENT_NAME or _ID, the active run's, the pair's name.",
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Request):
    """How the models are held."""

    dtype: str = option(
        "spec",
        one_of("--dtype", "spec", "float32", "bfloat16", "float16", "float64"),
        "Parameters of both models; spec: as the pair says.",
    )
    device: str = technical("auto", TEXT, "cpu, cuda, cuda:1, …; auto: CUDA where there is one.")
    batch_size: int = technical(
        "32",
        whole("--batch-size", 32, least=1, most=100_000),
        "Prompts per batch, at most; fewer when memory runs out.",
    )
    sequential: str = technical(
        "auto",
        one_of("--sequential", "auto", "yes", "no"),
        "Hold one of the two models at a time; auto: where both do not fit.",
        bare="yes",
        metavar="[auto|yes|no]",
    )
    memory_budget: int | None = technical(
        "none",
        Kind("size", parse_bytes, none="none"),
        "Working memory beside the weights, e.g. 8GiB or 500MB. none: no bound.",
    )

    @property
    def engine_options(self) -> EngineOptions:
        """How much the engine holds at a time."""
        return EngineOptions(
            batch_size=self.batch_size, memory_budget=self.memory_budget, sequential=self.sequential
        )


@dataclass(frozen=True, kw_only=True)
class PairOptions(Request):
    """Which pair."""

    pair: str = option(DEFAULT_PAIR, TEXT, "A shipped pair, or the path of a pair spec (YAML).")


@dataclass(frozen=True, kw_only=True)
class NamedPairOptions(PairOptions):
    """A pair by the names of its models and prompts, in place of a spec; `pair` then names it."""

    tuned: str | None = option(
        None, TEXT, "Tuned model or adapter, a hub id or a path: with --prompts, in place of a pair spec."
    )
    base: str | None = option(None, TEXT, "Its base; default what the adapter or the model's card names.")
    prompts: str | None = option(
        None,
        TEXT,
        "JSONL, CSV or Parquet file, which a seed splits, or train,val,test; FILE:COLUMN names a column.",
    )
    prompts_from: str | None = option(
        None, TEXT, "Hugging Face data set instead: NAME:COLUMN, or NAME:COLUMN:PART.", metavar="NAME:COLUMN"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("base", "prompts", "prompts_from") if getattr(self, name) is not None]
        if self.tuned is None and given:
            raise MechdiffError(f"--{given[0].replace('_', '-')} is given without --tuned; name that, too.")
        if self.tuned is not None and (self.prompts is None) == (self.prompts_from is None):
            raise MechdiffError(
                f"--tuned {self.tuned} needs prompts to compare the models on; give --prompts FILE, or "
                "--prompts-from NAME:COLUMN, one of the two."
            )
        if self.tuned is not None and self.pair == DEFAULT_PAIR:
            object.__setattr__(self, "pair", pair_name_of(self.tuned))

    @property
    def spec(self) -> PairSpec:
        """The pair, read anew."""
        if self.tuned is None:
            return PairSpec.load(self.pair)
        if self.prompts is not None:
            files = PromptFiles.parse(self.prompts)
        else:
            files = PromptFiles.parse_dataset(self.prompts_from or "")
        return named_pair(self.tuned, files, base=self.base, name=self.pair)

    @property
    def pair_words(self) -> list[str]:
        """What to type for the same pair."""
        words = self.words(lambda name, _: name not in ("pair", "tuned", "base", "prompts", "prompts_from"))
        return words[1:]

    def params(self) -> dict[str, str | bool]:
        """What defines the results; of names that are not given, nothing."""
        names = ("tuned", "base", "prompts", "prompts_from")
        return {key: text for key, text in super().params().items() if text != "" or key not in names}


@dataclass(frozen=True, kw_only=True)
class SeedOptions(Request):
    """What is random."""

    seed: int = option("0", whole("--seed", 0), "Random seed for the bootstrap and random controls.")


@dataclass(frozen=True, kw_only=True)
class ReportedOptions(Request):
    """Which prompts are reported."""

    split: str = option(
        "test",
        SPLIT,
        "Reported split; val, as in the original experiment, also makes the choices, tagged as a leak.",
    )
    n: int | None = option("all", count("--n"), "Reported prompts, or all.")


@dataclass(frozen=True, kw_only=True)
class EffectOptions(Request):
    """Which sites count as places where the models differ."""

    min_effect: float = option(
        text_of(MIN_EFFECT_NATS),
        number("--min-effect", MIN_EFFECT_NATS, least=0),
        "KL_raw in nats from which on a site has an effect.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Request):
    """Which prompts maps are fitted on."""

    n_train: int | None = option("all", count("--n-train"), "Prompts fitted on, or all.")


@dataclass(frozen=True, kw_only=True)
class PositionOptions(Request):
    """Which token."""

    position: Position = option(
        "decision",
        Kind("position", Position.parse),
        "What is read and replaced: decision (last token of the prompt), last_content or content_mean.",
    )


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(Request):
    """How much of an answer is compared, and where a patch acts in it."""

    answer_tokens: int = option(
        "1",
        whole("--answer-tokens", 8, least=1, most=MAX_ANSWER_TOKENS),
        "Tokens of each answer that are compared, at most; 1: the first alone.",
    )
    patch_at: str = option(
        "decision",
        one_of("--patch-at", "decision", "answer"),
        "decision: a patch replaces one token of each prompt; answer: each of its answer's tokens, too.",
    )


@dataclass(frozen=True, kw_only=True)
class PermutationOptions(Request):
    """How often shuffled pairs are fitted."""

    permutations: int = option(
        "0",
        whole("--permutations", 99, most=MAX_PERMUTATIONS),
        "Refits on shuffled pairs, choices inside, for a p-value and a control; 0: none.",
    )


@dataclass(frozen=True, kw_only=True)
class AliasOptions(Request):
    """Which alias."""

    alias: str = option("champion", TEXT, "Name under which people fetch the map.")


@dataclass(frozen=True, kw_only=True)
class WhyOptions(Request):
    """Why an alias is moved."""

    why: str = option("", TEXT, "Reason, for the history of the alias.")


@dataclass(frozen=True, kw_only=True)
class ForceOptions(Request):
    """Whether the policy is overruled."""

    force: bool = option(
        False,
        FLAG,
        "Move the alias to a map that the policy refuses: unmeasured, doing harm, leaking, or worse than the "
        "one that has it; the history says so.",
    )


@dataclass(frozen=True, kw_only=True)
class MapOptions(Request):
    """Which map."""

    map: str = option(..., TEXT, "models:/NAME@ALIAS, NAME@ALIAS, runs:/RUN or a file.")
    alpha: float | None = option(
        "map",
        Kind("alpha", one_alpha, none="map"),
        "Scale instead of the map's own; replaces it, does not multiply it.",
    )


@dataclass(frozen=True, kw_only=True)
class MismatchOptions(Request):
    """Whether a map may be used on another pair."""

    allow_pair_mismatch: bool = option(
        False,
        FLAG,
        "Use a map on a pair that it was not fitted on, or that an imported map does not name; runs say so.",
    )


@dataclass(frozen=True, kw_only=True)
class SolverOptions(Settings, Request):
    """How maps are fitted."""

    solver: str = option(
        "procrustes_scaled",
        one_of("Solver", *SOLVERS),
        "; ".join(f"{name}: {row.help}" for name, row in SOLVERS.items()),
    )
    family: str = option(
        "update",
        Kind("family", lambda text: str(Family.parse(text))),
        "What rank k bounds: update, rank(W - I); content, rank(W).",
    )


@dataclass(frozen=True, kw_only=True)
class CellOptions(SolverOptions):
    """One map to fit."""

    layer: int = option("26", LAYER, "Decoder block, counted from 0.")
    hook: Hook = option("attn_out", Kind("hook", Hook.parse), "resid_pre, attn_out, mlp_out or resid_post.")
    k: Rank = option("full", Kind("rank", Rank.parse), "Rank; full or 0: no bound.")
    alpha: Alpha = option(
        "auto",
        Kind("alpha", Alpha.parse),
        "Scale of the mapped vector: a number, a grid 0.3,0.7,1 or auto; val chooses.",
    )

    @property
    def cell(self) -> Cell:
        """Where and how the map is fitted."""
        return Cell(Site(self.layer, self.hook), self.solver, self.family, self.k, self.alpha)
