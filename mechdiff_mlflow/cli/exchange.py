"""Commands that take the original experiment's files in and give them out: import, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mechdiff_mlflow.cli import show
from mechdiff_mlflow.cli.options import command, pair_name
from mechdiff_mlflow.experiments.options import (
    AliasOptions,
    ForceOptions,
    PairOptions,
    PositionOptions,
    StoreOptions,
    TrackingOptions,
    WhyOptions,
)
from mechdiff_mlflow.spec.options import PATH, TEXT, option
from mechdiff_mlflow.tracking.predecessor.exchange import Import, export_manifest, import_manifest
from mechdiff_mlflow.tracking.store.store import open_store


@dataclass(frozen=True, kw_only=True)
class ImportRequest(PositionOptions, AliasOptions, WhyOptions, ForceOptions, TrackingOptions):
    """Register the winners of a hand-made MANIFEST (pair, winners: path and alpha) with an alias.

    Its .pt bundles are read without unpickling, and become maps with the same outputs.

    \b
    Example:
      mechdiff import winners/manifest.json --pair cultural-demo --alias imported
    """

    manifest: Path = option(..., PATH, "", is_argument=True)
    root: Path | None = option(None, PATH, "Folder in which its paths lie; default the manifest's own.")
    pair: str | None = option(None, TEXT, "Name or spec of the pair; default what the manifest says.")


@command(ImportRequest)
def _import(request: ImportRequest) -> None:
    what = Import(
        manifest=request.manifest,
        root=request.root or request.manifest.parent,
        pair=None if request.pair is None else pair_name(request.pair),
        position=request.position,
        alias=request.alias,
        why=request.why,
        force=request.force,
        experiment=request.experiment,
    )
    found = import_manifest(open_store(request.tracking_uri), what, say=lambda text: show.lines([text]))
    for row in found:
        did = "is" if row.is_new else "was already"
        show.lines([f"{row.key}: {row.version.name} version {row.version.number} {did} @{what.alias}"])
    name = f"{found[0].version.name}@{what.alias}"
    show.lines([f"Fetch: {show.command('fetch', name, '-o', 'map.pt')}"])


@dataclass(frozen=True, kw_only=True)
class ExportRequest(PairOptions, AliasOptions, StoreOptions):
    """Write the maps of a pair that have an alias as manifest.json and .pt bundles into a new FOLDER.

    \b
    Example:
      mechdiff export exported --pair cultural-demo --alias champion
    """

    folder: Path = option(..., PATH, "", is_argument=True)


@command(ExportRequest)
def _export(request: ExportRequest) -> None:
    store, pair = open_store(request.tracking_uri), pair_name(request.pair)
    versions = export_manifest(store, request.folder, pair, request.alias)
    show.lines([f"{request.folder / 'manifest.json'} lists {', '.join(map(str, versions))}"])
