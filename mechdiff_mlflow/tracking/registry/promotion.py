"""Making a run's map a registered version and moving an alias to it, so that the alias never lies.

Uploaded and read back when the run was logged; read back again; registered; verified through the registry;
only then the alias moves. Whatever step a promotion dies at, the alias stays, and running it again finishes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from mlflow.entities import Metric, Run
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import _use_tracking_uri

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.content.card import collection_card, version_card
from mechdiff_mlflow.tracking.content.names import check_alias, check_name, registered_name
from mechdiff_mlflow.tracking.content.tag_names import (
    FITTED_ON,
    IMPORTED_FROM,
    PAIR_FINGERPRINT,
    REPORTED,
    SELECTION,
    SELECTION_LEAK,
)
from mechdiff_mlflow.tracking.flavour import LoggedMap
from mechdiff_mlflow.tracking.registry import registry
from mechdiff_mlflow.tracking.registry.fetch import read_back, verified_map
from mechdiff_mlflow.tracking.registry.policy import (
    Candidate,
    PromotionPolicy,
    numbers,
    numbers_in,
    same_prompts,
)
from mechdiff_mlflow.tracking.registry.registry import Version
from mechdiff_mlflow.tracking.runs.lookup import each_run
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.runs.runs import MAP_RUN_TAG, OpenRun
from mechdiff_mlflow.tracking.store.server import login_name
from mechdiff_mlflow.tracking.store.store import Store, StoreUnreachable

_FEW = 10
_PROVENANCE = (
    *(
        "pair",
        PAIR_FINGERPRINT,
        FITTED_ON,
        "layer",
        "hook",
        "solver",
        "family",
        "k",
        "shrink",
        "ridge",
        "off_span",
    ),
    *("position", "split", "n", "seed", "dtype", "null", SELECTION_LEAK, SELECTION, REPORTED, IMPORTED_FROM),
)
_METRICS = ("KL_raw", "KL_mapped", "drop_pct", "skill_pct", "noise_floor", "rho", "top1_agreement")


@dataclass(frozen=True, slots=True)
class _Measured:
    """A map, where it is, and the run that vouches for it; `is_new` if this process has just logged it."""

    logged: LoggedMap
    the_map: AffineMap
    run: Run
    facts: Mapping[str, str]
    is_new: bool


def promote(
    store: Store,
    run_id: str,
    *,
    name: str | None = None,
    alias: str = "champion",
    policy: PromotionPolicy | None = None,
    why: str = "",
    here: OpenRun | None = None,
    read: AffineMap | None = None,
    say: Callable[[str], object] = lambda text: None,
    demand: Callable[[], None] = lambda: None,
) -> Version:
    """Register the map that run `run_id` fitted or measured, and give the version `alias`.

    Doing it again changes nothing, or finishes what an earlier attempt left. A map that has the alias already
    is not registered a second time, unless only now it is measured, or on prompts that no choice was made on.

    Args:
        store: Where the run is and the version goes.
        run_id: A `patch` run, whose numbers the version gets, or a `fit` run that at most one patch measured.
        name: Under which to register; by default `<pair>-L<layer>-<hook>` of the run.
        alias: To move; the last step.
        policy: Who may be promoted; by default the defaults of `PromotionPolicy`.
        why: In the user's words, for the history.
        here: The command that has just written the run, which then is not asked for again.
        read: The run's map, if this very process has just logged it and read it back.
        say: Told in a sentence which version gives way to which, or that nothing moves.
        demand: Called before what is made or moved; raises if another process has taken the command over.

    Raises:
        PromotionRefused: A rule of the policy is not met.
        MechdiffError: The run is not FINISHED or has no map, the name or alias is not possible, or the files
            are not what was logged.
    """
    check_alias(alias)
    policy = policy or PromotionPolicy()
    measured = _measured(store, run_id, demand, here, read)
    name = check_name(name) if name else _name_of(measured)
    with registry.promotion_lock(store):
        model = registry.find(store, name)
        before = None if model is None else registry.holder(store, model, alias)
        if before is not None and _adds_nothing(store, measured, before):
            say(f"{name}@{alias} is this very map already, version {before.number}; nothing moves.")
            return before
        _apply(store, policy, name, alias, measured, before)  # before anything is made
        if model is not None and here is None and store.is_server and login_name(store.uri) is not None:
            _demand_may_write(store, name)
        measured = _modelled(store, measured, demand)
        if model is None:
            _register(store, name, measured)
        version = None if measured.is_new else _existing(store, name, measured)
        version = version or _create_version(store, name, measured, demand)
        if not version.is_verified:
            version = _verified(store, version, measured)
        demand()

        def check(model: RegisteredModel) -> Version | None:
            nonlocal before
            if registry.holder_of(model, alias) != (before and before.number):  # moved meanwhile
                before = registry.holder(store, model, alias)
                if before is None or not _adds_nothing(store, measured, before):
                    _apply(store, policy, name, alias, measured, before)
            return before

        moved = registry.move_alias(
            store, name, alias, version, "promote", check=check, why=why, rules=str(policy)
        )
    if before is not None:
        ours = measured.run.data.metrics
        same = " (on the same prompts)" if same_prompts(measured.facts, before.tags) else ""
        say(
            f"{name}@{alias}: version {before.number} with {numbers(numbers_in(before.tags))} gives way to "
            f"version {version.number} with {numbers(ours)}{same}."
        )
    return moved


class PromotionRefused(MechdiffError):
    """The policy does not let a map have an alias; what was measured is as it was."""


def demand_may_promote(store: Store, pair: str, sites: Iterable[str]) -> None:
    """Make sure, before any work, that this account may register the maps of a pair at some sites.

    A server without a login lets everybody, and a new name is free.

    Args:
        store: Where to.
        pair: Its name.
        sites: Regular expressions of their slugs, such as `L26-attn_out`.

    Raises:
        MechdiffError: The pair's name cannot be part of a map's, or a server does not let it.
    """
    wanted = re.compile(f"{re.escape(check_name(pair))}-(?:{'|'.join(sites)})")
    if store.is_server and login_name(store.uri) is not None:
        for model in registry.our_models(store, f"name LIKE '{pair}-L%'"):
            if wanted.fullmatch(model.name):
                _demand_may_write(store, model.name)


def _demand_may_write(store: Store, name: str) -> None:
    with store.errors():
        store.client.set_registered_model_tag(name, registry.KIND_TAG, "map")  # as it is


def rollback(store: Store, name: str, alias: str = "champion", *, why: str = "") -> Version:
    """Give `alias` back to the version that had it before the last promotion or demotion.

    Rolling back twice goes back two steps.

    Raises:
        MechdiffError: There is nothing to go back to, or that version's files are not what they were.
    """
    with registry.promotion_lock(store):
        held = registry.holders(registry.history(store, name, alias))
        if len(held) < 2 or held[-2] is None:
            raise MechdiffError(
                f"Alias {alias!r} of {name} has no earlier version to go back to; see its history."
            )
        target = registry.get_version(store, name, held[-2])
        verified_map(store, target)

        def check(model: RegisteredModel) -> Version | None:
            if registry.holder_of(model, alias) != held[-1]:
                raise MechdiffError(f"Alias {alias!r} of {name} was moved meanwhile; see its history.")
            return registry.holder(store, model, alias)

        return registry.move_alias(store, name, alias, target, "rollback", check=check, why=why)


def demote(store: Store, name: str, alias: str = "champion", *, why: str = "") -> None:
    """Take `alias` away, so that nobody gets a version by it; `rollback` undoes this.

    Raises:
        MechdiffError: The map does not have that alias.
    """
    with registry.promotion_lock(store):
        find = partial(registry.holder, store, alias=alias)
        registry.move_alias(store, name, alias, None, "demote", check=find, why=why)


def _measured(
    store: Store,
    run_id: str,
    demand: Callable[[], None],
    here: OpenRun | None,
    read: AffineMap | None,
) -> _Measured:
    run, is_new = _finished(store, run_id, here)
    if (fit_id := run.data.tags.get(MAP_RUN_TAG)) is not None:
        fit, is_new = _finished(store, fit_id, here)
        known = None if here is None else here.model_of(fit_id)
        maps = [known] if known else flavour.maps_of(store, fit)
    else:
        fit, maps = _fitted(store, run)
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
        logged = _as_model(store, the_map, run, demand)
    meta = {key: str(value) for key, value in the_map.meta.items() if key != selection.META}
    facts = {**meta, **fit.data.params, **run.data.params, **fit.data.tags, **run.data.tags}
    if selection.of(the_map) is None and facts.get(SELECTION_LEAK) != "true":
        facts[SELECTION_LEAK] = "unknown"  # whatever an earlier version of ours took for granted
    return _Measured(logged, the_map, run, facts, is_new and logged.sha256 == maps[-1].sha256)


def _fitted(store: Store, run: Run) -> tuple[Run, list[LoggedMap]]:
    """The run and its maps, or of a parent without a map the one child that fitted one."""
    if maps := flavour.maps_of(store, run):
        return run, maps
    run_id = run.info.run_id
    where = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'FINISHED'"
    below = each_run(store, [run.info.experiment_id], where)
    fits = list(islice(((one, maps) for one in below if (maps := flavour.maps_of(store, one))), 2))
    if len(fits) > 1:
        raise MechdiffError(f"Run {run_id} has several maps below it; give the id of one of those runs.")
    return fits[0] if fits else (run, [])


def _finished(store: Store, run_id: str, here: OpenRun | None = None) -> tuple[Run, bool]:
    """The run, and whether this process wrote all of it."""
    if here is not None and (run := here.written(run_id)) is not None:
        return run, True
    with store.errors():
        run = store.client.get_run(run_id)
    if run.info.status != "FINISHED" or run.info.lifecycle_stage == "deleted":
        state = "deleted" if run.info.lifecycle_stage == "deleted" else run.info.status
        raise MechdiffError(f"Run {run_id} is {state} and only FINISHED runs can be promoted; run it again.")
    store.demand_place(run.info.experiment_id)
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


def _modelled(store: Store, measured: _Measured, demand: Callable[[], None]) -> _Measured:
    """The same with a logged model, if the map was so far a file of its run, as a sweep's are."""
    if measured.logged.model_id:
        return measured
    logged = _as_model(store, measured.the_map, measured.run, demand, again=not measured.is_new)
    return replace(measured, logged=logged)


