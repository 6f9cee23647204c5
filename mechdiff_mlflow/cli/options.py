"""Options that several commands share, and how their texts become specs."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mechdiff_mlflow.engine.memory.budget import parse_bytes
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.protocol import MAX_PERMUTATIONS
from mechdiff_mlflow.maps.affine import Family
from mechdiff_mlflow.solvers import SOLVERS, OffSpan
from mechdiff_mlflow.spec.pair_spec import Alpha, PairSpec, Position, Rank
from mechdiff_mlflow.spec.sites import Hook
from mechdiff_mlflow.text import number_in, text_of

MOST = 2**63 - 1
"""What a database keeps as a whole number, and a generator takes as a seed."""

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Command], Command]


class Text(click.ParamType[Any]):
    """An option whose text a function parses; what that raises is shown as it is.

    Args:
        name: Shown in the help as the kind of value.
        parse: From the text to the value.
        none: The word that stands for None; empty where there is none.
    """

    def __init__(self, name: str, parse: Callable[[str], Any], *, none: str = "") -> None:
        self.name = name
        self._parse, self._none = parse, none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The parsed value; defaults that are values already pass."""
        if not isinstance(value, str):
            return value
        return None if self._none and value == self._none else self._parse(value)

    def text(self, value: Any) -> str:
        """What to type for a value: `convert` of it is that value again."""
        if value is None:
            return self._none
        if isinstance(value, tuple):
            return ",".join(map(self.text, value))
        return text_of(value) if isinstance(value, float) else str(value)


def whole(option: str, example: int, *, least: int = 0, most: int = MOST, none: str = "") -> Text:
    """A whole number from `least` to `most`."""

    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,40}", text) is None or not least <= int(text) <= most:
            bounds = f"at least {least}" + (f" and at most {most}" if most < MOST or len(text) > 18 else "")
            raise MechdiffError(
                f"{option} {text[:80]!r} is not a whole number of {bounds}; pass e.g. {example}."
            )
        return int(text)

    return Text("whole number", parse, none=none)


