"""Winners of the hand-run predecessor made registered maps, and registered maps made its files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.text import text_of
from mechdiff_mlflow.tracking.content.keys import KEY_TAG, ROOT_TAG, key_of
from mechdiff_mlflow.tracking.content.names import check_alias, registered_name
from mechdiff_mlflow.tracking.content.records import RunRecord
from mechdiff_mlflow.tracking.content.tag_names import IMPORTED_FROM, PAIR_FINGERPRINT
from mechdiff_mlflow.tracking.predecessor import bundles
from mechdiff_mlflow.tracking.predecessor.bundles import Manifest
from mechdiff_mlflow.tracking.registry import registry
from mechdiff_mlflow.tracking.registry.fetch import load_map
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy, numbers, numbers_in
from mechdiff_mlflow.tracking.registry.promotion import (
    PromotionRefused,
    demand_may_promote,
    is_same_function,
    promote,
)
from mechdiff_mlflow.tracking.registry.registry import Version, winners_of
from mechdiff_mlflow.tracking.runs.lookup import all_runs
from mechdiff_mlflow.tracking.runs.mlflow_run import experiment_of
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.runs.resuming import Earlier, earlier
from mechdiff_mlflow.tracking.runs.runs import Tracker
from mechdiff_mlflow.tracking.store.store import Store, StoreUnreachable

_PARAMS = ("solver", "family", "k", "position")


@dataclass(frozen=True, slots=True)
class Import:
    """What to import, and as what.

    Args:
        manifest: The file.
        root: Folder that its paths start from and may not leave.
        pair: To call the maps after; None for what the manifest says.
        position: Which token the predecessor read.
        alias: That every map gets.
        why: For the history.
        force: Whether maps with the alias may be replaced at all: what is imported is not measured.
        experiment: For the runs; None for what `experiment_of` says.
    """

    manifest: Path
    root: Path
    pair: str | None = None
    position: Position = Position.DECISION
    alias: str = "champion"
    why: str = ""
    force: bool = False
    experiment: str | None = None


@dataclass(frozen=True, slots=True)
class Imported:
    """A winner that is a registered version now.

    Args:
        key: In the manifest.
        version: With the alias.
        is_new: False when this very map had the alias already.
    """

    key: str
    version: Version
    is_new: bool


@dataclass(frozen=True, slots=True)
class _Read:
    key: str
    path: str
    name: str
    the_map: AffineMap


def import_manifest(
    store: Store, what: Import, say: Callable[[str], object] = lambda text: None
) -> list[Imported]:
    """Register every winner of a manifest; all are read and converted before the store is touched.

    Doing it again changes nothing.

    Raises:
        MechdiffError: The manifest or a bundle is not what it should be, two winners are of one site, or
            another map has the alias.
    """
    check_alias(what.alias)
    manifest = Manifest.load(what.manifest)
    pair = what.pair or manifest.pair_name
    read = [_read(what, manifest, pair, index) for index in range(len(manifest.winners))]
    _check_one_a_site(read)
    holders = {row.name: _holder(store, row, what.alias) for row in read}
    present = {row.name: _if_same(store, row, holders[row.name]) for row in read}
    fresh = [row for row in read if present[row.name] is None]
    for row in fresh:
        if (held := holders[row.name]) is not None and not what.force:
            raise PromotionRefused(
                f"{held.name}@{what.alias} is version {held.number} with {numbers(numbers_in(held.tags))}, "
                f"and winner {row.key} is another map, not measured here; import it under another --alias "
                "and measure it, or add --force."
            )
    digests = sorted((row.name, row.path, row.the_map.sha256()) for row in read)
    left = earlier(
        store, experiment_of(store, what.experiment, pair), ["import", manifest.pair, pair, digests]
    )
    demand_may_promote(store, pair, [re.escape(row.name.removeprefix(f"{pair}-")) for row in fresh])
    if fresh or left.unfinished:
        present |= _register(store, what, manifest, pair, fresh, left, say)
    found = ((row, present[row.name]) for row in read)
    return [Imported(row.key, version, row in fresh) for row, version in found if version is not None]


def export_manifest(store: Store, folder: Path, pair: str, alias: str = "champion") -> list[Version]:
    """Write the maps of a pair that bear `alias` as the predecessor's manifest and bundles; which they were.

    Raises:
        MechdiffError: There is none, one cannot be read, or the folder is not empty.
    """
    versions = winners_of(store, pair, alias)
    maps = {}
    for version in versions:
        the_map = load_map(version.uri, store=store)
        key = bundles.key_of(the_map)
        if key in maps:
            raise MechdiffError(f"Pair {pair!r} has two maps of {key} that are @{alias}; demote one of them.")
        maps[key] = the_map
    bundles.write_manifest(folder, pair, maps)
    return versions


def _read(what: Import, manifest: Manifest, pair: str, index: int) -> _Read:
    winner = manifest.winners[index]
    path = bundles.bundle_file(what.root, winner.path)
    the_map = bundles.read_bundle(path, alpha=winner.alpha, key=winner.key, position=what.position)
    the_map = the_map.with_meta(pair=pair)
    name = registered_name(pair, Site.parse(str(the_map.meta["site"])))
    return _Read(winner.key, winner.path, name, the_map)


def _check_one_a_site(read: Sequence[_Read]) -> None:
    first: dict[str, str] = {}
    for row in read:
        if row.name in first:
            raise MechdiffError(
                f"Winners {first[row.name]} and {row.key} are of one site and would both be {row.name}; "
                "leave one in the manifest and import the other under another --alias."
            )
        first[row.name] = row.key


def _holder(store: Store, row: _Read, alias: str) -> Version | None:
    """The version with the alias."""
    try:
        return registry.get_version(store, row.name, alias)
    except StoreUnreachable:
        raise
    except MechdiffError:  # no such name or alias yet
        return None


def _if_same(store: Store, row: _Read, version: Version | None) -> Version | None:
    same = version is not None and version.is_verified and is_same_function(store, row.the_map, version)
    return version if same else None


def _register(
    store: Store,
    what: Import,
    manifest: Manifest,
    pair: str,
    fresh: Sequence[_Read],
    left: Earlier,
    say: Callable[[str], object],
) -> dict[str, Version | None]:
    """Log the maps that no earlier attempt logged whole, then promote each."""
    policy = PromotionPolicy(force=what.force)
    records = {row.name: _record(row, manifest.pair, pair) for row in fresh}
    logged = {} if left.finished is None else _logged_below(store, left.finished, records)
    rest = [name for name in records if name not in logged]
    title = f"import of {len(manifest.winners)} maps"
    with ExitStack() as stack:
        if rest or left.unfinished is not None:
            tracker = Tracker(store, experiment_of(store, what.experiment, pair), resume=left.unfinished)
            params = {"pair": pair, "position": str(what.position)}
            run = stack.enter_context(tracker.run("import", title, params, tags=left.tag))
            source = what.manifest.read_text(encoding="utf-8")
            run.add(RunRecord(kind="import", name=title, texts={bundles.MANIFEST: source}))
            logged |= {name: run.log(records[name]) for name in rest}
        return {
            name: promote(
                store,
                logged[name],
                name=name,
                alias=what.alias,
                policy=policy,
                why=what.why or title,
                say=say,
            )
            for name in records
        }


def _logged_below(store: Store, parent: Run, records: Mapping[str, RunRecord]) -> dict[str, str]:
    """Ids of the runs below `parent` that hold some of the records."""
    names = {key_of(record, code_version()): name for name, record in records.items()}
    where = f"tags.`{ROOT_TAG}` = '{parent.info.run_id}' and attributes.status = 'FINISHED'"
    found = all_runs(store, [parent.info.experiment_id], where)
    return {
        names[run.data.tags[KEY_TAG]]: run.info.run_id for run in found if run.data.tags[KEY_TAG] in names
    }


def _record(row: _Read, written_pair: str, pair: str) -> RunRecord:
    meta = row.the_map.meta
    site = Site.parse(str(meta["site"]))
    known = {PAIR_FINGERPRINT: str(meta["fingerprint"])} if "fingerprint" in meta else {}
    source = f"{row.path} (sha256 {meta.get('bundle_sha256', 'unknown')})"
    return RunRecord(
        kind="import",
        name=f"import {site} {meta['solver']} α={text_of(row.the_map.alpha)}",
        params={
            "pair": pair,
            "layer": site.layer,
            "hook": str(site.hook),
            "alpha": row.the_map.alpha,
            **{key: str(meta[key]) for key in _PARAMS if key in meta},
        },
        tags={"mechdiff.site": str(site), IMPORTED_FROM: source, **known},
        map=row.the_map,
        description=(
            f"Imported from `{row.path}` of pair `{written_pair}`, α={text_of(row.the_map.alpha)}. Not "
            "measured here: the predecessor patched every hook but attn_out into the block's output, so its "
            "numbers are not comparable; measure it with `mechdiff patch --allow-pair-mismatch`."
        ),
    )
