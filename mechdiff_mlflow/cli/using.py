"""Commands that put a map to use: steer, adapter."""

from __future__ import annotations

import dataclasses
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.cli.computing import load_as_asked, settle_threads
from mechdiff_mlflow.cli.progress import bars
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol
from mechdiff_mlflow.experiments.adapting import make_adapter
from mechdiff_mlflow.experiments.possible import check_map, check_pair
from mechdiff_mlflow.experiments.steering import prompt_set, site_of, steer
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.models.attach import Tokens
from mechdiff_mlflow.models.map_adapters import Form
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.report.adapter import adapter_card
from mechdiff_mlflow.spec.pair_spec import PairSpec, Position
from mechdiff_mlflow.text import text_of
from mechdiff_mlflow.tracking.registry.fetch import load_map
from mechdiff_mlflow.tracking.store.store import open_store

_map = click.option(
    "--map", "map", required=True, help="models:/NAME@ALIAS, NAME@ALIAS, runs:/RUN or a file."
)
_pair = click.option(
    "--pair", default=None, help="A shipped pair or the path of a pair spec; default the map's own pair."
)
_alpha = click.option(
    "--alpha",
    type=options.Text("alpha", options.one_alpha, none="map"),
    default="map",
    show_default=True,
    help="Scale instead of the map's own; replaces it, does not multiply it.",
)
_mismatch = click.option(
    "--allow-pair-mismatch", is_flag=True, help="Use a map on a pair that it was not fitted on."
)


@click.command("steer")
@_map
@click.option("--prompt", "prompts", required=True, multiple=True, help="What the user says; repeatable.")
@_pair
@_alpha
@click.option(
    "--tokens",
    type=options.Text("tokens", Tokens.parse),
    default="new",
    show_default=True,
    help="Whose activations are replaced: new, the decision token and every generated one; decision; all.",
)
@click.option(
    "--max-new-tokens",
    type=options.whole("--max-new-tokens", 32, least=1, most=100_000),
    default="32",
    show_default=True,
    help="At most so many tokens a continuation.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@_mismatch
@options.models
@options.store
def steer_command(**given: Any) -> None:
    """Continue prompts with a map at work: base, tuned (clean), tuned patched raw, and tuned patched mapped.

    Greedy. A patch puts the base's activation at the map's site into tuned: raw as it is, or mapped.

    \b
    Example:
      mechdiff steer --map cultural-demo-L26-attn_out@champion --prompt "Which fruit belongs to Heron Day?"
    """
    the_map, pair = _ready(given)
    found = steer(
        pair, the_map, given["prompts"], tokens=given["tokens"], max_new_tokens=given["max_new_tokens"]
    )
    if given["as_json"]:
        about = {
            "map": given["map"],
            "site": the_map.meta["site"],
            "alpha": the_map.alpha,
            "pair": pair.name,
            "tokens": str(given["tokens"]),
        }
        rows = [dataclasses.asdict(row) for row in found]
        show.lines([json.dumps({**about, "continuations": rows}, ensure_ascii=False, indent=2)])
        return
    at = f"{the_map.meta['site']}, α = {text_of(the_map.alpha)}"
    show.continuations(found, f"{given['map']} at {at}, {pair.name}")


@click.command("adapter")
@_map
@click.option("--to", required=True, type=click.Path(path_type=Path), help="Directory to make; new or empty.")
@_pair
@_alpha
@click.option(
    "--form",
    type=options.Text("form", Form.parse),
    default="auto",
    show_default=True,
    help="peft, a LoRA; hook, the map and a loader; auto: peft where a linear layer gives the activation.",
)
@options.reported
@_mismatch
@options.models
@options.store
def adapter_command(**given: Any) -> None:
    """Write a map as an adapter of the base model that makes base act as tuned at the map's site.

    Measures KL(base with the adapter ‖ tuned) by loading what it wrote; its README says that and how to load.

    \b
    Example:
      mechdiff adapter --map cultural-demo-L26-attn_out@champion --to adapter --alpha 1
    """
    folder: Path = given["to"]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MechdiffError(f"{folder} exists and is not an empty directory; name another with --to.")
    if not folder.absolute().parent.is_dir():
        raise MechdiffError(f"The directory {folder.absolute().parent} does not exist; create it first.")
    the_map, pair = _ready(given)
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".mechdiff-") as temporary:
        part = Path(temporary, "adapter")
        part.mkdir()
        record = make_adapter(pair, the_map, part, form=given["form"], split=given["split"], n=given["n"])
        (part / "README.md").write_text(adapter_card(record, the_map, pair), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    show.adapter(record, folder)


def _ready(given: dict[str, Any]) -> tuple[AffineMap, Pair]:
    """The map and its pair, loaded."""
    the_map = load_map(given["map"], store=open_store(given["tracking_uri"]))
    the_map = the_map if given["alpha"] is None else the_map.with_alpha(given["alpha"])
    if "site" not in the_map.meta:
        raise MechdiffError(f"Map {given['map']} does not say its site; fit it again with mechdiff fit.")
    name = given["pair"] or the_map.meta.get("pair")
    if name is None:
        raise MechdiffError(f"Map {given['map']} does not say its pair; name it with --pair.")
    try:
        spec = PairSpec.load(str(name))
    except MechdiffError:
        if given["pair"]:
            raise
        raise MechdiffError(
            f"The pair {name} of map {given['map']} does not ship; name its spec with "
            f"--pair {shlex.quote(f'{name}.yaml')}."
        ) from None
    if given["sequential"] == "yes":
        raise MechdiffError("This command needs both models at once; leave out --sequential.")

    def check(pair: Pair) -> None:
        if "prompts" in given:
            said = prompt_set(given["prompts"], spec.system)
            for role in ("base", "tuned"):
                pair.tokens(role, said, Position.DECISION)
        else:
            check_pair(Protocol(split=given["split"], n=given["n"]), pair)
        any_pair = given["allow_pair_mismatch"]
        check_map(the_map, given["map"], site_of(the_map), pair, any_pair=any_pair)

    with bars() as stage, stage("loading both models", 1):
        pair = load_as_asked(spec, {**given, "sequential": "no"}, check=check)
    settle_threads(pair)
    return the_map, pair
