"""Getting a map by name, checked, without ever touching the store's own files."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps import AffineMap
from mechdiff_mlflow.tracking import flavour
from mechdiff_mlflow.tracking.registry import Version, get_version
from mechdiff_mlflow.tracking.store import Store, open_store

CACHE_VARIABLE = "MECHDIFF_CACHE"

_REGISTERED = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<number>\d+))")
_LOGGED = re.compile(r"models:/(?P<model_id>m-[0-9a-f]{32})")
_RUN = re.compile(r"runs:/(?P<run_id>\w+)(?:/.*)?")
_FORMS = "NAME@alias, NAME/3, models:/NAME@alias, runs:/RUN or the path of a map file"


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference names.

    Args:
        location: URI of the model's files.
        sha256: What the digest of its `map.pt` must be.
        label: What to call it.
        version: The registered version, if it is one.
    """

    location: str
    sha256: str
    label: str
    version: Version | None = None

    def __post_init__(self) -> None:
        # It names a directory of the cache, and comes from the store: `../..` would be removed as damaged.
        if re.fullmatch("[0-9a-f]{64}", self.sha256) is None:
            raise MechdiffError(
                f"{self.label} has the SHA-256 {self.sha256!r:.80}, which is none; promote its run again."
            )


def resolve(store: Store, reference: str) -> Resolved:
    """What `reference` names: `NAME@champion`, `models:/NAME/3`, `models:/m-…`, `runs:/RUN`.

    Raises:
        MechdiffError: It names nothing (says what there is), or a version that was never verified.
    """
    if match := _LOGGED.fullmatch(reference):
        with store.errors():
            model = store.client.get_logged_model(match["model_id"])
        if model.status != "READY" or flavour.SHA256_TAG not in model.tags:
            raise MechdiffError(f"{reference} is {model.status} and no complete map; fit it again.")
        return Resolved(model.artifact_location, model.tags[flavour.SHA256_TAG], reference)
    if match := _RUN.fullmatch(reference):
        maps = flavour.maps_of_run(store, match["run_id"])
        if len(maps) != 1:
            which = ", ".join(f"models:/{m.model_id}" for m in maps)
            remedy = f"name one of {which}" if maps else "give the id of a fit run"
            raise MechdiffError(f"Run {match['run_id']} has {len(maps)} maps; {remedy}.")
        return Resolved(maps[0].location, maps[0].sha256, reference)
    if match := _REGISTERED.fullmatch(reference):
        version = get_version(store, match["name"], match["alias"] or int(match["number"]))
        return _resolved(store, _trusted(version))
    raise MechdiffError(f"{reference!r} is not the name of a map; write {_FORMS}.")


def load_map(
    reference: str | Path, *, store: Store | None = None, tracking_uri: str | None = None
) -> AffineMap:
    """The map that `reference` names, its digest and probe checked.

    Args:
        reference: `models:/NAME@champion`, `NAME@champion`, `models:/NAME/3`, `runs:/RUN`, or the path of a
            `.pt` or `.safetensors` file or of a saved model's directory.
        store: Where names are looked up.
        tracking_uri: The store to open when none is given; see `open_store`.

    Raises:
        MechdiffError: There is no such map, it was never verified, or its files have changed.
    """
    path = Path(reference)
    if path.is_dir():
        return flavour.load_verified(path)
    if path.is_file() or path.suffix in (".pt", ".safetensors"):
        return AffineMap.load(path)
    store = store or open_store(tracking_uri)
    return _load_cached(store, resolve(store, str(reference)))


def verified_map(store: Store, version: Version) -> AffineMap:
    """The map of a registered version, read from the store itself rather than the cache, and checked.

    Raises:
        MechdiffError: The version was never verified or its files have changed.
    """
    return read_back(store, _trusted(version))


def read_back(store: Store, version: Version) -> AffineMap:
    """The map of a registered version that may not be verified yet, read from the store and checked.

    Raises:
        MechdiffError: Its files are not what was registered.
    """
    found = _resolved(store, version)
    with tempfile.TemporaryDirectory(prefix="mechdiff-") as folder:
        return _download(store, found, Path(folder, "model"))


def fetch(store: Store, reference: str, out: str | Path) -> Resolved:
    """Write the map that `reference` names to `out`, as `.pt` or `.safetensors`; what it was.

    The file appears whole or not at all.

    Raises:
        MechdiffError: As `load_map`, or `out` has another suffix or cannot be written.
    """
    out = Path(out)
    if out.suffix not in (".pt", ".safetensors"):
        raise MechdiffError(f"{out} has an unknown suffix; name a .pt or a .safetensors file.")
    if not out.parent.is_dir():
        raise MechdiffError(f"The directory {out.parent} does not exist; create it first.")
    found = resolve(store, reference)
    the_map = _load_cached(store, found)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".mechdiff-") as folder:
            part = Path(folder, out.name)
            if out.suffix == ".pt":
                shutil.copyfile(_cache_entry(found.sha256) / flavour.MAP_FILE, part)
                _check_digest(part, found)
            else:
                the_map.save(part)
            os.replace(part, out)
    except OSError as error:
        raise MechdiffError(f"Cannot write {out} ({error.strerror}); choose another place.") from error
    return found


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
    entry = _cache_entry(found.sha256)
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
            with suppress(FileExistsError):  # somebody fetched the same in the meantime
                os.rename(part, entry)
    except OSError as error:
        raise MechdiffError(
            f"The cache {entry.parent} cannot be written ({error.strerror}); name another directory in "
            f"{CACHE_VARIABLE}."
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
    digest = flavour.digest(file)
    if digest != found.sha256:
        raise MechdiffError(
            f"The files of {found.label} have the SHA-256 {digest[:12]}… but {found.sha256[:12]}… was "
            "registered; do not use them, and promote the run again."
        )


def _cache_entry(sha256: str) -> Path:
    if root := os.environ.get(CACHE_VARIABLE):
        base = Path(root)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home())) / "mechdiff" / "cache"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechdiff"
    return base / "maps" / sha256
