"""Numbers and claims as sentences; a claim is made only where its interval allows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mechdiff_mlflow.experiments.options import MIN_EFFECT_NATS
from mechdiff_mlflow.experiments.sweep import rank_text
from mechdiff_mlflow.measures.bootstrap import Interval
from mechdiff_mlflow.report.evidence import Measured
from mechdiff_mlflow.spec.pair_spec import Alpha
from mechdiff_mlflow.text import markdown, text_of

WHERE = {
    "resid_pre": "what enters decoder block {layer}",
    "attn_out": "what the attention of decoder block {layer} adds to the residual stream",
    "mlp_out": "what the MLP of decoder block {layer} adds to the residual stream",
    "resid_post": "what leaves decoder block {layer}",
}
"""Meaning of each hook."""


_VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def negligible(patch: Measured, min_effect_nats: float) -> bool:
    """Whether the raw patch hardly changes the next token, so that a drop of it says little."""
    return patch.kl_raw is not None and patch.kl_raw < min_effect_nats


def number(value: float | None, digits: int = 4) -> str:
    """A number to some significant digits."""
    return "n/a" if value is None else f"{value:.{digits}g}"


def percent(interval: Interval | None, form: str = ".1f") -> str:
    """`34.1 [28.0, 40.2]`, or n/a; `form` is of each number."""
    if interval is None or interval.estimate is None:
        return "n/a"
    few = " (too few prompts for an interval)"
    bounds = few if interval.low is None else f" [{interval.low:{form}}, {interval.high:{form}}]"
    return f"{interval.estimate:{form}}{bounds}"


def token(text: object, limit: int = 40) -> str:
    """A token, or the words of a model, between backticks of Markdown, their whitespace visible."""
    return markdown(str(text).translate(_VISIBLE), limit) or "∅"


def _ends(interval: Interval) -> str:
    return "" if interval.low is None else f"[{interval.low:.1f}, {interval.high:.1f}]"


def above(interval: Interval | None, limit: float = 0.0) -> bool:
    """Whether the whole interval lies above `limit`."""
    return interval is not None and interval.low is not None and interval.low > limit


def below(interval: Interval | None, limit: float = 0.0) -> bool:
    """Whether the whole interval lies below `limit`."""
    return interval is not None and interval.high is not None and interval.high < limit


BLIND = "which knows nothing of the pairing"
CONTROL = {"wrong_layer": "the map of another layer, fitted on the true pairs of that layer"}
"""Knowledge of controls that are not blind to which base activation goes with which tuned one."""


def against(interval: Interval, what: str, name: str) -> str:
    """`better than …: 75.0 % less KL, a **skill of …**`, or worse, or not told apart, by the interval."""
    estimate, bounds = interval.estimate or 0.0, _ends(interval)
    bounds = f" (95 %: {bounds[1:-1].replace(', ', ' to ')})" if bounds else ", without an interval"
    said = f"{abs(estimate):.1f} % {'less' if estimate >= 0 else 'more'} KL, a **{name} of {estimate:.1f} %**"
    if above(interval):
        return f"better than {what}: {said}{bounds}"
    if below(interval):
        return f"**worse** than {what}: {said}{bounds}"
    return f"not to be told apart from {what}: {said}{bounds}"


def plain(sentence: str) -> str:
    """A sentence without the marks of Markdown."""
    return sentence.replace("`", "").replace("**", "")


def transport(patch: Measured, min_effect_nats: float = MIN_EFFECT_NATS) -> str:
    """One sentence on a site: how far KL falls, and whether that beats the best control."""
    what = f"`{patch.site}` (α={text_of(patch.alpha)}, k={patch.rank})"
    if patch.drop is None and patch.kl_raw is None and patch.skill is not None:  # of different widths
        return f"{what} is {against(patch.skill, f'the best control, `{patch.null}`', 'skill')}."
    if patch.drop is None:
        return f"{what}: no drop is defined; {patch.undefined.get('drop_pct', 'KL_raw was not measured')}."
    drop = f"{percent(patch.drop)} % KL drop"
    if below(patch.drop):
        return f"{what} is **not** linearly transportable by these maps: KL rises ({drop})."
    if not above(patch.drop):
        return f"{what}: {drop}; the interval includes 0, so there is no evidence of transport."
    if negligible(patch, min_effect_nats):
        return (
            f"{what}: {drop}, but of only {number(patch.kl_raw, 2)} nats: a raw patch hardly changes the "
            "next token here, so the drop says little."
        )
    sentence = f"{what} yields **{patch.drop.estimate:.1f} %** KL drop {_ends(patch.drop)}"
    if patch.skill is None:
        return (
            f"{sentence}; no skill is defined, {patch.undefined.get('skill_pct', 'for want of a control')}."
        )
    skill = f"skill {percent(patch.skill)} % over the best control, `{patch.null}`"
    if patch.p_permutation is not None:
        skill += f", permutation p={patch.p_permutation:.2g}"
    if above(patch.skill):
        return f"{sentence}, {skill}."
    verdict = "does better" if below(patch.skill) else "may do as well"
    return f"{sentence}, but the control {verdict} ({skill}), so the drop is no evidence of transport."


def scale(patch: Measured) -> str | None:
    """One sentence on α where it was chosen among several; None where it was given."""
    tried = Alpha.parse(patch.asked_alpha).values if patch.asked_alpha else ()
    if len(tried) < 2:
        return None
    edge = ""
    if patch.alpha in (min(tried), max(tried)):
        edge = " It is at the edge of the grid, so the best may lie beyond."
    if patch.alpha == 1:
        return f"At `{patch.site}` val chose α=1: no change of scale.{edge}"
    way = "smaller" if patch.alpha < 1 else "larger"
    return (
        f"At `{patch.site}` val chose α={text_of(patch.alpha)} of {len(tried)} from {text_of(tried[0])} to "
        f"{text_of(tried[-1])}: the mapped vector, mean included, works best {way} than the fit has it.{edge}"
    )


def low_rank(
    row: Mapping[str, Any],
    patches: Sequence[Measured],
    low_rank_share: float,
    min_effect_nats: float = MIN_EFFECT_NATS,
) -> str:
    """One sentence on a least rank, a row of `least_ranks.json`; it is low up to a share of the width.

    Among `patches` is the one at the conservative rank, whose skill counts too.
    """
    width, alpha = int(row["width"]), float(row["alpha"])
    k, ends = ranks(row)
    where = f"On `{row['site']}` (α={text_of(alpha)}, {row['family']} family)"
    what = f"{where} the {text_of(row['target_pct'])} % target"
    share = f"{100 * row['p_reached']:.0f} % of resamples"
    if k == "not reached":
        return f"{what} is **not reached** at any tested rank (reached in {share})."
    sure = rank(row["conservative_k"], width)
    text = (
        f"{what} is reached with **k={k}** of {width} directions (interval {ends}, "
        f"reached in {share}; conservative k {sure})"
    )
    if sure == "not reached":
        return f"{text}: not sure enough to call it control."
    if float(row["conservative_k"]) > low_rank_share * width:
        return f"{text}: that is not k ≪ d."
    cell = (row["site"], row["solver"], row["family"], alpha, sure)
    at = [p for p in patches if (str(p.site), p.solver, p.family, p.alpha, p.rank) == cell]
    if any(negligible(patch, min_effect_nats) for patch in at):
        return f"{text}, but of a KL_raw of only {number(at[0].kl_raw, 2)} nats, so it says little."
    if not any(above(patch.skill) for patch in at):
        return f"{text}, but a control without any rank does as well, so this is no evidence of control."
    return f"{text}: this supports **low-rank control** at that target."


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table by column."""
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def rank(value: object, width: int) -> str:
    """A least rank of a table as users write it."""
    return rank_text(None if value is None else float(str(value)), width)


def ranks(row: Mapping[str, Any], suffix: str = "") -> tuple[str, str]:
    """A least rank of `least_ranks.json` and its interval."""
    width = int(row[f"width{suffix}"])
    k, low, high = (rank(row[f"{key}{suffix}"], width) for key in ("k", "low", "high"))
    return k, f"[{low}, {high}]"