def number(option: str, example: float) -> Text:
    """A finite number; its range is checked where it is used."""

    def parse(text: str) -> float:
        try:
            value = number_in(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise MechdiffError(f"{option} {text[:80]!r} is not a number; pass e.g. {text_of(example)}.")
        return value

    return Text("number", parse)


def count(option: str) -> Text:
    """`all` (None) or a whole number from 1."""
    return whole(option, 100, least=1, none="all")


def one_of(option: str, *names: str) -> Text:
    """One of some words."""

    def parse(text: str) -> str:
        if text not in names:
            raise MechdiffError(f"{option} {text[:80]!r} is unknown; use one of {', '.join(names)}.")
        return text

    return Text("|".join(names), parse)


def listed(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Comma-separated values, each once."""

    def parse_all(text: str) -> tuple[Any, ...]:
        values = tuple(parse(part.strip()) for part in text.split(","))
        if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise MechdiffError(f"The list {text[:80]!r} has {twice[0]} more than once; name each once.")
        return values

    return parse_all


def one_alpha(text: str) -> float:
    """A single scale."""
    alpha = Alpha.parse(text)
    if alpha.is_choice:
        raise MechdiffError(f"α={text[:80]!r} is a choice of several; pass one number, e.g. 0.3.")
    return alpha.values[0]


def pair_name(pair: str) -> str:
    """The name in a pair spec, or what is no file as it is: nothing of the pair but its name is needed."""
    return PairSpec.load(pair).name if Path(pair).is_file() else pair


def _stacked(*decorators: Decorator[Command]) -> Decorator[Command]:
    return lambda command: functools.reduce(lambda inner, outer: outer(inner), reversed(decorators), command)


pair = click.option(
    "--pair",
    default="cultural-demo",
    show_default=True,
    help="A shipped pair, or the path of a pair spec (YAML).",
)

site = _stacked(
    click.option(
        "--layer",
        type=whole("Layer", 26, most=99_999),
        default="26",
        show_default=True,
        help="Decoder block, from 0.",
    ),
    click.option(
        "--hook",
        type=Text("hook", Hook.parse),
        default="attn_out",
        show_default=True,
        help="resid_pre, attn_out, mlp_out or resid_post.",
    ),
)

solver = _stacked(
    click.option(
        "--solver",
        type=one_of("Solver", *SOLVERS),
        default="procrustes_scaled",
        show_default=True,
        help="; ".join(f"{name}: {row.help}" for name, row in SOLVERS.items()),
    ),
    click.option(
        "--family",
        type=Text("family", lambda text: Family.parse(text).value),
        default="update",
        show_default=True,
        help="What rank k bounds: update, rank(W - I); content, rank(W).",
    ),
    click.option(
        "--shrink",
        type=number("--shrink", 0.05),
        default="0.05",
        show_default=True,
        help="Covariance shrinkage, 0 to 1.",
    ),
    click.option(
        "--ridge",
        type=number("--ridge", 0.01),
        default="0.01",
        show_default=True,
        help="Penalty over the mean variance, at least 0.",
    ),
    click.option(
        "--output-metric",
        type=one_of("--output-metric", "identity", "tuned_covariance", "fisher"),
        default="identity",
        show_default=True,
        help="How reduced_rank counts errors: as they are, in deviations, or as they move the output.",
    ),
    click.option(
        "--directions",
        type=whole("--directions", 16, least=1, most=100_000),
        default="16",
        show_default=True,
        help="Output directions that logit_subspace is restricted to.",
    ),
    click.option(
        "--unembedding",
        type=one_of("--unembedding", "tuned", "joint"),
        default="tuned",
        show_default=True,
        help="Whose top directions those are: tuned, or joint of base and tuned.",
    ),
    click.option(
        "--alpha-fit",
        type=one_of("--alpha-fit", "after", "inside"),
        default="after",
        show_default=True,
        help="Where alpha enters: after a fit to y, or inside: a fit to y/alpha, then times alpha.",
    ),
    click.option(
        "--off-span",
        type=Text("rule", OffSpan.parse, none="auto"),
        default="auto",
        show_default=True,
        help="Outside the span of the training rows: zero, nearest_identity, or auto (val chooses).",
    ),
)

rank_and_alpha = _stacked(
    click.option(
        "--k",
        type=Text("rank", Rank.parse),
        default="full",
        show_default=True,
        help="Rank; full or 0: no bound.",
    ),
    click.option(
        "--alpha",
        type=Text("alpha", Alpha.parse),
        default="auto",
        show_default=True,
        help="Scale of the mapped vector: a number, a grid 0.3,0.7,1 or auto; val chooses.",
    ),
)

position = click.option(
    "--position",
    type=Text("position", Position.parse),
    default="decision",
    show_default=True,
    help="Read and replaced: decision (last token of the prompt), last_content or content_mean.",
)

n_train = click.option(
    "--n-train", type=count("--n-train"), default="all", show_default=True, help="Prompts fitted on, or all."
)

permutations = click.option(
    "--permutations",
    type=whole("--permutations", 99, most=MAX_PERMUTATIONS),
    default="0",
    show_default=True,
    help="Refits on shuffled pairs, choices inside, for a p-value and a control; 0: none.",
)

seed = click.option(
    "--seed",
    type=whole("--seed", 0),
    default="0",
    show_default=True,
    help="Of bootstrap and random controls.",
)

reported = _stacked(
    click.option(
        "--split",
        type=one_of("Split", "test", "val"),
        default="test",
        show_default=True,
        help="Reported split; val, as the seed does, also makes the choices and is tagged as leaking.",
    ),
    click.option(
        "--n", type=count("--n"), default="all", show_default=True, help="Reported prompts, or all."
    ),
)

models = _stacked(
    click.option(
        "--dtype",
        type=one_of("--dtype", "spec", "float32", "bfloat16", "float16", "float64"),
        default="spec",
        show_default=True,
        help="Of both models; spec: as the pair says.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, …; auto: CUDA where there is one.",
    ),
    click.option(
        "--batch-size",
        type=whole("--batch-size", 32, least=1, most=100_000),
        default="32",
        show_default=True,
        help="Prompts a chunk, at most; fewer when memory runs out.",
    ),
    click.option(
        "--sequential",
        is_flag=False,
        flag_value="yes",
        type=one_of("--sequential", "auto", "yes", "no"),
        default="auto",
        show_default=True,
        metavar="[auto|yes|no]",
        help="Hold one of the two models at a time; auto: where both do not fit.",
    ),
    click.option(
        "--memory-budget",
        type=Text("size", parse_bytes, none="none"),
        default="none",
        show_default=True,
        help="Memory beside the weights, e.g. 8GiB or 500MB; what is over goes to disk. None: no bound.",
    ),
)

engine = _stacked(
    click.option(
        "--engine",
        type=one_of("--engine", "local", "ray"),
        default="local",
        show_default=True,
        help="Who runs the models: local, this process; ray, workers of a Ray cluster.",
    ),
    click.option(
        "--address",
        default="own",
        show_default=True,
        help="With --engine ray: own starts a cluster on this machine; auto or host:port joins one.",
    ),
    click.option(
        "--workers",
        type=whole("--workers", 4, least=1, most=4096),
        default="1",
        show_default=True,
        help="With --engine ray: how many workers hold the pair.",
    ),
    click.option(
        "--gpus-per-worker",
        type=whole("--gpus-per-worker", 2, least=1, most=64, none="auto"),
        default="auto",
        show_default=True,
        help="With --engine ray: GPUs of each worker; more than one for a pair with a device map.",
    ),
)

tracking = _stacked(
    click.option(
        "--tracking-uri",
        default=None,
        help="MLflow server or store; default MLFLOW_TRACKING_URI, then ./mlflow.db.",
    ),
    click.option(
        "--experiment",
        default=None,
        help="MLflow experiment; default MLFLOW_EXPERIMENT_NAME or _ID, the active run's, the pair's name.",
    ),
)
store = click.option(
    "--tracking-uri",
    default=None,
    help="MLflow server or store; default MLFLOW_TRACKING_URI, then ./mlflow.db.",
)

promotion = click.option(
    "--promote",
    is_flag=False,
    flag_value="champion",
    default="none",
    show_default=True,
    metavar="[ALIAS]",
    help="Register the map under this alias (champion when none is given).",
)

alias = click.option(
    "--alias", default="champion", show_default=True, help="Name under which people fetch the map."
)

force = _stacked(
    click.option(  # `mlflow run -P force=yes`: a parameter of MLproject has a value
        "--forced",
        type=one_of("--forced", "no", "yes"),
        default="no",
        hidden=True,
        is_eager=True,
        expose_value=False,
        callback=lambda context, option, value: context.meta.update(forced=value == "yes"),
        help="yes is --force.",
    ),
    click.option(
        "--force",
        is_flag=True,
        callback=lambda context, option, value: value or context.meta.get("forced", False),
        help="Move the alias to a map that the policy refuses: unmeasured, doing harm, leaking, or worse "
        "than the one that has it; the history says so.",
    ),
)

why = click.option("--why", default="", help="Reason, for the history of the alias.")

policy = _stacked(
    click.option(
        "--policy",
        type=click.Path(path_type=Path),
        default=None,
        help="YAML file of rules, e.g. min_drop_pct: 30 and ci_above_zero: true.",
    ),
    click.option("--min-drop", type=number("--min-drop", 30), default=None, help="Least drop in percent."),
    click.option("--min-skill", type=number("--min-skill", 10), default=None, help="Least skill in percent."),
    click.option(
        "--ci-above-zero/--no-ci-above-zero",
        default=None,
        help="Whether the 95 % intervals of drop and skill must lie above 0, as they must by default.",
    ),
    click.option(
        "--allow-leak",
        is_flag=True,
        default=None,
        help="Also a map that something was chosen for on prompts it is reported on, or nobody knows.",
    ),
    click.option(
        "--allow-pair-mismatch",
        is_flag=True,
        default=None,
        help="Also a map fitted on another pair than it was measured on, or than the version it replaces.",
    ),
)