def _as_model(
    store: Store, the_map: AffineMap, run: Run, demand: Callable[[], None], *, again: bool = True
) -> LoggedMap:
    """The map as a logged model of `run`, which measured it so, unless an earlier attempt made it."""
    wanted = the_map.sha256()
    for logged in flavour.maps_of(store, run):
        if logged.sha256 == wanted and logged.model_id:
            return logged
    logged = flavour.log_model(
        the_map,
        run.info.run_name,
        store=store,
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        params=run.data.params,
        metrics=run.data.metrics,
        again=again,
        demand=demand,
    )
    # The same points again, now as the model's too; the run keeps one of each.
    numbers = _numbers(run)
    points = [point for point in run.data._metric_objs if point.key in numbers]
    linked = [Metric(p.key, p.value, p.timestamp, p.step, model_id=logged.model_id) for p in points]
    with store.errors():
        store.client.log_batch(run.info.run_id, linked)
    return logged


def _numbers(run: Run) -> dict[str, float]:
    """The metrics that say how good a map is, with their intervals."""
    return {k: v for k, v in run.data.metrics.items() if k in _METRICS or k.startswith("ci/")}


def _name_of(measured: _Measured) -> str:
    facts = measured.facts
    missing = [key for key in ("pair", "layer", "hook") if key not in facts]
    if missing:
        raise MechdiffError(
            f"Run {measured.run.info.run_id} has no param {missing[0]!r} to name the map by; use --name."
        )
    return registered_name(facts["pair"], Site.parse(f"L{facts['layer']}/{facts['hook']}"))


