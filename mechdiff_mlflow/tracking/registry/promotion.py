"""Making a run's map a registered version and moving an alias to it, so that the alias never lies.

Uploaded and read back when the run was logged; read back again; registered; verified through the registry;
only then the alias moves. Whatever step a promotion dies at, the alias stays, and running it again finishes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from mlflow.entities import Metric, Run
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import _use_tracking_uri

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.content.card import collection_card, version_card
from mechdiff_mlflow.tracking.content.names import check_alias, check_name, registered_name
from mechdiff_mlflow.tracking.content.records import MAX_TAG_CHARS
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
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.runs.runs import MAP_RUN_TAG
from mechdiff_mlflow.tracking.store.store import NotAllowed, Store, StoreUnreachable

_MODEL_VERSIONS_TAG = "mlflow.modelVersions"  # how a logged model's page knows its registered versions
_NOTE_TAG = "mlflow.note.content"
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
    """A map, where it is, and the run that vouches for it."""

    logged: LoggedMap
    the_map: AffineMap
    run: Run
    facts: Mapping[str, str] = field(default_factory=dict)


def promote(
    store: Store,
    run_id: str,
    *,
    name: str | None = None,
    alias: str = "champion",
    policy: PromotionPolicy | None = None,
    why: str = "",
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
    measured = _measured(store, run_id, demand, read)
    name = check_name(name) if name else _name_of(measured)
    present = _holder(store, name, alias)
    if present is None or not _adds_nothing(store, measured, present):
        _apply(policy, name, alias, measured, present)  # before anything is made
        measured = _modelled(store, measured, demand)
    with registry.promotion_lock(store):
        _registered(store, name, measured)

        def check(model: RegisteredModel) -> Version | None:
            number = registry.holder_of(model, alias)
            incumbent = None if number is None else registry.get_version(store, name, number)
            if incumbent is None or not _adds_nothing(store, measured, incumbent):
                _apply(policy, name, alias, measured, incumbent)
            return incumbent

        before = check(registry.registered(store, name))
        if before is not None and _adds_nothing(store, measured, before):
            say(f"{name}@{alias} is this very map already, version {before.number}; nothing moves.")
            return before
        measured = _modelled(store, measured, demand)
        version = _existing(store, name, measured) or _create_version(store, name, measured, demand)
        if not version.is_verified:
            _verify(store, version, measured.logged.location)
        demand()
        registry.move_alias(
            store, name, alias, version.number, "promote", check=check, why=why, rules=str(policy)
        )
    if before is not None:
        ours = measured.run.data.metrics
        same = " (on the same prompts)" if same_prompts(measured.facts, before.tags) else ""
        say(
            f"{name}@{alias}: version {before.number} with {numbers(numbers_in(before.tags))} gives way to "
            f"version {version.number} with {numbers(ours)}{same}."
        )
    return registry.get_version(store, name, version.number)


class PromotionRefused(MechdiffError):
    """The policy does not let a map have an alias; what was measured is as it was."""


def demand_may_promote(store: Store, pair: str, site: Site) -> None:
    """Make sure, before any work, that this account may register under the name of a pair and site.

    Raises:
        MechdiffError: A server does not let it.
    """
    name = registered_name(pair, site)
    if not store.is_server:
        return
    try:
        model = store.client.get_registered_model(name)
    except MlflowException:  # a new name is free to everybody
        return
    if model.tags.get(registry.KIND_TAG) == "map":
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
        target = held[-2] if len(held) > 1 else None
        if target is None:
            raise MechdiffError(
                f"Alias {alias!r} of {name} has no earlier version to go back to; see its history."
            )
        verified_map(store, registry.get_version(store, name, target))

        def check(model: RegisteredModel) -> None:
            if registry.holder_of(model, alias) != held[-1]:
                raise MechdiffError(f"Alias {alias!r} of {name} was moved meanwhile; see its history.")

        registry.move_alias(store, name, alias, target, "rollback", check=check, why=why)
    return registry.get_version(store, name, alias)


def demote(store: Store, name: str, alias: str = "champion", *, why: str = "") -> None:
    """Take `alias` away, so that nobody gets a version by it; `rollback` undoes this.

    Raises:
        MechdiffError: The map does not have that alias.
    """
    with registry.promotion_lock(store):
        registry.get_version(store, name, alias)
        registry.move_alias(store, name, alias, None, "demote", check=lambda model: None, why=why)


def _measured(
    store: Store, run_id: str, demand: Callable[[], None], read: AffineMap | None = None
) -> _Measured:
    run = _with_a_map(store, _finished(store, run_id))
    fit_id = run.data.tags.get(MAP_RUN_TAG)
    fit = run if fit_id is None else _finished(store, fit_id)
    logged = _only(flavour.maps_of(store, fit), fit.info.run_id)
    if fit_id is None:
        run = _measurement_of(store, fit)
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
    return _Measured(logged, the_map, run, facts)


def _with_a_map(store: Store, run: Run) -> Run:
    """The run itself, or of a parent without a map the one child that fitted one."""
    run_id = run.info.run_id
    if MAP_RUN_TAG in run.data.tags or flavour.maps_of(store, run):
        return run
    where = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'FINISHED'"
    with store.errors():
        children = list(store.client.search_runs([run.info.experiment_id], where, max_results=1000))
    fits = [child for child in children if flavour.maps_of(store, child)]
    if len(fits) > 1:
        raise MechdiffError(f"Run {run_id} has {len(fits)} maps below it; give the id of one of those runs.")
    return fits[0] if fits else run


def _finished(store: Store, run_id: str) -> Run:
    with store.errors():
        run = store.client.get_run(run_id)
    if run.info.status != "FINISHED" or run.info.lifecycle_stage == "deleted":
        state = "deleted" if run.info.lifecycle_stage == "deleted" else run.info.status
        raise MechdiffError(f"Run {run_id} is {state} and only FINISHED runs can be promoted; run it again.")
    store.demand_place(run.info.experiment_id)
    return run


def _only(maps: list[LoggedMap], run_id: str) -> LoggedMap:
    if not maps:
        raise MechdiffError(f"Run {run_id} has no map; give the id of a fit run or of a patch run.")
    return maps[-1]


def _measurement_of(store: Store, fit: Run) -> Run:
    """The patch run that measured the map of `fit`, or `fit` itself when none did or it holds the numbers."""
    if "KL_mapped" in fit.data.metrics:
        return fit
    where = f"tags.`{MAP_RUN_TAG}` = '{fit.info.run_id}' and attributes.status = 'FINISHED'"
    with store.errors():
        patches = list(store.client.search_runs([fit.info.experiment_id], where, max_results=10))
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
    return replace(measured, logged=_as_model(store, measured.the_map, measured.run, demand))


def _as_model(store: Store, the_map: AffineMap, run: Run, demand: Callable[[], None]) -> LoggedMap:
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
        again=True,
        demand=demand,
    )
    with store.errors():
        client = store.client
        points = [p for key in _numbers(run) for p in client.get_metric_history(run.info.run_id, key)]
        # The same points again, now as the model's too; the run keeps one of each.
        linked = [Metric(p.key, p.value, p.timestamp, p.step, model_id=logged.model_id) for p in points]
        client.log_batch(run.info.run_id, linked)
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
    policy: PromotionPolicy, name: str, alias: str, measured: _Measured, incumbent: Version | None
) -> None:
    candidate = Candidate(measured.run.info.run_id, measured.run.data.metrics, measured.facts)
    refusals = policy.refusals(candidate, None if incumbent is None else incumbent.tags)
    if refusals and not policy.force:
        raise PromotionRefused(
            f"Run {candidate.run_id} may not become {name}@{alias} by the rule"
            f"{'s' if len(refusals) > 1 else ''} {'; '.join(refusals)}; promote another run, change the "
            f"policy, or waive it: mechdiff promote {candidate.run_id} --name {name} --alias {alias} --force."
        )


def _holder(store: Store, name: str, alias: str) -> Version | None:
    try:
        with store.errors():
            model = store.client.get_registered_model(name)
    except StoreUnreachable:
        raise
    except MechdiffError:  # there is none yet, or `registered` says below what is wrong
        return None
    number = registry.holder_of(model, alias)
    return None if number is None else registry.get_version(store, name, number)


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


def _registered(store: Store, name: str, measured: _Measured) -> None:
    """Make the registered model unless it is there."""
    description = collection_card(name, measured.facts)
    try:
        with store.errors():
            store.patience.run(
                partial(store.client.create_registered_model, name, {registry.KIND_TAG: "map"}, description)
            )
    except MechdiffError as error:
        cause = error.__cause__
        if not isinstance(cause, MlflowException) or cause.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if registry.registered(store, name).tags.get(registry.KIND_TAG) != "map":
            raise MechdiffError(
                f"A registered model {name!r} that is no map exists already; give another name with --name."
            ) from error


def _existing(store: Store, name: str, measured: _Measured) -> Version | None:
    """The version that an earlier attempt made of the same map by the same run."""
    versions = registry.versions_of_run(store, name, measured.run.info.run_id)
    return next((v for v in versions if v.sha256 == measured.logged.sha256), None)


def _create_version(store: Store, name: str, measured: _Measured, demand: Callable[[], None]) -> Version:
    run, metrics = measured.run, measured.run.data.metrics
    tags = {key: measured.facts[key] for key in _PROVENANCE if key in measured.facts}
    tags |= {"alpha": repr(measured.the_map.alpha), "code_version": code_version()}
    tags |= {key: repr(value) for key, value in _numbers(run).items()}
    tags |= {
        registry.SHA256_TAG: measured.logged.sha256,
        registry.RUN_TAG: run.info.run_id,
        registry.KIND_TAG: "map",
    }
    create = partial(
        store.client.create_model_version,
        name,
        source=f"models:/{measured.logged.model_id}",
        run_id=run.info.run_id,
        tags=tags,
        description=version_card(measured.the_map, metrics, f"models:/{name}@champion", measured.facts),
        model_id=measured.logged.model_id,
    )

    def make() -> int:
        demand()
        return int(create().version)

    with store.errors(), _default_store(store):
        # Promoters of a map come one after the other: what is found now was made by an earlier attempt.
        made = store.patience.once(
            make,
            lambda: None if (found := _existing(store, name, measured)) is None else found.number,
        )
    return registry.get_version(store, name, made)


def _verify(store: Store, version: Version, location: str) -> None:
    """Mark a version, once it is sure that its files are those at `location`, which were read and checked."""
    client = store.client
    with store.errors():
        found = client.get_model_version_download_uri(version.name, str(version.number))
    if found.rstrip("/") != location.rstrip("/"):
        read_back(store, version)
    with store.errors():
        client.set_model_version_tag(version.name, str(version.number), registry.VERIFIED_TAG, version.sha256)
    # Of whoever may not write to the experiment of the run, the model's own page goes without.
    with suppress(NotAllowed), store.errors():
        model_id = version.source.removeprefix("models:/")
        if version.source != model_id:
            text = client.get_logged_model(model_id).tags.get(_MODEL_VERSIONS_TAG, "[]")
            try:
                known = foreign.record(list[dict[str, str]], _MODEL_VERSIONS_TAG, text)
            except foreign.Malformed:  # a page's list of links, written anew
                known = []
            entry = {"name": version.name, "version": str(version.number)}
            if entry not in known:
                card = client.get_model_version(version.name, str(version.number)).description
                tags = {_MODEL_VERSIONS_TAG: json.dumps([*known, entry])}
                # It was logged before it was measured; the version's card has the numbers.
                client.set_logged_model_tags(model_id, {**tags, _NOTE_TAG: card[:MAX_TAG_CHARS]})


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
