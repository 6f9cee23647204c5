"""Making a run's map a registered version and moving an alias to it, so that the alias never lies.

The alias moves last. Whatever step a promotion dies at, the alias stays, and running it again finishes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking._tracking_service.utils import _use_tracking_uri

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.solvers import SETTINGS
from mechdiff_mlflow.tracking.content import tag_names
from mechdiff_mlflow.tracking.content.card import collection_card, version_card
from mechdiff_mlflow.tracking.content.names import check_alias, check_name
from mechdiff_mlflow.tracking.registry import moves, versions
from mechdiff_mlflow.tracking.registry.fetch import read_back, registered_version, verified_map
from mechdiff_mlflow.tracking.registry.measured import Measured, measured_in, metrics_of, modelled, name_of
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy, numbers, numbers_in, same_prompts
from mechdiff_mlflow.tracking.registry.versions import Version
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.runs.tracker import OpenRun
from mechdiff_mlflow.tracking.store.server import login_name
from mechdiff_mlflow.tracking.store.store import NotAllowed, Store, StoreUnreachable

_PROVENANCE = (
    *("pair", "layer", "hook", "solver", "family", "k", *(setting.name for setting in SETTINGS)),
    *("position", "split", "n", "seed", "dtype", "null"),
    *(tag_names.PAIR_FINGERPRINT, tag_names.FITTED_ON, tag_names.SELECTION_LEAK, tag_names.SELECTION),
    *(tag_names.REPORTED, tag_names.IMPORTED_FROM),
)


class PromotionRefused(MechdiffError):
    """The policy does not let a map have an alias; what was measured is as it was."""


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
) -> Version:
    """Register the map that run `run_id` fitted or measured, and give the version `alias`.

    Doing it again changes nothing, or finishes what an earlier attempt left. A map that has the alias already
    is not registered a second time, unless only now it is measured, or on prompts that no choice was made on.

    Args:
        store: Where the run is and the version goes.
        run_id: A `patch` run, whose numbers the version gets, or a `fit` run that at most one patch measured.
        name: Under which to register; by default `<pair>-L<layer>-<hook>` of the run.
        alias: To move; the last step.
        policy: Who may be promoted.
        why: For the history.
        here: The command that has just written the run, which may be taken over meanwhile.
        read: The run's map, if this very process has just logged it and read it back.
        say: Told in a sentence which version gives way to which, or that nothing moves.

    Raises:
        PromotionRefused: A rule of the policy is not met.
        MechdiffError: The run is not FINISHED or has no map, the name or alias is not possible, or the files
            are not what was logged.
    """
    check_alias(alias)
    policy = policy or PromotionPolicy()
    require_owner: Callable[[], None] = (lambda: None) if here is None else here.require_owner
    measured = measured_in(store, run_id, here, read)
    name = check_name(name) if name else name_of(measured)
    require_allowed = partial(_require_allowed, store, policy, name, alias, measured)
    with moves.promotion_lock(store):
        model = versions.find(store, name)
        before = None if model is None else versions.holder(store, model, alias)
        if before is not None and _adds_nothing(store, measured, before):
            say(f"{name}@{alias} is this very map already, version {before.number}; nothing moves.")
            return before
        require_allowed(before)  # before anything is made
        if model is not None and here is None and store.is_server and login_name(store.uri) is not None:
            _require_may_write(store, name)
        measured = modelled(store, measured, require_owner)
        if model is None:
            _register(store, name, measured)
        version = None if measured.is_new else _existing(store, name, measured)
        version = version or _create_version(store, name, measured, require_owner)
        if not version.is_verified:
            version = _verified(store, version, measured)
        require_owner()

        def check(now: Version | None) -> None:
            nonlocal before
            before = now
            if now is None or not _adds_nothing(store, measured, now):
                require_allowed(now)

        moved = moves.move_alias(
            store, name, alias, version, "promote", expected=before, check=check, why=why, rules=str(policy)
        )
    if before is not None:
        ours = measured.run.data.metrics
        same = " (on the same prompts)" if same_prompts(measured.facts, before.tags) else ""
        say(
            f"{name}@{alias}: version {before.number} with {numbers(numbers_in(before.tags))} gives way to "
            f"version {version.number} with {numbers(ours)}{same}."
        )
    return moved


def note_numbers(store: Store, reference: str, the_map: AffineMap, run_id: str) -> str:
    """Give a registered version that nobody had measured the numbers of a run that now has, in tags and card.

    Says so; empty where `reference` is no such version, or this account may not write it.
    """
    version = None if Path(reference).exists() else registered_version(store, reference)
    if version is None or "KL_mapped" in version.tags or version.sha256 != the_map.sha256():
        return ""
    with store.errors():
        run = store.client.get_run(run_id)
    facts = {**run.data.params, **run.data.tags}
    card = version_card(the_map, run.data.metrics, version.uri, facts)
    try:
        with store.errors():
            for key, text in _numbers_and_conditions(run, facts).items():
                store.client.set_model_version_tag(version.name, str(version.number), key, text)
            store.client.update_model_version(version.name, str(version.number), card)
    except NotAllowed:
        return ""
    return f"{version} had not been measured; its card and `mechdiff maps` have these numbers now."


def _numbers_and_conditions(run: Run, facts: Mapping[str, str]) -> dict[str, str]:
    """What a version's tags say of how good it is, and on what that was measured."""
    tags = {key: facts[key] for key in _PROVENANCE if key in facts}
    return tags | {key: repr(value) for key, value in metrics_of(run).items()}


