"""What the top run of a report, atlas, profile or comparison holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from mechdiff_mlflow.experiments import PatchRecord
from mechdiff_mlflow.experiments.adapting import AdapterRecord
from mechdiff_mlflow.experiments.atlas import AtlasRecord
from mechdiff_mlflow.experiments.steering import Steered
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.report.adapter import headline
from mechdiff_mlflow.report.profiles import effects
from mechdiff_mlflow.tracking.content import fields
from mechdiff_mlflow.tracking.content.records import ParamValue, RunRecord
from mechdiff_mlflow.tracking.content.tag_names import PAIR_FINGERPRINT


def report_run(
    kind: str, title: str, out: Path, written: Sequence[Path], caveats: Sequence[str]
) -> RunRecord:
    """The files `written` for a report that was asked for as `out`; `kind` is `report` or `compare`."""
    # The Markdown names the pictures by their folder beside it.
    files = {path.relative_to(out.parent).as_posix(): path for path in written}
    return RunRecord(
        kind=kind,
        name=kind,
        files=files,
        description=f"**{title}**: open `{out.stem}.html` under Artifacts.\n\n"
        + "\n".join(f"- {caveat}" for caveat in caveats),
        headline=f"{title}: `{out.stem}.html` under Artifacts.",
    )


def report_pass_run(patches: Sequence[PatchRecord]) -> RunRecord:
    """A report pass's table, one row a winner."""
    rows = [f"- {fields.site_and_drop(patch)}" for patch in patches]
    return RunRecord(
        kind="report_pass",
        name="report pass",
        tables={"summary.json": fields.summary_table(patches)},
        description="Registered winners, measured again with the α of their versions.\n\n" + "\n".join(rows),
        headline="; ".join(fields.site_and_drop(patch) for patch in patches[:3]),
    )


def atlas_run(
    record: AtlasRecord, sentence: str, files: Mapping[str, Path], min_effect_nats: float
) -> RunRecord:
    """An atlas's table, figures by artifact path, and each hook's curves over layers (step = layer).

    MLflow's tables show the last value of a curve: one step after the last layer stand the numbers of the
    hook's site with the largest KL_raw.
    """
    table = record.table
    _, found = effects(table, min_effect_nats)
    curves: dict[str, dict[int, float]] = {}
    most = table.assign(step=table["layer"].max() + 1).sort_values("KL_raw").groupby("hook").tail(1)
    steps = pd.concat([table.assign(step=table["layer"]), most])
    for key in ("KL_raw", "drop_pct", "skill_pct", "rho"):
        for hook, rows in steps.groupby("hook"):
            curves[f"{key}/{hook}"] = _curve(rows, "step", key)
    metrics = {"n_sites": float(len(table)), "n_above_floor": float(table["above_floor"].sum())}
    metrics |= {"n_with_effect": float(len(found))}
    metrics |= fields.accuracies(*list(record.patches.values())[:1], of=("base", "tuned"))
    for key in ("drop_pct", "skill_pct"):  # of places with an effect: 99 % of nothing is not the best
        if found[key].notna().any():
            metrics[f"best/{key}"] = float(found[key].max())
    return RunRecord(
        kind="atlas",
        name="atlas",
        metrics=metrics,
        stepped_metrics=curves,
        tables={"atlas.json": table},
        files=files,
        description="\n\n".join(
            [
                *sentence.splitlines(),
                f"Curves are over layers; step {table['layer'].max() + 1}, whose values tables show, "
                "repeats the layer with the largest KL_raw.",
                "Heatmaps: `figures.html` under Artifacts. One run below for each site above the noise "
                "floor; only promoted sites keep their map, others refit with `mechdiff run`.",
            ]
        ),
        headline=sentence.partition("\n")[0],
    )


def layers_run(table: pd.DataFrame, sentence: str, files: Mapping[str, Path]) -> RunRecord:
    """A layer profile: its table, its columns as curves over layers (step = layer), and figures."""
    return RunRecord(
        kind="layers",
        name="layers",
        stepped_metrics={
            key: _curve(table, "layer", key) for key in ("cka", "KL_tuned_from_base", "KL_base_from_tuned")
        },
        tables={"layers.json": table},
        files=files,
        description=sentence,
        headline=sentence.partition("\n")[0],
    )


def heads_run(table: pd.DataFrame, sentence: str, files: Mapping[str, Path]) -> RunRecord:
    """Heads of one layer; coverage is a curve over the number of heads (step = size)."""
    curves = {
        f"coverage/{choice}": _curve(table[table["choice"] == choice], "size", "coverage")
        for choice in ("greedy", "random")
    }
    return RunRecord(
        kind="heads",
        name="heads",
        metrics={"KL_all": float(table["KL_all"].iloc[0]), "n_heads": float(table["n_heads"].iloc[0])},
        stepped_metrics=curves,
        tags={"mechdiff.site": str(table["site"].iloc[0])},
        tables={"heads.json": table},
        files=files,
        description=sentence,
        headline=sentence.partition("\n")[0],
    )


def steer_run(rows: Sequence[Steered], pair: Pair, params: Mapping[str, ParamValue]) -> RunRecord:
    """Continuations with a map at work, one row a prompt."""
    return RunRecord(
        kind="steer",
        name=f"steer {params['site']} α={params['alpha']}",
        params=params,
        tags={PAIR_FINGERPRINT: pair.fingerprint},
        tables={"continuations.json": pd.DataFrame([dataclasses.asdict(row) for row in rows])},
        description=f"Greedy continuations of {len(rows)} prompts: `continuations.json` under Artifacts.",
    )


def adapter_run(
    record: AdapterRecord, folder: Path, pair: Pair, params: Mapping[str, ParamValue]
) -> RunRecord:
    """An adapter made from a map: how far it goes, and the files."""
    metrics = {}
    for name, found in record.closeness.items():
        metrics[f"KL/{name}"] = found.kl.estimate
        metrics[f"closer_pct/{name}"] = found.closer_pct.estimate
    return RunRecord(
        kind="adapter",
        name=f"adapter {params['site']} α={params['alpha']}",
        params={**params, "form": str(record.form), "split": record.split, "n": record.n},
        metrics={key: value for key, value in metrics.items() if value is not None},
        tags={PAIR_FINGERPRINT: pair.fingerprint},
        files={"adapter": folder},
        description=headline(record),
        headline=headline(record),
    )


def _curve(table: pd.DataFrame, step: str, key: str) -> dict[int, float]:
    rows = table.dropna(subset=[key])
    return {int(at): float(value) for at, value in zip(rows[step], rows[key], strict=True)}