def _apply(
    store: Store,
    policy: PromotionPolicy,
    name: str,
    alias: str,
    measured: _Measured,
    incumbent: Version | None,
) -> None:
    candidate = Candidate(measured.run.info.run_id, measured.run.data.metrics, measured.facts)
    refusals = policy.refusals(candidate, None if incumbent is None else incumbent.tags)
    if refusals and not policy.force:
        waive = store.command("promote", candidate.run_id, "--name", name, "--alias", alias, "--force")
        raise PromotionRefused(
            f"Run {candidate.run_id} may not become {name}@{alias} by the rule"
            f"{'s' if len(refusals) > 1 else ''} {'; '.join(refusals)}; promote another run, change the "
            f"policy, or waive it: {waive}"
        )


def _adds_nothing(store: Store, measured: _Measured, present: Version) -> bool:
    """Whether `present` is this map already, and as well measured."""
    ours, theirs = measured.run.data.metrics, numbers_in(present.tags)
    if "KL_mapped" in ours and "KL_mapped" in theirs:
        cleaner = measured.facts.get(SELECTION_LEAK) == "false" != present.tags.get(SELECTION_LEAK)
        same = same_prompts(measured.facts, present.tags)
        if cleaner or (same and not math.isclose(ours["KL_mapped"], theirs["KL_mapped"], rel_tol=1e-6)):
            return False
    elif "KL_mapped" in ours:
        return False
    return present.is_verified and is_same_function(store, measured.the_map, present)