def require_may_promote(store: Store, pair: str, sites: Iterable[str]) -> None:
    """Make sure, before any work, that this account may register the maps of a pair at some sites.

    A server without a login lets everybody, and a new name is free. `sites` are regular expressions of slugs
    such as `L26-attn_out`.

    Raises:
        MechdiffError: The pair's name cannot be part of a map's, or a server does not let it.
    """
    wanted = re.compile(f"{re.escape(check_name(pair))}-(?:{'|'.join(sites)})")
    if store.is_server and login_name(store.uri) is not None:
        for model in versions.our_models(store, f"name LIKE '{pair}-L%'"):
            if wanted.fullmatch(model.name):
                _require_may_write(store, model.name)


def rollback(store: Store, name: str, alias: str = "champion", *, why: str = "") -> Version:
    """Give `alias` back to the version that had it before the last promotion or demotion.

    Rolling back twice goes back two steps.

    Raises:
        MechdiffError: There is nothing to go back to, or that version's files are not what they were.
    """
    with moves.promotion_lock(store):
        before = versions.holder(store, versions.registered(store, name), alias)
        held = moves.holders(moves.history(store, name, alias))
        if len(held) < 2 or held[-2] is None:
            raise MechdiffError(
                f"Alias {alias!r} of {name} has no earlier version to go back to; see its history."
            )
        target = versions.get_version(store, name, held[-2])
        verified_map(store, target)
        return moves.move_alias(store, name, alias, target, "rollback", expected=before, why=why)


def demote(store: Store, name: str, alias: str = "champion", *, why: str = "") -> None:
    """Take `alias` away, so that nobody gets a version by it; `rollback` undoes this.

    Raises:
        MechdiffError: The map does not have that alias.
    """
    with moves.promotion_lock(store):
        before = versions.get_version(store, name, alias)
        moves.move_alias(store, name, alias, None, "demote", expected=before, why=why)


def is_same_function(store: Store, the_map: AffineMap, version: Version) -> bool:
    """Whether a version does to every x what `the_map` does; a version that cannot be read does not."""
    if version.sha256 == the_map.sha256():
        return True
    try:
        return the_map.equals(verified_map(store, version))
    except StoreUnreachable:
        raise
    except MechdiffError:
        return False


def _require_may_write(store: Store, name: str) -> None:
    with store.errors():
        store.client.set_registered_model_tag(name, versions.KIND_TAG, "map")  # as it is


