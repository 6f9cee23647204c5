"""What may be promoted: a map that a run has measured, where it is, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from mlflow.entities import Metric, Run

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.content.names import registered_name
from mechdiff_mlflow.tracking.content.tag_names import MAP_RUN_TAG, REPORTED, SELECTION_LEAK
from mechdiff_mlflow.tracking.flavour import LoggedMap
from mechdiff_mlflow.tracking.runs.lookup import each_run
from mechdiff_mlflow.tracking.runs.tracker import OpenRun
from mechdiff_mlflow.tracking.store.store import Store

_FEW = 10
_METRICS = ("KL_raw", "KL_mapped", "drop_pct", "skill_pct", "noise_floor", "rho", "top1_agreement")


@dataclass(frozen=True, slots=True)
class Measured:
    """A map, where it is, and the run that vouches for it; `is_new` if this process has just logged it."""

    logged: LoggedMap
    the_map: AffineMap
    run: Run
    facts: Mapping[str, str]
    is_new: bool


def measured_in(store: Store, run_id: str, here: OpenRun | None, read: AffineMap | None) -> Measured:
    """What run `run_id` measured, or fitted if at most one patch measured that; see `promote`.

    Raises:
        MechdiffError: The run is not FINISHED, has no map or several, or its files are not what was logged.
    """
    run, is_new = _finished(store, run_id, here)
    if (fit_id := run.data.tags.get(MAP_RUN_TAG)) is not None:
        fit, is_new = _finished(store, fit_id, here)
        known = None if here is None else here.model_of(fit_id)
        maps = [known] if known else flavour.maps_of(store, fit)
    else:
        fits = list(islice(with_maps(store, run), 2))
        if len(fits) > 1:
            raise MechdiffError(f"Run {run_id} has several maps below it; give the id of one of those runs.")
        fit, maps = fits[0] if fits else (run, [])
        run = _measurement_of(store, fit)
    if not maps:
        raise MechdiffError(f"Run {fit.info.run_id} has no map; give the id of a fit run or of a patch run.")
    logged = maps[-1]
    is_read = read is not None and read.sha256() == logged.sha256
    the_map = read if read is not None and is_read else flavour.load_logged(store, logged)
    alpha = run.data.params.get("alpha", "")
    # Earlier versions wrote six digits of α; the digest tells which map it was.
    is_measured = run.data.tags.get("mechdiff.map_sha256") == the_map.sha256()
    if not is_measured and _is_other_number(alpha, the_map.alpha):
        the_map = the_map.with_alpha(float(alpha))
        logged, is_new = LoggedMap("", "", the_map.sha256()), False  # it becomes a model of its own
    meta = {key: str(value) for key, value in the_map.meta.items() if key != selection.META}
    facts = {**meta, **fit.data.params, **run.data.params, **fit.data.tags, **run.data.tags}
    if selection.of(the_map) is None and facts.get(SELECTION_LEAK) != "true":
        facts[SELECTION_LEAK] = "unknown"  # whatever an earlier version of ours took for granted
    return Measured(logged, the_map, run, facts, is_new)


def with_maps(store: Store, run: Run) -> Iterator[tuple[Run, list[LoggedMap]]]:
    """The run and its maps, or of a parent without a map the finished runs below it that fitted one."""
    if maps := flavour.maps_of(store, run):
        yield run, maps
        return
    where = f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and attributes.status = 'FINISHED'"
    for one in each_run(store, [run.info.experiment_id], where):
        if maps := flavour.maps_of(store, one):
            yield one, maps


def _finished(store: Store, run_id: str, here: OpenRun | None = None) -> tuple[Run, bool]:
    """The run, and whether this process wrote all of it."""
    if here is not None and (run := here.written(run_id)) is not None:
        return run, True
    with store.errors():
        run = store.client.get_run(run_id)
    if run.info.status != "FINISHED" or run.info.lifecycle_stage == "deleted":
        state = "deleted" if run.info.lifecycle_stage == "deleted" else run.info.status
        raise MechdiffError(f"Run {run_id} is {state} and only FINISHED runs can be promoted; run it again.")
    store.require_place(run.info.experiment_id)
    return run, False


def _measurement_of(store: Store, fit: Run) -> Run:
    """The patch run that measured the map of `fit`, or `fit` itself when none did or it holds the numbers."""
    if "KL_mapped" in fit.data.metrics:
        return fit
    where = f"tags.`{MAP_RUN_TAG}` = '{fit.info.run_id}' and attributes.status = 'FINISHED'"
    patches = list(islice(each_run(store, [fit.info.experiment_id], where, page=_FEW), _FEW))
    if len(patches) > 1:
        ids = ", ".join(f"{p.info.run_id} ({p.info.run_name})" for p in patches)
        raise MechdiffError(
            f"The map of run {fit.info.run_id} was patched several times; promote one of {ids}."
        )
    return patches[0] if patches else fit


def modelled(store: Store, measured: Measured, require_owner: Callable[[], None]) -> Measured:
    """The same with the map as a logged model of the run that measured it, perhaps an earlier attempt's."""
    if measured.logged.model_id:
        return measured
    run, facts, again = measured.run, measured.facts, not measured.is_new
    made = [one for one in flavour.maps_of(store, run) if one.model_id and again]
    if same := [one for one in made if one.sha256 == measured.logged.sha256]:
        return replace(measured, logged=same[0])
    logged = flavour.log_model(
        measured.the_map,
        run.info.run_name,
        store=store,
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        params=run.data.params,
        metrics=run.data.metrics,
        again=again,
        require_owner=require_owner,
    )
    # The same points again, now as the model's too; the run keeps one of each.
    points = [point for point in run.data._metric_objs if point.key in metrics_of(run)]
    on = (f"{facts['pair']}-{facts['split']}", facts[REPORTED]) if REPORTED in facts else (None, None)
    linked = [Metric(p.key, p.value, p.timestamp, p.step, logged.model_id, *on) for p in points]
    with store.errors():
        store.client.log_batch(run.info.run_id, linked)
    return replace(measured, logged=logged)


def metrics_of(run: Run) -> dict[str, float]:
    """The metrics that say how good a map is, with their intervals."""
    return {k: v for k, v in run.data.metrics.items() if k in _METRICS or k.startswith("ci/")}


def name_of(measured: Measured) -> str:
    """Under which it is registered by default.

    Raises:
        MechdiffError: Its run does not say a pair and site.
    """
    facts = measured.facts
    missing = [key for key in ("pair", "layer", "hook") if key not in facts]
    if missing:
        raise MechdiffError(
            f"Run {measured.run.info.run_id} has no param {missing[0]!r} to name the map by; use --name."
        )
    return registered_name(facts["pair"], Site.parse(f"L{facts['layer']}/{facts['hook']}"))


def _is_other_number(text: str, alpha: float) -> bool:
    try:
        return float(text) != alpha
    except ValueError:
        return False  # the run has no alpha of its own, or one like `auto`
