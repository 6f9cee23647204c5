"""Whole answers: which tokens are read behind the prompts, and what a patch does to each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from mechdiff_mlflow.experiments.answer_tasks import TaskRecord
from mechdiff_mlflow.experiments.protocol import Protocol
from mechdiff_mlflow.experiments.rows import RAW, Array, SiteRows
from mechdiff_mlflow.experiments.workers import Workers
from mechdiff_mlflow.experiments.workers.answering import Greedy
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.measures import stats
from mechdiff_mlflow.measures.bootstrap import Bootstrap, Interval
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.tokens import Answers


@dataclass(frozen=True, eq=False)
class AnswerRecord:
    """One map patched on a split, by the KL(patched ‖ clean) of whole answers: its sum over their tokens."""

    n_tokens: int  # T: the most that are compared
    patch_at: str  # `decision`, or `answer`: every token that another of the answer follows
    kl_raw: float | None  # mean over prompts, nats an answer; None where the widths differ
    kl_mapped: float
    kl_null: float
    noise_floor: float  # what these must stand out from
    drop_pct: Interval | None  # 100·(1 − ΣKL_mapped/ΣKL_raw); None with a reason in `undefined`
    skill_pct: Interval | None  # 100·(1 − ΣKL_mapped/ΣKL_null)
    curve: pd.DataFrame  # one row a token t, counted from 1: `CURVE`
    per_prompt: Mapping[str, Array | Sequence[str]]  # KL_answer_raw, …_mapped and …_null, and says_…, [n]
    undefined: Mapping[str, str]  # why a number has no value, by its name
    tasks: Sequence[TaskRecord]  # of prompts with answers of their own, where one map alone is reported


CURVE = ("t", "n", *(f"KL_{who}{end}" for who in ("raw", "mapped", "null") for end in ("", "_low", "_high")))
"""Columns of the curve: mean KL of token t over the n prompts whose answers have one, with its interval."""


def with_answers(prompts: PromptSet, protocol: Protocol, workers: Workers) -> PromptSet:
    """Prompts with their own answers, else the tuned model's greedy ones; as they are if T is 1.

    Both end with the token that ends the turn, and are cut after T tokens.
    """
    n_tokens = protocol.answer_tokens
    if n_tokens == 1:
        return prompts
    ids, end = workers.pair.readers.given_answers(prompts)
    if not all(ids):
        own = workers.whole(Greedy(prompts, protocol.position, "tuned", n_tokens, end))["tokens"][:, 0]
        greedy = [tuple(token for token in row if token >= 0) for row in own.tolist()]
        ids = [given or found for given, found in zip(ids, greedy, strict=True)]
    answers = Answers(tuple(one[:n_tokens] for one in ids), n_tokens, protocol.patch_at == "answer")
    return replace(prompts, answers=answers)


def answer_record(
    map_: AffineMap,
    null: Sequence[AffineMap],
    rows: SiteRows,
    protocol: Protocol,
    bootstrap: Bootstrap,
    tasks: Sequence[TaskRecord],
    said: Mapping[str, Sequence[str]],
) -> AnswerRecord:
    """One map on one split, from the site's patched rows by the digests of maps; `null` are its null's.

    `tasks` and `said` are of `task_records`.
    """
    by_name: dict[str, list[AffineMap]] = {"mapped": [map_], "null": [*null]}
    totals = {name: rows.answer_kl(maps) for name, maps in by_name.items()}
    steps = {name: _steps(rows, [one.digest for one in maps]) for name, maps in by_name.items()}
    if RAW in rows.patched:
        totals["raw"], steps["raw"] = rows.patched[RAW].answer_kl_nats, _steps(rows, [RAW])
    floor, undefined = rows.answer_floor, {}
    found: dict[str, Interval | None] = {"drop_answer_pct": None, "skill_answer_pct": None}
    for name, reference in (("drop_answer_pct", "raw"), ("skill_answer_pct", "null")):
        if reference not in totals:
            undefined[name] = "base and tuned differ in width, so nothing can be cross-patched raw"
            continue
        interval = stats.drop_pct(totals[reference], totals["mapped"], noise_floor=floor, bootstrap=bootstrap)
        if interval.estimate is None:
            mean = float(totals[reference].mean())
            undefined[name] = stats.below_floor(f"the KL of answers, {reference},", mean, floor)
        else:
            found[name] = interval
    for task in tasks:
        if task.recovered_pct is None:
            why = "tuned and the raw patch do not differ beyond the interval, or there is no raw patch"
            undefined[f"recovered_{task.measure}_pct"] = why
    means = {name: float(kl.mean()) for name, kl in totals.items()}
    return AnswerRecord(
        n_tokens=protocol.answer_tokens,
        patch_at=protocol.patch_at,
        kl_raw=means.get("raw"),
        kl_mapped=means["mapped"],
        kl_null=means["null"],
        noise_floor=floor,
        drop_pct=found["drop_answer_pct"],
        skill_pct=found["skill_answer_pct"],
        curve=_curve(steps, bootstrap),
        per_prompt={**{f"KL_answer_{name}": kl for name, kl in totals.items()}, **said},
        undefined=undefined,
        tasks=tasks,
    )


def _steps(rows: SiteRows, labels: Sequence[str]) -> Array:
    """KL after each token of the answers, the mean over some replacements, [n, T]."""
    mean: Array = np.mean([rows.patched[label].steps_nats for label in labels], axis=0)
    return mean


def _curve(steps: Mapping[str, Array], bootstrap: Bootstrap) -> pd.DataFrame:
    """The table `CURVE`, up to the longest answer."""
    rows = []
    reached = ~np.isnan(steps["mapped"])
    for t in range(int(reached.sum(1).max())):
        some = reached[:, t]
        row: dict[str, object] = {"t": t + 1, "n": int(some.sum())}
        for name, kl in steps.items():
            row[f"KL_{name}"] = float(kl[some, t].mean())
            if row["n"] != 1:  # one prompt has no interval
                band = stats.mean(kl[some, t], bootstrap=bootstrap.of(some))
                row |= {f"KL_{name}_low": band.low, f"KL_{name}_high": band.high}
        rows.append(row)
    table: pd.DataFrame = pd.DataFrame(rows).reindex(columns=list(CURVE))
    return table