def _require_allowed(
    store: Store,
    policy: PromotionPolicy,
    name: str,
    alias: str,
    measured: Measured,
    incumbent: Version | None,
) -> None:
    theirs = None if incumbent is None else incumbent.tags
    refusals = policy.refusals(measured.run.data.metrics, measured.facts, theirs)
    if refusals and not policy.force:
        run_id = measured.run.info.run_id
        waive = store.command("promote", run_id, "--name", name, "--alias", alias, "--force")
        raise PromotionRefused(
            f"Run {run_id} may not become {name}@{alias} by the rule"
            f"{'s' if len(refusals) > 1 else ''} {'; '.join(refusals)}; promote another run, change the "
            f"policy, or waive it: {waive}"
        )


def _adds_nothing(store: Store, measured: Measured, present: Version) -> bool:
    """Whether `present` is this map already, and as well measured."""
    ours, theirs = measured.run.data.metrics, numbers_in(present.tags)
    if "KL_mapped" in ours:
        if "KL_mapped" not in theirs:
            return False
        cleaner = (
            measured.facts.get(tag_names.SELECTION_LEAK)
            == "false"
            != present.tags.get(tag_names.SELECTION_LEAK)
        )
        same = same_prompts(measured.facts, present.tags)
        if cleaner or (same and not math.isclose(ours["KL_mapped"], theirs["KL_mapped"], rel_tol=1e-6)):
            return False
    return present.is_verified and is_same_function(store, measured.the_map, present)


def _register(store: Store, name: str, measured: Measured) -> None:
    """Make the registered model, unless another promoter made it meanwhile."""
    description = collection_card(name, measured.facts)
    create = partial(store.client.create_registered_model, name, {versions.KIND_TAG: "map"}, description)
    with store.errors():
        try:
            store.retries.run(create)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            versions.find(store, name)


def _existing(store: Store, name: str, measured: Measured) -> Version | None:
    """The version that an earlier attempt made of the same map by the same run."""
    where = f"name = '{name}' and run_id = '{measured.run.info.run_id}'"
    with store.errors():
        found = store.client.search_model_versions(where)
    made = sorted((versions.version_of(one, one.aliases) for one in found), key=lambda v: v.number)
    return next((v for v in made if v.sha256 == measured.logged.sha256), None)


def _create_version(
    store: Store, name: str, measured: Measured, require_owner: Callable[[], None]
) -> Version:
    run = measured.run
    tags = _numbers_and_conditions(run, measured.facts)
    tags |= {"alpha": repr(measured.the_map.alpha), "code_version": code_version()}
    tags |= {
        tag_names.SHA256_TAG: measured.logged.sha256,
        versions.RUN_TAG: run.info.run_id,
        versions.KIND_TAG: "map",
    }
    card = version_card(measured.the_map, run.data.metrics, f"models:/{name}@champion", measured.facts)

    def make() -> Version:
        require_owner()
        made = store.client.create_model_version(
            name,
            source=measured.logged.model_uri,
            run_id=run.info.run_id,
            tags=tags,
            description=card,
            model_id=measured.logged.model_id,
        )
        return versions.version_of(made, made.aliases)

    with store.errors(), _default_store(store):
        # Promoters of a map come one after the other: what is found now was made by an earlier attempt.
        return store.retries.once(make, lambda: _existing(store, name, measured))


def _verified(store: Store, version: Version, measured: Measured) -> Version:
    """The version, marked once it is sure that its files are those that were read and checked."""
    client, number = store.client, str(version.number)
    with store.errors():
        found = client.get_model_version_download_uri(version.name, number)
    if found.rstrip("/") != measured.logged.location.rstrip("/"):
        read_back(store, version)
    with store.errors():
        client.set_model_version_tag(version.name, number, versions.VERIFIED_TAG, version.sha256)
        if not store.is_server:  # which does it by itself
            client.set_model_versions_tags(version.name, number, measured.logged.model_id)
    return version.with_tags({versions.VERIFIED_TAG: version.sha256})


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