def _register(store: Store, name: str, measured: _Measured) -> None:
    """Make the registered model, unless another promoter made it meanwhile."""
    description = collection_card(name, measured.facts)
    create = partial(store.client.create_registered_model, name, {registry.KIND_TAG: "map"}, description)
    with store.errors():
        try:
            store.patience.run(create)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            registry.find(store, name)


def _existing(store: Store, name: str, measured: _Measured) -> Version | None:
    """The version that an earlier attempt made of the same map by the same run."""
    versions = registry.versions_of_run(store, name, measured.run.info.run_id)
    return next((v for v in versions if v.sha256 == measured.logged.sha256), None)


def _create_version(store: Store, name: str, measured: _Measured, demand: Callable[[], None]) -> Version:
    run = measured.run
    tags = {key: measured.facts[key] for key in _PROVENANCE if key in measured.facts}
    tags |= {"alpha": repr(measured.the_map.alpha), "code_version": code_version()}
    tags |= {key: repr(value) for key, value in _numbers(run).items()}
    tags |= {
        registry.SHA256_TAG: measured.logged.sha256,
        registry.RUN_TAG: run.info.run_id,
        registry.KIND_TAG: "map",
    }

    def make() -> Version:
        demand()
        made = store.client.create_model_version(
            name,
            source=measured.logged.model_uri,
            run_id=run.info.run_id,
            tags=tags,
            description=version_card(
                measured.the_map, run.data.metrics, f"models:/{name}@champion", measured.facts
            ),
            model_id=measured.logged.model_id,
        )
        return registry.version_of(made, made.aliases)

    with store.errors(), _default_store(store):
        # Promoters of a map come one after the other: what is found now was made by an earlier attempt.
        return store.patience.once(make, lambda: _existing(store, name, measured))


def _verified(store: Store, version: Version, measured: _Measured) -> Version:
    """The version, marked once it is sure that its files are those that were read and checked."""
    client, number = store.client, str(version.number)
    with store.errors():
        found = client.get_model_version_download_uri(version.name, number)
    if found.rstrip("/") != measured.logged.location.rstrip("/"):
        read_back(store, version)
    with store.errors():
        client.set_model_version_tag(version.name, number, registry.VERIFIED_TAG, version.sha256)
        if not store.is_server:  # which does it by itself
            client.set_model_versions_tags(version.name, number, measured.logged.model_id)
    return version.with_tags({registry.VERIFIED_TAG: version.sha256})


def is_same_function(store: Store, the_map: AffineMap, version: Version) -> bool:
    """Whether a version does to every x what `the_map` does; a version that cannot be read does not."""
    if version.sha256 == the_map.sha256():
        return True
    try:
        other = verified_map(store, version)
    except StoreUnreachable:
        raise
    except MechdiffError:
        return False
    return the_map.equals(other)


@contextmanager
def _default_store(store: Store) -> Iterator[None]:
    """Make `store` MLflow's default for a moment: a database's registry looks logged models up there."""
    if store.is_server:
        yield
        return
    variable = os.environ.get("MLFLOW_TRACKING_URI")
    try:
        with _use_tracking_uri(store.uri):
            yield
    finally:
        if variable is not None:
            os.environ["MLFLOW_TRACKING_URI"] = variable


def _is_other_number(text: str, alpha: float) -> bool:
    try:
        return float(text) != alpha
    except ValueError:
        return False  # the run has no alpha of its own, or one like `auto`
