"""Getting a map by name, checked, without ever touching the store's own files."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.spec.digests import file_sha256
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.content.tag_names import MAP_RUN_TAG, SHA256_TAG
from mechdiff_mlflow.tracking.flavour import LoggedMap
from mechdiff_mlflow.tracking.registry import measured
from mechdiff_mlflow.tracking.registry.versions import Version, get_version
from mechdiff_mlflow.tracking.runs.mlflow_run import plain
from mechdiff_mlflow.tracking.store import user_cache as cache
from mechdiff_mlflow.tracking.store.store import Store, StoreUnreachable, open_store, uri_of

_REGISTERED = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<number>\d+))")
_LOGGED = re.compile(r"models:/(?P<model_id>m-[0-9a-f]{32})")
_RUN = re.compile(r"runs:/(?P<run_id>\w+)(?:/.*)?|(?P<bare>[0-9a-f]{32})")
_FORMS = "NAME@alias, NAME/3, models:/NAME@alias, runs:/RUN, a run's id or the path of a map file"


class CachedAnswer(UserWarning):
    """A map came from the cache without asking the store what its name means now."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference names."""

    location: str  # URI of its files
    sha256: str  # digest of its `map.pt`
    label: str  # what to call it
    version: Version | None = None  # if it is registered, and the store was asked
    caution: str = ""  # why this may not be what the name means now, where the store was not asked

    def __post_init__(self) -> None:
        # It names a directory of the cache, and comes from the store: `../..` would be removed as damaged.
        if re.fullmatch("[0-9a-f]{64}", self.sha256) is None:
            raise MechdiffError(
                f"{self.label} has the SHA-256 {self.sha256!r:.80}, which is none; promote its run again."
            )


def resolve(store: Store, reference: str) -> Resolved:
    """What `reference` names: `NAME@champion`, `models:/NAME/3`, `models:/m-…`, `runs:/RUN`, a run's id.

    Raises:
        MechdiffError: It names nothing (says what there is), or a version that was never verified.
    """
    if match := _LOGGED.fullmatch(reference):
        with store.errors():
            model = store.client.get_logged_model(match["model_id"])
        if model.status != "READY" or SHA256_TAG not in model.tags:
            raise MechdiffError(f"{reference} is {model.status} and no complete map; fit it again.")
        return Resolved(model.artifact_location, model.tags[SHA256_TAG], reference)
    if match := _RUN.fullmatch(reference):
        logged = _map_of_run(store, match["run_id"] or match["bare"])
        return Resolved(logged.location, logged.sha256, reference)
    if (version := registered_version(store, reference)) is not None:
        return _resolved(store, _trusted(version))
    raise MechdiffError(f"{reference!r} is not the name of a map; write {_FORMS}.")


def load_map(
    reference: str | Path,
    *,
    store: Store | None = None,
    tracking_uri: str | None = None,
    offline: bool = False,
) -> AffineMap:
    """The map that `reference` names, its digest and probe checked.

    When the server does not answer, what the name meant when it was last asked is taken from the cache, with
    the warning `CachedAnswer`.

    Args:
        reference: `models:/NAME@champion`, `NAME@champion`, `models:/NAME/3`, `runs:/RUN`, or the path of a
            `.pt` or `.safetensors` file or of a saved model's directory.
        store: Where names are looked up.
        tracking_uri: The store to look in when none is given; see `open_store`.
        offline: Ask only the cache.

    Raises:
        MechdiffError: There is no such map, it was never verified, or its files have changed.
    """
    path = Path(reference)
    if path.is_dir():
        return flavour.load_verified(path)
    if path.is_file() or path.suffix in (".pt", ".safetensors"):
        return AffineMap.load(path)
    found, the_map = _get(str(reference), store, tracking_uri, offline)
    if found.caution:
        warnings.warn(found.caution, CachedAnswer, stacklevel=2)
    return the_map


def verified_map(store: Store, version: Version) -> AffineMap:
    """The map of a verified version, read from the store itself rather than the cache, and checked."""
    return read_back(store, _trusted(version))


def registered_version(store: Store, reference: str) -> Version | None:
    """The version that `NAME@champion` or `models:/NAME/3` names; None for what is no such name."""
    match = _REGISTERED.fullmatch(reference)
    return match and get_version(store, match["name"], match["alias"] or int(match["number"]))


def read_back(store: Store, version: Version) -> AffineMap:
    """The map of a version that may not be verified yet, read from the store itself and checked."""
    with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
        return _download(store, _resolved(store, version), Path(folder, "model"))


def fetch(
    reference: str,
    out: str | Path,
    *,
    store: Store | None = None,
    tracking_uri: str | None = None,
    offline: bool = False,
) -> Resolved:
    """Write the map that `reference` names to `out`, as `.pt` or `.safetensors`; what it was.

    The file appears whole or not at all. Where the store was not asked, the result has a `caution`.

    Raises:
        MechdiffError: As `load_map`, or `out` has another suffix or cannot be written.
    """
    out = Path(out)
    if out.suffix not in (".pt", ".safetensors"):
        raise MechdiffError(f"{out} has an unknown suffix; name a .pt or a .safetensors file.")
    if not out.parent.is_dir():
        raise MechdiffError(f"The directory {out.parent} does not exist; create it first.")
    found, the_map = _get(reference, store, tracking_uri, offline)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".mechdiff-") as folder:
            part = Path(folder, out.name)
            if out.suffix == ".pt":
                shutil.copyfile(cache.entry(found.sha256) / flavour.MAP_FILE, part)
                _check_digest(part, found)
            else:
                the_map.save(part)
            os.replace(part, out)
    except OSError as error:
        raise MechdiffError(f"Cannot write {out} ({error.strerror}); choose another place.") from error
    return found


