"""Winners of the hand-run predecessor made registered maps, and registered maps made its files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.requests import ImportRequest
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.text import text_of
from mechdiff_mlflow.tracking.content.names import check_alias, registered_name
from mechdiff_mlflow.tracking.content.records import RunRecord, key_of
from mechdiff_mlflow.tracking.content.tag_names import IMPORTED_FROM, KEY_TAG, PAIR_FINGERPRINT, ROOT_TAG
from mechdiff_mlflow.tracking.predecessor import bundles
from mechdiff_mlflow.tracking.predecessor.bundles import Manifest
from mechdiff_mlflow.tracking.registry.fetch import load_map
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy, numbers, numbers_in
from mechdiff_mlflow.tracking.registry.promotion import (
    PromotionRefused,
    is_same_function,
    promote,
    require_may_promote,
)
from mechdiff_mlflow.tracking.registry.versions import Version, get_version, winners_of
from mechdiff_mlflow.tracking.runs.lookup import each_run
from mechdiff_mlflow.tracking.runs.mlflow_run import experiment_of
from mechdiff_mlflow.tracking.runs.provenance import code_version
from mechdiff_mlflow.tracking.runs.resuming import EarlierAttempts, earlier_attempts
from mechdiff_mlflow.tracking.runs.tracker import Tracker
from mechdiff_mlflow.tracking.store.store import Store, StoreUnreachable


@dataclass(frozen=True, slots=True)
class Imported:
    """A winner of the manifest that is a version with the alias; `is_new` unless it was that before."""

    key: str
    version: Version
    is_new: bool


@dataclass(frozen=True, slots=True)
class _Winner:
    key: str
    path: str
    site: Site
    the_map: AffineMap


def import_manifest(
    store: Store, request: ImportRequest, say: Callable[[str], object] = lambda text: None
) -> list[Imported]:
    """Register every winner of a manifest; all are read and converted before the store is touched.

    Doing it again changes nothing.

    Raises:
        MechdiffError: The manifest or a bundle is not what it should be, two winners are of one site, or
            another map has the alias.
    """
    check_alias(request.alias)
    manifest = Manifest.load(request.manifest)
    pair = request.pair or manifest.pair_name
    if request.pair and Path(request.pair).is_file():
        pair = PairSpec.load(request.pair).name
    winners = _read(request, manifest, pair)
    present = {name: version for name in winners if (version := _holder(store, name, request.alias))}
    fresh = {}
    for name, winner in winners.items():
        held = present.get(name)
        if held is not None and held.is_verified and is_same_function(store, winner.the_map, held):
            continue
        if held is not None and not request.force:
            raise PromotionRefused(
                f"{held.name}@{request.alias} is version {held.number} with "
                f"{numbers(numbers_in(held.tags))}, and winner {winner.key} is another map, not measured "
                "here; import it under another --alias and measure it, or add --force."
            )
        fresh[name] = winner
    experiment = experiment_of(store, request.experiment, pair)
    digests = sorted((name, winner.path, winner.the_map.sha256()) for name, winner in winners.items())
    left = earlier_attempts(store, experiment, ["import", manifest.pair, pair, digests])
    require_may_promote(store, pair, [re.escape(winner.site.slug) for winner in fresh.values()])
    if fresh or left.unfinished:
        tracker = Tracker(store, experiment, resume=left.unfinished)
        present |= _register(tracker, request, manifest, pair, fresh, left, say)
    return [Imported(winner.key, present[name], name in fresh) for name, winner in winners.items()]


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


def _read(request: ImportRequest, manifest: Manifest, pair: str) -> dict[str, _Winner]:
    """The winners of a manifest, by the name that each is registered under."""
    found: dict[str, _Winner] = {}
    root = request.root or request.manifest.parent
    for key, winner in manifest.winners.items():
        path = bundles.bundle_file(root, winner.path)
        the_map = bundles.read_bundle(path, alpha=winner.alpha, key=key, position=request.position)
        site = Site.parse(str(the_map.meta["site"]))
        name = registered_name(pair, site)
        if name in found:
            raise MechdiffError(
                f"Winners {found[name].key} and {key} are of one site and would both be {name}; leave one in "
                "the manifest and import the other under another --alias."
            )
        found[name] = _Winner(key, winner.path, site, the_map.with_meta(pair=pair))
    return found


def _holder(store: Store, name: str, alias: str) -> Version | None:
    try:
        return get_version(store, name, alias)
    except StoreUnreachable:
        raise
    except MechdiffError:  # no such name or alias yet
        return None


def _register(
    tracker: Tracker,
    request: ImportRequest,
    manifest: Manifest,
    pair: str,
    fresh: Mapping[str, _Winner],
    left: EarlierAttempts,
    say: Callable[[str], object],
) -> dict[str, Version]:
    """Log the maps that no earlier attempt logged whole, then promote each."""
    store, title = tracker.store, f"import of {len(manifest.winners)} maps"
    records = {name: _record(winner, manifest.pair, pair) for name, winner in fresh.items()}
    logged = {} if left.finished is None else _logged_below(store, left.finished, records)
    rest = [name for name in records if name not in logged]
    with ExitStack() as stack:
        if rest or left.unfinished is not None:
            params = {"pair": pair, "position": str(request.position)}
            run = stack.enter_context(tracker.run("import", title, params, tags=left.tag))
            source = request.manifest.read_text(encoding="utf-8")
            run.add(RunRecord(kind="import", name=title, texts={bundles.MANIFEST: source}))
            logged |= {name: run.log(records[name]) for name in rest}
        alias, policy, why = request.alias, PromotionPolicy(force=request.force), request.why or title
        return {
            name: promote(store, logged[name], name=name, alias=alias, policy=policy, why=why, say=say)
            for name in records
        }


def _logged_below(store: Store, parent: Run, records: Mapping[str, RunRecord]) -> dict[str, str]:
    """Ids of the runs below `parent` that hold some of the records."""
    names = {key_of(record, code_version()): name for name, record in records.items()}
    where = f"tags.`{ROOT_TAG}` = '{parent.info.run_id}' and attributes.status = 'FINISHED'"
    found = {
        run.data.tags[KEY_TAG]: run.info.run_id for run in each_run(store, [parent.info.experiment_id], where)
    }
    return {name: found[key] for key, name in names.items() if key in found}


def _record(winner: _Winner, written_pair: str, pair: str) -> RunRecord:
    meta, alpha = winner.the_map.meta, winner.the_map.alpha
    known = {PAIR_FINGERPRINT: str(meta["fingerprint"])} if "fingerprint" in meta else {}
    source = f"{winner.path} (sha256 {meta.get('bundle_sha256', 'unknown')})"
    return RunRecord(
        kind="import",
        name=f"import {winner.site} {meta['solver']} α={text_of(alpha)}",
        params={
            "pair": pair,
            "layer": winner.site.layer,
            "hook": str(winner.site.hook),
            "alpha": alpha,
            **{key: str(meta[key]) for key in ("solver", "family", "k", "position") if key in meta},
        },
        tags={"mechdiff.site": str(winner.site), IMPORTED_FROM: source, **known},
        map=winner.the_map,
        description=(
            f"Imported from `{winner.path}` of pair `{written_pair}`, α={text_of(alpha)}. Not measured here: "
            "the predecessor patched every hook but attn_out into the block's output, so its numbers are not "
            "comparable; measure it with `mechdiff patch --allow-pair-mismatch`."
        ),
    )
