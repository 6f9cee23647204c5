"""Records of experiments in MLflow's terms: which field is a param, metric, tag or artifact, and its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import distributions

import pandas as pd

from mechdiff_mlflow.experiments import FitRecord, PatchRecord, Study
from mechdiff_mlflow.experiments.sweep import LeastRank
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.measures.bootstrap import Interval
from mechdiff_mlflow.measures.stats import Correlation
from mechdiff_mlflow.solvers import SETTINGS
from mechdiff_mlflow.spec.pair_spec import Cell, PairSpec
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.text import text_of
from mechdiff_mlflow.tracking.content import records
from mechdiff_mlflow.tracking.content.records import ParamValue, RunRecord
from mechdiff_mlflow.tracking.content.tag_names import (
    FITTED_ON,
    PAIR_FINGERPRINT,
    PAIR_SITE,
    REPORTED,
    SELECTION,
    SELECTION_LEAK,
    pair_site,
)

ACCURACY = "accuracy/"
"""Beginning of the names of metrics that say how often the answer's first token is the most probable."""
NOT_APPLICABLE = "n/a"
"""Of a hyperparameter that the solver does not have: every run has every column."""


def fit_run(record: FitRecord, study: Study) -> RunRecord:
    """A fit as a run; the map becomes its logged model."""
    cell = record.cell
    metrics = {"alpha": cell.alpha.values[0], "n_train": record.n_train, "time/fit_s": record.seconds}
    metrics |= _present({"rho_val": record.rho, "cos_mean_val": record.cos_mean})
    return RunRecord(
        kind="fit",
        name=f"fit {_name(cell)}",
        params=params_of(cell, study) | _settings(record.map),
        metrics=metrics,
        tags=_tags(cell, study) | {"mechdiff.chosen_on_val": ", ".join(record.chosen) or "nothing"},
        datasets=_datasets(study, study.train_prompts, study.val_prompts),
        tables={"candidates.json": record.candidates} if len(record.candidates) else {},
        map=record.map,
        description=(
            f"**Asked:** a map from base to tuned activations at `{cell.site}` of `{study.pair.name}`, "
            f"α={record.asked.alpha}.\n\n**Found:** {_name(cell)}, fitted on {record.n_train} train prompts; "
            f"val chose {', '.join(record.chosen) or 'nothing'}.\n\nLoad it: "
            "`mechdiff_mlflow.load_map('runs:/<this run>')`."
        ),
    )


def patch_run(
    record: PatchRecord, study: Study, *, map_run: str | None = None, map_name: str = ""
) -> RunRecord:
    """A patch as a run, with the run that fitted its map, or what the user called the map, where known."""
    cell = record.cell
    leak = selection.sentence(record.leak)
    caveats = [leak] if leak else []
    caveats += [few] if (few := study.report_prompts.few) else []
    for fitted_on in fitted_elsewhere(record.map, study).values():
        caveats.append(f"the map was fitted on another pair, {fitted_on}")
    return RunRecord(
        kind="patch",
        name=f"patch {_name(cell)}",
        params=params_of(cell, study) | _settings(record.map) | {"split": record.split, "n": record.n},
        metrics=patch_metrics(record),
        undefined=record.undefined,
        tags=_tags(cell, study)
        | {
            "null": record.null,
            SELECTION_LEAK: "unknown" if record.leak is None else str(bool(record.leak)).lower(),
            REPORTED: study.report_prompts.digest,
            "mechdiff.map_sha256": record.map.sha256(),
        }
        | ({SELECTION: leak} if leak else {})
        | fitted_elsewhere(record.map, study)
        | ({"mechdiff.map": map_name} if map_name else {}),
        datasets=_datasets(study, *study.prompt_sets),
        tables={"per_prompt.json": record.per_prompt},
        map_run=map_run,
        description=(
            f"**Asked:** how far next-token KL falls when the tuned model's activation at `{cell.site}` is "
            "replaced by the mapped base activation instead of the raw one.\n\n"
            f"**Found:** drop {_percent(record.drop_pct)} on "
            f"{record.n} {record.split} prompts; best control {record.null}.\n\n"
            f"**Caveats:** {'; '.join(caveats) or 'none known'}."
        ),
    )


def fitted_elsewhere(map_: AffineMap, study: Study) -> dict[str, str]:
    """The tag of a patch whose map was fitted on another pair than the study's, or does not say on which."""
    fitted_on = str(map_.meta.get("fingerprint", "unknown"))
    return {} if fitted_on == study.pair.fingerprint else {FITTED_ON: fitted_on}


def cell_run(fit: FitRecord, patch: PatchRecord, study: Study) -> RunRecord:
    """A sweep's cell as one run: what was measured, with the map that it was measured on."""
    fitted = fit_run(fit, study)
    return replace(
        patch_run(patch, study),
        name=_name(patch.cell),
        map=fit.map,
        is_model=False,
        datasets=_datasets(study, *study.prompt_sets),
        tables={"per_prompt.json": patch.per_prompt, **fitted.tables},
    )


