"""Registered maps and their versions, in MLflow's own registry.

A version is trusted when its tag `mechdiff.verified` equals its digest.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.tracking.content.tag_names import SHA256_TAG
from mechdiff_mlflow.tracking.store.store import NotAllowed, Store

KIND_TAG = "mechdiff.kind"
VERIFIED_TAG = "mechdiff.verified"
RUN_TAG = "mechdiff.run_id"
_PAGE = 100
# MLflow says INVALID_PARAMETER_VALUE for an alias that is not there.
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True, slots=True)
class Version:
    """One registered version of a map."""

    name: str
    number: int
    source: str  # URI of its files
    run_id: str  # of the run that vouches for it
    aliases: tuple[str, ...]
    tags: Mapping[str, str]  # that run's params and metrics, digests and the code version

    def __str__(self) -> str:
        return f"{self.name}/{self.number}"

    def with_tags(self, tags: Mapping[str, str]) -> Version:
        """The same after tags were set."""
        return replace(self, tags={**self.tags, **tags})

    @property
    def uri(self) -> str:
        """What `load_map` and MLflow take."""
        return f"models:/{self.name}/{self.number}"

    @property
    def sha256(self) -> str:
        """Hex digest of its `map.pt`, empty when the version is not ours."""
        return self.tags.get(SHA256_TAG, "")

    @property
    def is_verified(self) -> bool:
        """Whether its files were read back and found right before it was offered."""
        is_digest = re.fullmatch("[0-9a-f]{64}", self.sha256) is not None
        return is_digest and self.tags.get(VERIFIED_TAG) == self.sha256


def list_winners(store: Store) -> list[Version]:
    """Every version of ours that bears an alias, by name and number."""
    numbers = {(model.name, int(number)) for model in our_models(store) for number in model.aliases.values()}
    return [get_version(store, name, number) for name, number in sorted(numbers)]


def winners_of(store: Store, pair: str, alias: str) -> list[Version]:
    """The versions of a pair's maps that bear `alias`, by name; that there is none is an error."""
    found = []
    for version in list_winners(store):
        if alias in version.aliases and version.tags.get("pair") == pair:
            try:
                foreign.number({"alpha": 0, **version.tags}, "alpha")
                found.append(version)
            except foreign.Malformed as error:
                foreign.left_out(f"map {version}", error)
    if not found:
        raise MechdiffError(
            f"No map of pair {pair!r} has the alias {alias!r}; promote one with "
            f"{store.command('promote', 'RUN', '--alias', alias)}"
        )
    return found


def list_versions(store: Store, name: str) -> list[Version]:
    """Every version of `name`, oldest first."""
    model, where = registered(store, name), f"name = '{name}'"
    found: Iterator[ModelVersion] = store.every(
        lambda token: store.client.search_model_versions(where, max_results=_PAGE, page_token=token)
    )
    versions = (version_of(v, aliases_of(model, int(v.version))) for v in found)
    return sorted(versions, key=lambda v: v.number)


def get_version(store: Store, name: str, which: int | str) -> Version:
    """Version number or alias `which` of `name`, in one request; an error says which there are."""
    client = store.client
    try:
        with store.errors():
            found = (
                client.get_model_version_by_alias(name, which)
                if isinstance(which, str)
                else client.get_model_version(name, str(which))
            )
            return version_of(found, found.aliases)
    except MechdiffError as error:
        if not _is_missing(error):
            raise
    model = registered(store, name)
    if isinstance(which, str):
        known = ", ".join(sorted(model.aliases)) or "none"
        raise MechdiffError(f"Map {name} has no alias {which!r}; it has {known}.")
    numbers = ", ".join(str(v.number) for v in list_versions(store, name)) or "none"
    raise MechdiffError(f"Map {name} has no version {which}; it has {numbers}.")


def number_of(model: RegisteredModel, alias: str) -> int | None:
    """The number of the version that bears `alias`."""
    number = model.aliases.get(alias)
    return None if number is None else int(number)


def holder(store: Store, model: RegisteredModel, alias: str, known: Version | None = None) -> Version | None:
    """The version that bears `alias`; it is not asked for again where it is the `known` one."""
    number = number_of(model, alias)
    if number is None or (known is not None and known.number == number):
        return None if number is None else known
    return get_version(store, model.name, number)


def registered(store: Store, name: str) -> RegisteredModel:
    """MLflow's entity of the registered map `name`; an error says which there are."""
    if (model := _model(store, name)) is not None:
        return model
    known = sorted(model.name for model in our_models(store))
    close = difflib.get_close_matches(name, known, n=5) or known[:10]
    raise MechdiffError(f"No map is registered as {name!r}; there is {', '.join(close) or 'none yet'}.")


def find(store: Store, name: str) -> RegisteredModel | None:
    """The same, or None where there is none or this account may not look; not another kind of model."""
    try:
        model = _model(store, name)
    except NotAllowed:
        return None
    if model is not None and model.tags.get(KIND_TAG) != "map":
        raise MechdiffError(
            f"A registered model {name!r} that is no map exists already; give another name with --name."
        )
    return model


def _model(store: Store, name: str) -> RegisteredModel | None:
    try:
        with store.errors():
            return store.client.get_registered_model(name)
    except MechdiffError as error:
        if not _is_missing(error):
            raise
    return None


def our_models(store: Store, where: str = "") -> list[RegisteredModel]:
    """Every registered map that MLflow's filter finds."""
    where = " and ".join(filter(None, (f"tags.`{KIND_TAG}` = 'map'", where)))
    return list(
        store.every(
            lambda token: store.client.search_registered_models(where, max_results=_PAGE, page_token=token)
        )
    )


def version_of(found: ModelVersion, aliases: Iterable[str]) -> Version:
    """MLflow's entity as ours."""
    return Version(
        name=found.name,
        number=int(found.version),
        source=found.source,
        run_id=found.run_id or "",
        aliases=tuple(sorted(aliases)),
        tags=dict(found.tags),
    )


def aliases_of(model: RegisteredModel, number: int) -> list[str]:
    """The aliases that a version bears."""
    return sorted(alias for alias, at in model.aliases.items() if int(at) == number)


def _is_missing(error: MechdiffError) -> bool:
    cause = error.__cause__
    return isinstance(cause, MlflowException) and cause.error_code in _MISSING
