"""Which attention heads of a layer carry the difference between base and tuned.

A set S of heads is replaced before the output projection: the tuned model's own projection gets the base
model's z for the heads in S and its own for the rest. coverage(S) = ΣKL_S / ΣKL_all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import pandas as pd

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.rows import Array
from mechdiff_mlflow.experiments.study import Study
from mechdiff_mlflow.experiments.substitution import Heads
from mechdiff_mlflow.experiments.workers.workers import n_heads_of
from mechdiff_mlflow.measures import stats
from mechdiff_mlflow.spec.sites import Hook, Site

COLUMNS = (
    "site", "n_heads", "choice", "size", "heads", "KL", "coverage", "coverage_low", "coverage_high", "KL_all",
)  # fmt: skip
"""Of the table. choice is single, greedy (nested, chosen on val) or random (of several sets of a size: mean,
and the middle 95 % of the sets instead of an interval over prompts)."""


@dataclass(frozen=True, eq=False)
class HeadsRecord:
    """What the heads of one layer carry."""

    site: Site  # the layer's attn_out
    table: pd.DataFrame  # `COLUMNS`
    greedy: Heads  # in the order in which val chose them


def heads_of(study: Study, layer: int, *, n_random: int = 20) -> HeadsRecord:
    """Single heads of a layer, greedy sets and `n_random` random sets of every size.

    Raises:
        MechdiffError: The heads of the two models cannot be told apart or differ in number or width, or
            replacing all of them moves KL no further than noise.
    """
    site = Site(layer, Hook.ATTN_OUT)
    patches = partial(study.computing.head_patches, layer, position=study.protocol.position)
    n_heads = study.computing.ask(n_heads_of, layer)
    order: Heads = ()
    with study.stage("greedy heads on val", n_heads) as advance:
        while len(order) < n_heads:
            candidates = [(*order, head) for head in range(n_heads) if head not in order]
            means = [kl.mean() for kl in patches(prompts=study.val_prompts, sets=candidates)]
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
    on_report = partial(patches, prompts=study.report_prompts)
    scored = dict(zip(sets, on_report(sets=sets), strict=True))
    whole = scored[everything]
    (own,) = on_report(sets=[()])  # the tuned model's heads put back through the projection
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
        [(str(site), n_heads, *row, mean_all) for row in rows], columns=list(COLUMNS)
    )
    return HeadsRecord(site, table, order)


def _coverage(whole: Array, kl: Array, bootstrap: stats.Bootstrap) -> tuple[float, float, float]:
    """ΣKL_S/ΣKL_all with its interval: one minus the drop."""
    drop = stats.drop_pct(whole, kl, bootstrap=bootstrap)
    ends = [float("nan") if end is None else 1 - end / 100 for end in (drop.estimate, drop.high, drop.low)]
    return ends[0], ends[1], ends[2]


def _sorted(heads: Heads) -> Heads:
    return tuple(sorted(heads))