def headline(patch: PatchRecord) -> RunRecord:
    """What a parent of one patch shows, so that parents compare without being unfolded."""
    shown = ("KL_raw", "KL_mapped", "drop_pct", "skill_pct", "noise_floor")
    metrics = {k: v for k, v in patch_metrics(patch).items() if k in shown or k.startswith(("ci/", ACCURACY))}
    return RunRecord(
        kind="run",
        name=_name(patch.cell),
        metrics=metrics,
        undefined=patch.undefined,
        tags={"mechdiff.site": str(patch.cell.site)},
        description=f"{site_and_drop(patch)}; null {patch.null}",
        headline=f"{site_and_drop(patch)}, skill {_percent(patch.skill_pct)}.",
    )


def least_ranks_table(found: Sequence[LeastRank]) -> pd.DataFrame:
    """One row a question (site, α, target), ranks as numbers, the full one as the width; empty if none."""
    columns = ("site", "solver", "family", "alpha", "target_pct", "width", "k", "low", "high", "p_reached")
    rows = [
        (
            *(str(least.site), least.solver, least.family, least.alpha, least.found.target_pct, least.width),
            *(least.found.k, least.found.low, least.found.high, least.found.p_reached),
            least.found.conservative_k,
        )
        for least in found
    ]
    table: pd.DataFrame = pd.DataFrame(rows, columns=[*columns, "conservative_k"])
    return table


def sweep_headline(patches: Sequence[PatchRecord], found: Sequence[LeastRank]) -> RunRecord:
    """What a sweep's parent shows: drop_pct over k for each site and α, the least ranks, the best cell."""
    curves: dict[str, dict[int, float]] = {}
    best: tuple[float, PatchRecord] | None = None
    for patch in patches:
        drop = None if patch.drop_pct is None else patch.drop_pct.estimate
        if drop is not None:
            k = patch.cell.rank.k or min(patch.map.d_in, patch.map.d_out)
            curves.setdefault(_curve(patch.cell), {})[k] = drop
            best = max(best or (drop, patch), (drop, patch), key=lambda pair: pair[0])
    metrics = accuracies(*patches[:1], of=("base", "tuned"))
    metrics |= {} if best is None else {"best/drop_pct": best[0], "best/KL_mapped": best[1].kl_mapped}
    metrics |= {
        f"min_k/{least.site.slug} alpha {text_of(least.alpha)}": float(least.found.k)
        for least in found
        if least.found.k is not None
    }
    return RunRecord(
        kind="sweep",
        name="sweep",
        metrics=metrics,
        stepped_metrics={f"drop_pct/{name}": curve for name, curve in curves.items()},
        tags={} if best is None else {"mechdiff.best": _name(best[1].cell)},
        tables={"summary.json": summary_table(patches), "least_ranks.json": least_ranks_table(found)},
        description="drop_pct is drawn over k (step = k; full counts as the width).\n\n"
        + "\n".join(f"- {least}" for least in found),
        headline="; ".join(map(str, found[:3])) or f"{len(patches)} cells, no drop defined.",
    )


def summary_table(patches: Sequence[PatchRecord]) -> pd.DataFrame:
    """One row a patch, with the numbers as MLflow holds them."""
    table: pd.DataFrame = pd.DataFrame(
        [
            {
                "site": str(patch.cell.site),
                "solver": patch.cell.solver,
                "family": patch.cell.family,
                "k": str(patch.cell.rank),
                "alpha": patch.map.alpha,
                "n": patch.n,
                "null": patch.null,
                **patch_metrics(patch),
            }
            for patch in patches
        ]
    )
    return table


def patch_metrics(record: PatchRecord) -> dict[str, float]:
    """The numbers of a patch by the names that users know; `rank` is k as a number, full being the width."""
    plain = {
        "rank": record.cell.rank.k or min(record.map.d_in, record.map.d_out),
        "KL_raw": record.kl_raw,
        "KL_mapped": record.kl_mapped,
        "noise_floor": record.noise_floor,
        "p/raw": record.p_raw,
        "p/null": record.p_null,
        "p/holm": record.p_holm,
        "p/permutation": record.p_permutation,
        "rho": record.rho,
        "cos_mean": record.cos_mean,
        "explained_variance": record.explained_variance,
        "cka": record.cka,
        "top1_agreement": record.top1_agreement,
        "delta_logprob": record.delta_logprob,
        "reverse/KL_raw": record.kl_raw_reverse,
        "reverse/KL_mapped": record.kl_mapped_reverse,
        "time/score_s": record.seconds,
        **accuracies(record),
    }
    controls = {f"control/{name}": kl for name, kl in record.controls.items()}
    return (
        _present(plain)
        | _interval("drop_pct", record.drop_pct)
        | _interval("skill_pct", record.skill_pct)
        | _interval("KL_difference", record.kl_difference)
        | _correlation(record.cos_vs_kl)
        | controls
    )


