"""Commands about registered maps: promote, fetch, maps."""

from __future__ import annotations

from pathlib import Path

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.tracking import fetch, registry
from mechdiff_mlflow.tracking.promotion import promote
from mechdiff_mlflow.tracking.store import open_store


@click.command("promote")
@click.argument("run")
@click.option("--alias", default="champion", show_default=True, help="Name under which people fetch the map.")
@options.store
def promote_command(run: str, alias: str, tracking_uri: str | None) -> None:
    """Register the map of RUN as a model version and move an alias to it.

    \b
    Example:
      mechdiff promote 4f1c2e9a0b7d4c58a1e3f60718293a4b --alias champion
    """
    version = promote(open_store(tracking_uri), run, alias=alias)
    show.lines(
        [
            f"{version.name} version {version.number} is @{alias}",
            f"mechdiff fetch {version.name}@{alias} -o map.pt",
        ]
    )


@click.command("fetch")
@click.argument("name")
@click.option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), help="File to write, .pt or .safetensors."
)
@options.store
def fetch_command(name: str, out: Path, tracking_uri: str | None) -> None:
    """Write the map called NAME@ALIAS (or models:/…, runs:/…) to a file, its hash verified.

    \b
    Example:
      mechdiff fetch cultural-demo-L26-attn_out@champion -o map.pt
    """
    found = fetch.fetch(open_store(tracking_uri), name, out)
    show.lines([f"{out} is the map of {name}, sha256 {found.sha256}"])


@click.command("maps")
@options.store
def maps_command(tracking_uri: str | None) -> None:
    """List the registered maps that an alias points to.

    \b
    Example:
      mechdiff maps
    """
    show.winners(registry.list_winners(open_store(tracking_uri)))
