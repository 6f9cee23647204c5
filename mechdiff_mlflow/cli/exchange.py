"""Commands that take the predecessor's files in and give them out: import, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.tracking.predecessor.exchange import Import, export_manifest, import_manifest
from mechdiff_mlflow.tracking.store.store import open_store


@click.command("import")
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder that the manifest's paths start from and may not leave; default the manifest's own.",
)
@click.option("--pair", default=None, help="Name or spec of the pair; default what the manifest says.")
@options.position
@options.alias
@options.why
@options.force
@options.tracking
def import_command(manifest: Path, **given: Any) -> None:
    """Register the winners of a hand-made MANIFEST (pair, winners: path and alpha) with an alias.

    Its .pt bundles are read without unpickling, and become maps with the same outputs.

    \b
    Example:
      mechdiff import winners/manifest.json --pair cultural-demo --alias imported
    """
    what = Import(
        manifest=manifest,
        root=given["root"] or manifest.parent,
        pair=options.pair_name(given["pair"]) if given["pair"] is not None else None,
        position=given["position"],
        alias=given["alias"],
        why=given["why"],
        force=given["force"],
        experiment=given["experiment"],
    )
    store = open_store(given["tracking_uri"])
    found = import_manifest(store, what, say=lambda text: show.lines([text]))
    for row in found:
        did = "is" if row.is_new else "was already"
        show.lines([f"{row.key}: {row.version.name} version {row.version.number} {did} @{what.alias}"])
    name = f"{found[0].version.name}@{what.alias}"
    show.lines([f"Fetch: {show.command('fetch', name, '-o', 'map.pt')}"])


@click.command("export")
@click.argument("folder", type=click.Path(path_type=Path))
@options.pair
@options.alias
@options.store
def export_command(folder: Path, pair: str, alias: str, tracking_uri: str | None) -> None:
    """Write the maps of a pair that have an alias as manifest.json and .pt bundles into a new FOLDER.

    \b
    Example:
      mechdiff export exported --pair cultural-demo --alias champion
    """
    versions = export_manifest(open_store(tracking_uri), folder, options.pair_name(pair), alias)
    show.lines([f"{folder / 'manifest.json'} lists {', '.join(map(str, versions))}"])