def accuracies(
    *records: PatchRecord, of: Sequence[str] = ("base", "tuned", "raw", "mapped")
) -> dict[str, float]:
    """How often the first token of the answer is the most probable one, where answers are known."""
    return {f"{ACCURACY}{name}": r.accuracy[name] for r in records for name in of if name in r.accuracy}


def site_and_drop(patch: PatchRecord) -> str:
    """A patch in a few words: where, how, and its drop."""
    return f"{_name(patch.cell)}: drop {_percent(patch.drop_pct)} on {patch.n} {patch.split} prompts"


def params_of(cell: Cell, study: Study) -> dict[str, ParamValue]:
    """What identifies a cell of a study; the columns that people filter and compare by."""
    pair, protocol = study.pair, study.protocol
    return {
        "pair": pair.name,
        "layer": cell.site.layer,
        "hook": str(cell.site.hook),
        "solver": cell.solver,
        "family": cell.family,
        "k": str(cell.rank),
        "alpha": str(cell.alpha),
        "position": str(protocol.position),
        "split": protocol.split,
        "n": len(study.report_prompts),
        **({"n_groups": study.report_prompts.n_groups} if study.report_prompts.groups else {}),
        "n_train": len(study.train_prompts),
        "permutations": protocol.permutations,
        "seed": protocol.seed,
        "dtype": pair.spec.dtype,
        "base_revision": pair.base.revision,
        "tuned_revision": pair.tuned.revision,
    }


def _settings(map_: AffineMap) -> dict[str, ParamValue]:
    """How a map was made, in the same columns for every solver."""
    return {s.name: _plain(map_.meta.get(s.name, NOT_APPLICABLE)) for s in SETTINGS}


def _curve(cell: Cell) -> str:
    return f"{cell.site.slug} alpha {cell.alpha}"


def _percent(interval: Interval | None) -> str:
    if interval is None or interval.estimate is None:
        return "n/a (below noise floor)"
    bounds = "" if interval.low is None else f" [{interval.low:.1f}, {interval.high:.1f}]"
    return f"{interval.estimate:.1f} %{bounds}"


def _name(cell: Cell) -> str:
    return f"{cell.site} k={cell.rank} α={cell.alpha} {cell.solver}"  # what differs comes first


def _tags(cell: Cell, study: Study) -> dict[str, str]:
    return {
        "mechdiff.site": str(cell.site),
        PAIR_SITE: pair_site(study.pair.name, cell.site),
        PAIR_FINGERPRINT: study.pair.fingerprint,
        "mechdiff.engine": study.engine_mode,
        "mechdiff.trust_remote_code": str(study.pair.spec.trust_remote_code).lower(),
    }


def _datasets(study: Study, *sets: PromptSet) -> tuple[records.Dataset, ...]:
    spec = study.pair.spec
    return tuple(
        records.Dataset(
            name=f"{spec.name}-{prompts.split}",
            split=prompts.split,
            digest=prompts.digest,
            n=len(prompts),
            columns=tuple(
                name
                for name in ("text", "group", "answer")
                if name == "text" or any(getattr(prompt, name) is not None for prompt in prompts.prompts)
            ),
            source=spec.prompt_source(prompts.split),
        )
        for prompts in sets
    )


def setting(spec: PairSpec) -> dict[str, str]:
    """Files of a top run that hold for all below it: the pair's spec, and what is installed."""
    return {"spec.yaml": spec.to_yaml(), "environment.txt": _environment()}


@lru_cache(maxsize=1)
def _environment() -> str:
    """What is installed; to look takes as long as all else of a run, and it does not change meanwhile."""
    installed = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]})
    return "\n".join(installed) + "\n"


def _interval(key: str, interval: Interval | None) -> dict[str, float]:
    if interval is None:
        return {}
    ends = _present({f"ci/{key}_low": interval.low, f"ci/{key}_high": interval.high})
    return ({} if key == "KL_difference" else _present({key: interval.estimate})) | ends


def _correlation(found: Correlation | None) -> dict[str, float]:
    """Of the cosine with the decrease of KL; `/` would make a group within `ci/`."""
    if found is None:
        return {}
    metrics: dict[str, float | None] = {}
    for name, interval in (("pearson", found.pearson), ("spearman", found.spearman)):
        metrics |= {f"corr/{name}": interval.estimate}
        metrics |= {f"ci/corr_{name}_low": interval.low, f"ci/corr_{name}_high": interval.high}
    return _present(metrics)


def _present(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in values.items() if value is not None}


def _plain(value: object) -> ParamValue:
    return value if isinstance(value, str | int | float) else str(value)
