"""Whole answers in a report: the sentence on a site, the table, and KL over the tokens of the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from mechdiff_mlflow.experiments.answers import CURVE
from mechdiff_mlflow.report import wording
from mechdiff_mlflow.report.document import Block, Grid
from mechdiff_mlflow.report.evidence import Measured
from mechdiff_mlflow.report.figures import Curve, Figure, curves
from mechdiff_mlflow.report.profiles import MOST_SITES

WHO = ("base", "tuned", "raw", "mapped")
"""Whose words are shown: of base, of tuned, and of tuned patched."""
MOST_TICKS = 16
"""Tokens that a figure names one by one."""


def sentence(patch: Measured) -> str:
    """The drop of whole answers beside the first token's, and who says the right one; else empty."""
    answer, asked = patch.answer, patch.conditions
    if answer is None:
        return ""
    said = (
        f"Over whole answers, of up to {asked.answer_tokens} tokens and patched at {asked.patch_at}, the "
        f"drop at `{patch.site}` is {wording.percent(answer.drop)} %; of their first token it is "
        f"{wording.percent(patch.drop)} %."
    )
    right = [f"{name} {100 * answer.exact_match[name]:.1f} %" for name in WHO if name in answer.exact_match]
    if not right:
        return said
    recovered = answer.recovered["exact_match"]
    rest = "nothing to recover" if recovered is None else f"recovered {wording.percent(recovered)} %"
    return f"{said} Exact match: {', '.join(right)}; {rest}."


def blocks(patches: Sequence[Measured], table: Callable[[str, str], pd.DataFrame | None]) -> list[Block]:
    """The table of whole answers and a figure a site; `table` gives a run's table at a path, where it is."""
    rows, figures = [], list[Block]()
    for patch in patches:
        if (answer := patch.answer) is None:
            continue
        exact = {name: wording.number(answer.exact_match.get(name), 3) for name in WHO}
        rows.append(
            {
                "site": str(patch.site),
                "tokens": f"{patch.conditions.answer_tokens} at {patch.conditions.patch_at}",
                "KL_answer_raw": wording.number(answer.kl_raw),
                "KL_answer_mapped": wording.number(answer.kl_mapped),
                "drop %, first token": wording.percent(patch.drop),
                "drop %, answer": wording.percent(answer.drop),
                **{f"exact match, {name}": share for name, share in exact.items()},
                "recovered %": wording.percent(answer.recovered["exact_match"]),
                "recovered %, log p": wording.percent(answer.recovered["answer_logprob"]),
                "run": f"`{patch.run_id}`",
            }
        )
        curve = table(patch.run_id, "answer_curve.json") if len(figures) < MOST_SITES else None
        if curve is not None and {*CURVE} <= {*curve.columns} and len(curve):
            figures.append(_figure(patch, curve))
    about = (
        "Whole answers: KL is summed over the tokens of an answer, nats an answer; recovered is "
        "100·(mapped − raw)/(tuned − raw) of exact match, and of the log-probability of the right answer."
    )
    return [about, Grid(rows), *figures] if rows else []


def _figure(patch: Measured, curve: pd.DataFrame) -> Figure:
    numbers = curve[list(CURVE)].apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
    lines = []
    for name in ("raw", "mapped", "null"):
        columns = [numbers[f"KL_{name}{end}"] for end in ("", "_low", "_high")]
        if columns[0].notna().any():
            lines.append(Curve(name, *(column.tolist() for column in (numbers["t"], *columns))))
    title = f"{patch.site}: mean KL of each token of the answer"
    named = {} if len(numbers) > MOST_TICKS else {float(t): str(t) for t in range(1, len(numbers) + 1)}
    name = f"answers-{patch.site.slug}"
    return curves(name, title, lines, x_label="token of the answer", y_label="KL, nats", ticks=named)