def _get(
    reference: str, store: Store | None, tracking_uri: str | None, offline: bool
) -> tuple[Resolved, AffineMap]:
    """What `reference` names, and the map: from the store, or the cache where that is out of reach."""
    uri, name = store.uri if store else uri_of(tracking_uri), reference.removeprefix("models:/")
    place = cache.place(uri)
    if offline:
        answer = cache.recall(uri, name)
        if answer is None:
            raise MechdiffError(
                f"{name} of {place} was never fetched on this machine; fetch it once without --offline."
            )
        return _from_cache(answer, name, f"Offline, {place} was not asked")
    try:
        store = store or open_store(tracking_uri)
        found = resolve(store, reference)
        the_map = _load_cached(store, found)
    except StoreUnreachable:
        answer = cache.recall(uri, name)
        if answer is None:
            raise
        return _from_cache(answer, name, f"{place} does not answer")
    cache.remember(uri, name, found.label, found.sha256)
    return found, the_map


def _from_cache(answer: cache.Answer, name: str, why: str) -> tuple[Resolved, AffineMap]:
    caution = (
        f"{why}; this is the cached answer of {answer.asked}, when {name} meant {answer.label} "
        f"(sha256 {answer.sha256[:12]}…), and it may mean another map by now"
    )
    found = Resolved("", answer.sha256, answer.label, caution=caution)
    root = cache.entry(answer.sha256)
    if not root.is_dir():
        raise MechdiffError(f"{why}, and {answer.label} is not in the cache any more; fetch it when it does.")
    try:
        return found, _checked(root, found)
    except MechdiffError as error:
        raise MechdiffError(f"{why}, and the cached map is damaged: {error}") from error


def _map_of_run(store: Store, run_id: str) -> LoggedMap:
    """The only map that a run fitted, or that the run below it did, or that it measured at the same alpha."""
    with store.errors():
        run = store.client.get_run(run_id)
    maps = [one for _, some in measured.with_maps(store, run) for one in some]
    if not maps and (fit_id := run.data.tags.get(MAP_RUN_TAG)):
        with store.errors():
            fit = store.client.get_run(fit_id)
        maps = flavour.maps_of(store, fit)
        ours, theirs = (r.data.params.get("alpha", "") for r in (run, fit))
        if maps and plain("alpha", ours) != plain("alpha", theirs):
            raise MechdiffError(
                f"Run {run_id} measured the map of run {fit_id} at α={ours} and that map has α={theirs}; "
                f"promote {run_id} to have it so, or name {fit_id}."
            )
    if len(maps) != 1:
        which = ", ".join(one.model_uri for one in maps[:10])
        remedy = f"name one of {which}" if maps else "give the id of a fit run"
        raise MechdiffError(f"Run {run_id} has {len(maps)} maps; {remedy}.")
    return maps[0]


def _trusted(version: Version) -> Version:
    if not version.is_verified:
        raise MechdiffError(
            f"Version {version} was never verified, so its files may be incomplete or changed; promote its "
            "run with `mechdiff promote` or use a verified version."
        )
    return version


def _resolved(store: Store, version: Version) -> Resolved:
    with store.errors():
        location = store.client.get_model_version_download_uri(version.name, str(version.number))
    return Resolved(location, version.sha256, str(version), version)


def _load_cached(store: Store, found: Resolved) -> AffineMap:
    """From the cache if it is there and right, else from the store by way of the cache."""
    entry = cache.entry(found.sha256)
    if entry.is_dir():
        try:
            return _checked(entry, found)
        except MechdiffError:
            shutil.rmtree(entry, ignore_errors=True)  # damaged: the store decides
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".part-") as folder:
            part = Path(folder, "model")
            the_map = _download(store, found, part)
            try:
                os.rename(part, entry)
            except OSError:
                if not entry.is_dir():  # or somebody fetched the same in the meantime
                    raise
    except OSError as error:
        raise MechdiffError(
            f"The cache {entry.parent} cannot be written ({error.strerror}); name another directory in "
            f"{cache.CACHE_VARIABLE}."
        ) from error
    return the_map


def _download(store: Store, found: Resolved, target: Path) -> AffineMap:
    with store.errors():
        flavour.download(store, found.location, target)
    return _checked(target, found)


def _checked(root: Path, found: Resolved) -> AffineMap:
    the_map = flavour.load_verified(root)
    _check_digest(root / flavour.MAP_FILE, found)
    return the_map


def _check_digest(file: Path, found: Resolved) -> None:
    digest = file_sha256(file)
    if digest != found.sha256:
        raise MechdiffError(
            f"The files of {found.label} have the SHA-256 {digest[:12]}… but {found.sha256[:12]}… was "
            "registered; do not use them, and promote the run again."
        )
