"""Profiles of a pair: how alike the models are layer by layer, and which heads carry a difference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pandas as pd

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.rows import Array
from mechdiff_mlflow.experiments.study import Study
from mechdiff_mlflow.experiments.workers.tasks import HeadPatches, Heads, Swap
from mechdiff_mlflow.experiments.workers.workers import model_sizes, n_heads_of
from mechdiff_mlflow.measures import similarity, stats
from mechdiff_mlflow.measures.bootstrap import Bootstrap
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Hook, Site

DIRECTIONS = {"tuned_from_base": "tuned", "base_from_tuned": "base"}
"""The model that is patched with the other's activations, by name."""
HEAD_COLUMNS = (
    "site", "n_heads", "choice", "size", "heads", "KL", "coverage", "coverage_low", "coverage_high", "KL_all",
)  # fmt: skip
"""Columns of the table of heads. choice is single, greedy (nested, chosen on val) or random (of several sets
of a size: mean, and the middle 95 % of the sets instead of an interval over prompts)."""


def layer_profile(study: Study) -> pd.DataFrame:
    """One row a layer, at resid_post on the reported prompts.

    Columns: layer; cka, debiased, None where either does not vary; for both directions KL_… (mean
    KL(patched ‖ clean) in nats of the unmapped patch), its 95 % interval …_low and …_high, and floor_…,
    the noise floor: the identity patch's, or that of two clean runs of the patched model.

    Raises:
        MechdiffError: The models differ in depth or width.
    """
    prompts, position = study.report_prompts, study.protocol.position
    base, tuned = study.computing.ask(model_sizes)
    if base != tuned:
        raise MechdiffError(
            f"Base has {base[0]} layers of width {base[1]} and tuned {tuned[0]} of {tuned[1]}; an unmapped "
            "patch needs models of one shape."
        )
    sites = [Site(layer, Hook.RESID_POST) for layer in range(base[0])]
    columns: dict[str, list[float | None]] = {"layer": [float(site.layer) for site in sites]}
    swapped, noise = {}, {}
    for name, taker in DIRECTIONS.items():
        task = Swap(prompts, position, taker, tuple(sites))
        swapped[name] = study.computing.whole(task, study.stage, f"patching {taker} on {prompts.split}")
        noise[name] = study.computing.clean_noise(taker, prompts, position)
    own = next(iter(swapped.values()))
    columns["cka"] = [
        similarity.debiased_cka(own[f"base/{site}"].double(), own[f"tuned/{site}"].double()) for site in sites
    ]
    for name, found in swapped.items():
        kls: list[Array] = list(found["KL"].numpy().T)
        means = [stats.mean(kl, bootstrap=study.bootstrap) for kl in kls]
        columns[f"KL_{name}"] = [mean.estimate for mean in means]
        columns[f"KL_{name}_low"] = [mean.low for mean in means]
        columns[f"KL_{name}_high"] = [mean.high for mean in means]
        columns[f"floor_{name}"] = [max(float(floor), noise[name]) for floor in found["floor"].mean(0)]
    table: pd.DataFrame = pd.DataFrame(columns).astype({"layer": int})
    return table


def heads_of(study: Study, layer: int, *, n_random: int = 20) -> pd.DataFrame:
    """Single heads of a layer, greedy sets and `n_random` random sets of every size: `HEAD_COLUMNS`.

    A set S of heads is replaced before the output projection: the tuned model's own projection gets the base
    model's z for the heads in S and its own for the rest. coverage(S) = ΣKL_S / ΣKL_all.

    Raises:
        MechdiffError: The heads of the two models cannot be told apart or differ in number or width, or
            replacing all of them moves KL no further than noise.
    """
    site = Site(layer, Hook.ATTN_OUT)

    def patches(prompts: PromptSet, sets: Sequence[Heads]) -> list[Array]:
        """KL(patched ‖ clean) in nats of every set, [n]."""
        task = HeadPatches(prompts, study.protocol.position, layer, tuple(sets))
        return list(study.computing.whole(task)["KL"].numpy().T)

    n_heads = study.computing.ask(n_heads_of, layer)
    order: Heads = ()
    with study.stage("greedy heads on val", n_heads) as advance:
        while len(order) < n_heads:
            candidates = [(*order, head) for head in range(n_heads) if head not in order]
            means = [kl.mean() for kl in patches(study.val_prompts, candidates)]
            order = candidates[int(np.argmax(means))]
            advance(1)
    singles: list[Heads] = [(head,) for head in range(n_heads)]
    nested: list[Heads] = [order[: size + 1] for size in range(n_heads)]
    rng = np.random.default_rng(study.protocol.seed)
    chance: list[list[Heads]] = [
        [tuple(int(h) for h in rng.permutation(n_heads)[:size]) for _ in range(n_random)]
        for size in range(1, n_heads + 1)
    ]
    everything = tuple(range(n_heads))
    sets = list(dict.fromkeys(map(_sorted, [*singles, *nested, *chain.from_iterable(chance), everything])))
    scored = dict(zip(sets, patches(study.report_prompts, sets), strict=True))
    whole = scored[everything]
    (own,) = patches(study.report_prompts, [()])  # the tuned model's heads put back through the projection
    if not stats.above_floor(float(whole.mean()), max(float(own.mean()), study.noise)):
        raise MechdiffError(
            f"Replacing all heads at {site} moves KL by {whole.mean():.2g} nats, no further than noise; "
            "choose a layer where the models differ."
        )
    mean_all = float(whole.mean())
    rows: list[tuple[object, ...]] = []
    for choice, some in (("single", singles), ("greedy", nested)):
        for heads in some:
            kl = scored[_sorted(heads)]
            coverage = _coverage(whole, kl, study.bootstrap)
            rows.append((choice, len(heads), " ".join(map(str, heads)), float(kl.mean()), *coverage))
    for many in chance:
        kls = np.array([scored[_sorted(heads)].mean() for heads in many])
        shares = kls / mean_all
        low, high = np.quantile(shares, [0.025, 0.975])
        coverage = float(shares.mean()), float(low), float(high)
        rows.append(("random", len(many[0]), f"{n_random} sets", float(kls.mean()), *coverage))
    table: pd.DataFrame = pd.DataFrame(
        [(str(site), n_heads, *row, mean_all) for row in rows], columns=list(HEAD_COLUMNS)
    )
    return table


def _coverage(whole: Array, kl: Array, bootstrap: Bootstrap) -> tuple[float, float, float]:
    """ΣKL_S/ΣKL_all with its interval: one minus the drop."""
    drop = stats.drop_pct(whole, kl, bootstrap=bootstrap)
    ends = [float("nan") if end is None else 1 - end / 100 for end in (drop.estimate, drop.high, drop.low)]
    return ends[0], ends[1], ends[2]


def _sorted(heads: Heads) -> Heads:
    return tuple(sorted(heads))
