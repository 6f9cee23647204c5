"""Two fine-tunes side by side, from their runs: where, how transportable, how low-rank, and how sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.measures import stats
from mechdiff_mlflow.measures.bootstrap import Bootstrap, Interval
from mechdiff_mlflow.report import wording
from mechdiff_mlflow.report.document import Block, Document, Grid, bullets
from mechdiff_mlflow.report.evidence import Evidence, Measured
from mechdiff_mlflow.report.profiles import where
from mechdiff_mlflow.text import text_of

PerPrompt = Mapping[str, pd.DataFrame]
"""The table `per_prompt.json` of runs, by run id."""


@dataclass(frozen=True, slots=True)
class Match:
    """The same cell of two pairs, or what each pair is quoted for at a site."""

    what: str  # site and how the two were chosen
    first: Measured
    second: Measured


def matches(first: Evidence, second: Evidence) -> list[Match]:
    """Every cell that both measured on one split and position, then quoted maps; a MechdiffError if none."""

    def key(patch: Measured) -> tuple[object, ...]:
        how = (patch.solver, patch.family, patch.rank, patch.alpha)
        return (patch.site, *how, patch.conditions.split, patch.conditions.position)

    theirs = [patch for patch in second.patches if patch.source != "atlas"]
    others = {key(patch): patch for patch in theirs}
    alike = {(key(patch), _compared(patch)): patch for patch in theirs}
    found = [
        Match(
            f"{p.site} {p.solver} {p.family} k={p.rank} α={text_of(p.alpha)}",
            p,
            alike.get((key(p), _compared(p)), others[key(p)]),
        )
        for p in first.patches
        if p.source != "atlas" and key(p) in others
    ]
    quoted = {p.site: p for p in second.quoted() if p.picked_among == 1}
    for one in first.quoted():
        other = quoted.get(one.site)
        if one.picked_among == 1 and other is not None and key(one) != key(other):
            this, that = (f"α={text_of(p.alpha)}, k={p.rank}" for p in (one, other))
            found.append(Match(f"{one.site}, each pair's own map ({this} against {that})", one, other))
    if not found:
        raise MechdiffError(
            f"Pairs {first.pair!r} and {second.pair!r} have no patched cell in common; run mechdiff sweep "
            "with the same --sites, --ranks and --alphas on both."
        )
    return found


def needed_runs(found: Sequence[Match]) -> set[str]:
    """The runs whose per-prompt tables the comparison resamples."""
    return {patch.run_id for match in found for patch in (match.first, match.second)}


def difference(match: Match, tables: PerPrompt, *, seed: int, answers: bool = False) -> Interval | None:
    """drop_pct of the first minus the second, percentage points; None where either is undefined.

    With `answers` it is drop_answer_pct, None also where the two compared other tokens.
    """
    both = (match.first, match.second)
    if any((_answer_drop(patch) if answers else patch.drop) is None for patch in both):
        return None
    if answers and len(set(map(_compared, both))) > 1:
        return None
    ours, theirs = (tables[patch.run_id] for patch in both)
    raw, mapped = (f"KL_{'answer_' if answers else ''}{name}" for name in ("raw", "mapped"))
    return stats.drop_difference(
        (ours[raw], ours[mapped]),
        (theirs[raw], theirs[mapped]),
        bootstrap=Bootstrap(seed=seed),
        groups=(tuple(ours.get("group", ())), tuple(theirs.get("group", ()))),
    )


def _compared(patch: Measured) -> tuple[int, str]:
    """Which tokens of an answer were compared, and which were patched."""
    return patch.conditions.answer_tokens, patch.conditions.patch_at


def _answer_drop(patch: Measured) -> Interval | None:
    return None if patch.answer is None else patch.answer.drop


def verdict(match: Match, interval: Interval | None, first: str, second: str, min_effect_nats: float) -> str:
    """Say which pair drops further, or that there is no evidence."""
    for patch, pair in ((match.first, first), (match.second, second)):
        if wording.negligible(patch, min_effect_nats):
            return f"says little: KL_raw of {pair} is negligible"
    if interval is None or interval.low is None:
        return "n/a"
    if wording.above(interval) or wording.below(interval):
        ahead, pair = (match.first, first) if wording.above(interval) else (match.second, second)
        return f"{pair} drops further" if wording.above(ahead.drop) else f"{pair} does less harm"
    return "no evidence of a difference"


def comparison(
    first: Evidence, second: Evidence, tables: PerPrompt, *, seed: int, min_effect_nats: float
) -> Document:
    """The comparison of two pairs as a document, from the per-prompt tables of `needed_runs`."""
    a, b = first.pair, second.pair
    blocks: list[Block] = [
        (
            f"Differences are drop_pct of `{a}` minus `{b}` in percentage points, with 95 % intervals of a "
            "bootstrap that draws each pair's prompts by themselves. Where an interval includes 0, there is "
            "no evidence of a difference."
        ),
        "## Where",
        bullets([_where(first, min_effect_nats), _where(second, min_effect_nats)]),
        "## How transportable",
        _transport_table(first, second, tables, seed, min_effect_nats),
        "## How low-rank",
        _ranks(first, second, min_effect_nats),
        "## Caveats",
        bullets(
            [
                "Intervals are per row, not corrected for the number of rows.",
                f"KL_raw below {min_effect_nats:g} nats is negligible: no behaviour hangs on it.",
                "KL_raw differs between the pairs, so equal drops in percent are not equal drops in nats.",
                "Intervals make room for prompts of another kind, but only for drops of 0 there.",
            ]
        ),
    ]
    return Document(f"{a} against {b}", blocks)


def _where(evidence: Evidence, min_effect_nats: float) -> str:
    if evidence.atlas is None:
        return f"`{evidence.pair}`: not measured; run mechdiff atlas --pair {evidence.pair}."
    first, *_, last = where(evidence.atlas, min_effect_nats)
    return f"`{evidence.pair}`: {first} {last}"


def _transport_table(
    first: Evidence, second: Evidence, tables: PerPrompt, seed: int, min_effect_nats: float
) -> Grid:
    a, b = first.pair, second.pair
    rows = []
    found = matches(first, second)
    whole = any(match.first.answer and match.second.answer for match in found)
    for match in found:
        of_answers = {
            "difference of answers, points": difference(match, tables, seed=seed, answers=True),
            f"drop % of answers {a}": _answer_drop(match.first),
            f"drop % of answers {b}": _answer_drop(match.second),
        }
        one, other, gap = match.first, match.second, difference(match, tables, seed=seed)
        rows.append(
            {
                "cell": match.what,
                "difference, points": wording.percent(gap),
                "verdict": verdict(match, gap, a, b, min_effect_nats),
                f"KL_raw {a}": wording.number(one.kl_raw),
                f"KL_raw {b}": wording.number(other.kl_raw),
                f"drop % {a}": wording.percent(one.drop),
                f"drop % {b}": wording.percent(other.drop),
                **({head: wording.percent(drop) for head, drop in of_answers.items()} if whole else {}),
                f"skill % {a}": wording.percent(one.skill),
                f"skill % {b}": wording.percent(other.skill),
                f"run {a}": f"`{one.run_id}`",
                f"run {b}": f"`{other.run_id}`",
            }
        )
    return Grid(rows)


def _ranks(first: Evidence, second: Evidence, min_effect_nats: float) -> Block:
    keys = ["site", "solver", "family", "alpha", "target_pct"]
    if not len(first.least_ranks) or not len(second.least_ranks):
        return "Not measured on both; run mechdiff sweep on both."
    both = first.least_ranks.merge(second.least_ranks, on=keys, suffixes=("_a", "_b"))
    if not len(both):
        return "The sweeps of the two have no site, α and target in common."
    rows = []
    for row in wording.rows_of(both):
        says = "the intervals are disjoint" if _disjoint(row) else "no evidence of a difference"
        for evidence in (first, second):
            at = [p for p in evidence.patches if (str(p.site), p.alpha) == (row["site"], row["alpha"])]
            if any(wording.negligible(patch, min_effect_nats) for patch in at):
                says = f"says little: KL_raw of {evidence.pair} is negligible"
        rows.append(
            {
                "site": str(row["site"]),
                "family": str(row["family"]),
                "α": text_of(row["alpha"]),
                "target %": text_of(row["target_pct"]),
                f"min k {first.pair}": " ".join(wording.ranks(row, "_a")),
                f"min k {second.pair}": " ".join(wording.ranks(row, "_b")),
                "verdict": says,
            }
        )
    return Grid(rows)


def _disjoint(row: Mapping[str, Any]) -> bool:
    """Whether the intervals of two least ranks do not touch; not reached is above every rank."""

    def end(key: str) -> float:
        value = row[key]
        return float("inf") if value is None or value != value else float(str(value))

    return end("high_a") < end("low_b") or end("high_b") < end("low_a")
