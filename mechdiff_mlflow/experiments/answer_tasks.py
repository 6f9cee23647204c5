"""What a patch does to answers: what is said, how probable the right one is, and whether it is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mechdiff_mlflow.experiments.protocol import Protocol
from mechdiff_mlflow.experiments.rows import Array
from mechdiff_mlflow.experiments.workers import Workers
from mechdiff_mlflow.experiments.workers.answering import Forced, Greedy
from mechdiff_mlflow.maps.affine import AffineMap, identity_map
from mechdiff_mlflow.measures import stats
from mechdiff_mlflow.measures.bootstrap import Bootstrap, Interval
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Position, Site

MEASURES = ("answer_logprob", "logit_diff", "exact_match")
"""Σ log p of the answer's tokens, nats; at the first of them where tuned and base prefer different ones, the
logit of tuned's minus that of base's; whether what is said greedily is the answer."""


@dataclass(frozen=True, eq=False)
class TaskRecord:
    """One of `MEASURES` over the prompts that have an answer of their own."""

    measure: str
    n: int  # prompts for which it is defined
    means: Mapping[str, float]  # of base, tuned, and tuned under the patches raw, mapped and null
    recovered_pct: Interval | None  # 100·(mapped − raw)/(tuned − raw); None where there is nothing to recover


def task_records(
    prompts: PromptSet,
    site: Site,
    patches: Mapping[str, AffineMap],
    protocol: Protocol,
    workers: Workers,
    bootstrap: Bootstrap,
) -> tuple[list[TaskRecord], dict[str, list[str]]]:
    """Every measure of the prompts that have an answer, none if fewer than two have; and what is said.

    The latter are the greedy answers, up to a special token, of base, tuned, and tuned with each patch at
    work, by the column `says_…` of `per_prompt.json`; none where `_said` has none. The prompts come with
    answers as they are compared, the maps by name, `mapped` and `null`; raw is added where the widths agree.
    """
    mapped = patches["mapped"]
    if mapped.d_in == mapped.d_out:
        patches = {"raw": identity_map(mapped.d_in), **patches}
    names, maps = ("base", "tuned", *patches), tuple(patches.values())
    said = _said(prompts, site, maps, protocol, workers)
    texts: dict[str, list[str]] = {}
    readers = workers.pair.readers
    special = readers.tokenizer_for("tuned").all_special_ids
    if said is not None:
        said = _ended(said, special)
        for name, rows in zip(names, said.transpose(1, 0, 2).tolist(), strict=True):
            ids = [[token for token in row if token >= 0] for row in rows]
            texts[f"says_{name}"] = readers.texts("base" if name == "base" else "tuned", ids)
    has = np.array([prompt.answer is not None for prompt in prompts.prompts])
    if has.sum() < 2:
        return [], texts
    some, bootstrap = prompts.take(np.flatnonzero(has).tolist()), bootstrap.of(has)
    log_p = workers.whole(Forced(some, protocol.position, site, maps))["log_p"].numpy()  # [n, who, T, 3]
    values = {"answer_logprob": np.nansum(log_p[..., 0], -1), "logit_diff": _logit_diff(log_p)}
    if said is not None:
        values["exact_match"] = _exact(some, said[has], special)
    records = []
    for measure, of_all in values.items():
        defined = ~np.isnan(of_all).any(1)
        if defined.sum() < 2:
            continue
        by_name = dict(zip(names, of_all[defined].T, strict=True))
        recovered = None
        if "raw" in by_name:
            three = by_name["raw"], by_name["mapped"], by_name["tuned"]
            recovered = stats.recovered_pct(*three, bootstrap=bootstrap.of(defined))
        means = {name: float(each.mean()) for name, each in by_name.items()}
        is_defined = recovered is not None and recovered.estimate is not None
        records.append(TaskRecord(measure, int(defined.sum()), means, recovered if is_defined else None))
    return records, texts


def _logit_diff(log_p: Array) -> Array:
    """At the first token where tuned and base prefer different ones, [n, who]; NaN where they never do."""
    own = log_p[:, 1, :, 1] > log_p[:, 1, :, 2]  # tuned finds its own more probable than base's: they differ
    first = own.argmax(1)
    difference = log_p[..., 1] - log_p[..., 2]
    found: Array = np.take_along_axis(difference, first[:, None, None], axis=2)[..., 0]
    found[~own.any(1)] = np.nan
    return found


def _said(
    prompts: PromptSet, site: Site, maps: Sequence[AffineMap], protocol: Protocol, workers: Workers
) -> Array | None:
    """Greedy tokens [n, who, T] of base, tuned, and tuned with each map at work.

    None where a map cannot be at work while tokens are generated: at another position than the decision
    token, or from a base model that is not in memory beside the tuned one.
    """
    answers = prompts.answers
    assert answers is not None
    away = answers.each and workers.environment.one_at_a_time
    if protocol.position is not Position.DECISION or away:
        return None
    plain, (_, end) = replace(prompts, answers=None), workers.pair.readers.given_answers(prompts)
    base = Greedy(plain, protocol.position, "base", answers.n_tokens, end)
    tuned = replace(base, role="tuned")
    patched = replace(tuned, site=site, maps=tuple(maps), each=answers.each)
    return np.concatenate([workers.whole(task)["tokens"].numpy() for task in (base, tuned, patched)], 1)


def _ended(ids: Array, special: Sequence[int]) -> Array:
    """Tokens up to the first special one, [n, who, T], and then -1.

    A model may end its turn with another special token than its template does.
    """
    return np.where(np.logical_or.accumulate(np.isin(ids, special), axis=2), -1, ids)


def _exact(prompts: PromptSet, said: Array, special: Sequence[int]) -> Array:
    """Whether what was said, up to a special token, is the answer, as far as it is compared, [n, who]."""
    assert prompts.answers is not None
    right = np.full((len(prompts), 1, prompts.answers.n_tokens), -1)
    for i, ids in enumerate(prompts.answers.ids):
        right[i, 0, : len(ids)] = ids
    matches: Array = (said == _ended(right, special)).all(2).astype(np.float64)
    return matches
