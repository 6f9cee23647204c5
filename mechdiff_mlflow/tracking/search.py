"""Finding measured runs by pair, site and metric, across experiments."""

from __future__ import annotations

from dataclasses import dataclass

from mlflow.entities import Run, ViewType

from mechdiff_mlflow import foreign
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.sites import Site
from mechdiff_mlflow.tracking.lookup import all_runs
from mechdiff_mlflow.tracking.policy import SELECTION_LEAK
from mechdiff_mlflow.tracking.records import check_key
from mechdiff_mlflow.tracking.store import Store

_SETTINGS = {
    **dict.fromkeys(("solver", "family"), foreign.word),
    **{"k": foreign.rank, "alpha": foreign.scales, "split": foreign.word, "n": foreign.whole},
}
_LOWER_IS_BETTER = ("KL_", "rho", "noise_floor", "p/", "reverse/", "control/", "time/")


@dataclass(frozen=True, slots=True)
class FoundRun:
    """A patch run that measured a map.

    Args:
        run_id: To fetch or promote.
        experiment: Its name.
        pair: Its name.
        site: Where.
        settings: solver, family, k, alpha, split and n as logged.
        metric: What was asked for.
        value: Of that metric.
        low: End of its 95 % interval, if logged.
        high: The other end.
        leak: Whether something was chosen on prompts that are reported; None where nobody knows.
        prompts: Name, digest and split of each prompt set.
        started_ms: Unix time in ms.
    """

    run_id: str
    experiment: str
    pair: str
    site: str
    settings: dict[str, str]
    metric: str
    value: float
    low: float | None
    high: float | None
    leak: bool | None
    prompts: tuple[dict[str, str], ...]
    started_ms: int


def find_runs(
    store: Store,
    *,
    pair: str | None = None,
    site: Site | None = None,
    metric: str = "drop_pct",
    best: bool = False,
) -> list[FoundRun]:
    """Finished patch runs that have `metric`, the best first.

    Less is better for KL, rho and p-values, more for everything else.

    Args:
        store: Where to look, in every experiment.
        pair: Only of this pair.
        site: Only at this site.
        metric: What counts.
        best: Only the best of each pair and site.

    Raises:
        MechdiffError: No run is found; says what to try.
    """
    check_key(metric)
    where = ["tags.`mechdiff.kind` = 'patch'", "attributes.status = 'FINISHED'"]
    if pair is not None:
        where.append(f"params.pair = {_quoted(pair)}")
    if site is not None:
        where += [f"params.layer = '{site.layer}'", f"params.hook = '{site.hook}'"]
    with store.errors():
        experiments = {e.experiment_id: e.name for e in store.client.search_experiments(ViewType.ACTIVE_ONLY)}
    runs = all_runs(store, list(experiments), " and ".join(where))
    found = []
    for run in runs:
        if metric in run.data.metrics:
            try:
                found.append(_found(run, experiments, metric))
            except foreign.Malformed as error:
                foreign.left_out(f"run {run.info.run_id}", error)
    if not found:
        known = sorted(
            {key for run in runs for key in run.data.metrics if not key.startswith(("ci/", "time/"))}
        )
        remedy = f"those runs have {', '.join(known)}" if known else "run mechdiff run or sweep first"
        place = f"{pair or 'any pair'} at {site or 'any site'}"
        raise MechdiffError(f"No patch run of {place} has the metric {metric!r}; {remedy}.")
    sign = 1 if metric.startswith(_LOWER_IS_BETTER) else -1
    found.sort(key=lambda run: (sign * run.value, -run.started_ms))
    return _best_of_each(found) if best else found


def _best_of_each(found: list[FoundRun]) -> list[FoundRun]:
    first: dict[tuple[str, str], FoundRun] = {}
    for run in found:
        first.setdefault((run.pair, run.site), run)
    return list(first.values())


def _found(run: Run, experiments: dict[str, str], metric: str) -> FoundRun:
    params, metrics = run.data.params, run.data.metrics
    inputs = run.inputs.dataset_inputs if run.inputs else []
    prompts = []
    for item in inputs:
        contexts = [tag.value for tag in item.tags if tag.key == "mlflow.data.context"]
        split = contexts[0] if contexts else ""
        prompts.append({"name": item.dataset.name, "digest": item.dataset.digest, "split": split})
    site = foreign.site(params)
    for key, parse in _SETTINGS.items():
        if key in params:
            parse(params, key)
    ends = [
        foreign.number(metrics, key) if (key := f"ci/{metric}_{end}") in metrics else None
        for end in ("low", "high")
    ]
    return FoundRun(
        run_id=run.info.run_id,
        experiment=experiments.get(run.info.experiment_id, run.info.experiment_id),
        pair=foreign.word(params, "pair"),
        site=str(site),
        settings={k: params[k] for k in _SETTINGS if k in params},
        metric=metric,
        value=foreign.number(metrics, metric),
        low=ends[0],
        high=ends[1],
        leak={"true": True, "false": False}.get(run.data.tags.get(SELECTION_LEAK, "")),
        prompts=tuple(sorted(prompts, key=lambda row: (row["split"], row["name"]))),
        started_ms=run.info.start_time or 0,
    )


def _quoted(text: str) -> str:
    if "'" in text and '"' in text:
        raise MechdiffError(f"{text!r} has both kinds of quotes, which MLflow cannot search for.")
    return f'"{text}"' if "'" in text else f"'{text}'"
