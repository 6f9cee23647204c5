"""Commands about registered maps: promote, fetch, maps and what is below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mechdiff_mlflow.cli import options, show
from mechdiff_mlflow.tracking.registry import fetch, moves, promotion, versions
from mechdiff_mlflow.tracking.registry.compare import diff
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.store.store import open_store


@click.command("promote")
@click.argument("run")
@click.option("--name", default=None, help="To register under; default PAIR-LAYER-HOOK of the run.")
@options.alias
@options.why
@options.policy
@options.force
@options.store
def promote_command(run: str, **given: Any) -> None:
    """Register the map of RUN as a model version and move an alias to it.

    The policy decides whether it may have the alias: rules of --policy, those of the options on top. Without
    any, drop and skill must lie above 0 by their 95 % intervals, nothing may have been chosen on the reported
    prompts, and the version that it replaces must be of the same pair and not better on the same prompts.

    \b
    Example:
      mechdiff promote 4f1c2e9a0b7d4c58a1e3f60718293a4b --alias champion --min-drop 30 --why "best of k"
    """
    policy = policy_of(given)
    store = open_store(given["tracking_uri"])
    alias = given["alias"]
    version = promotion.promote(
        store,
        run,
        name=given["name"],
        alias=alias,
        policy=policy,
        why=given["why"],
        say=lambda text: show.lines([text]),
    )
    show.lines(
        [
            f"{version.name} version {version.number} is @{alias}",
            show.command("fetch", f"{version.name}@{alias}", "-o", "map.pt"),
        ]
    )


@click.command("fetch")
@click.argument("name")
@click.option(
    "--out", "-o", required=True, type=click.Path(path_type=Path), help="File to write, .pt or .safetensors."
)
@click.option("--offline", is_flag=True, help="Ask only the cache of this machine, never the store.")
@options.store
def fetch_command(name: str, out: Path, offline: bool, tracking_uri: str | None) -> None:
    """Write the map called NAME@ALIAS (or NAME/3, runs:/…, a run's id) to a file, its hash verified.

    When the server does not answer, NAME means what it meant when it was last asked here; a warning says so.

    \b
    Example:
      mechdiff fetch cultural-demo-L26-attn_out@champion -o map.pt
    """
    found = fetch.fetch(name, out, tracking_uri=tracking_uri, offline=offline)
    if found.caution:
        show.warn(found.caution)
    show.lines([f"{out} is the map of {name}, sha256 {found.sha256}"])


@click.group("maps", invoke_without_command=True)
@options.store
@click.pass_context
def maps_command(context: click.Context, tracking_uri: str | None) -> None:
    """List the registered maps that an alias points to; below it, what happened to an alias.

    \b
    Example:
      mechdiff maps
    """
    if context.invoked_subcommand is None:
        show.winners(versions.list_winners(open_store(tracking_uri)))
    context.default_map = {name: {"tracking_uri": tracking_uri} for name in maps_command.commands}


@maps_command.command("history")
@click.argument("name")
@options.alias
@options.store
def history_command(name: str, alias: str, tracking_uri: str | None) -> None:
    """Show when, by whom, from where, to where and why an alias of NAME was moved.

    \b
    Example:
      mechdiff maps history cultural-demo-L26-attn_out
    """
    show.moves(moves.history(open_store(tracking_uri), name, alias), name, alias)


@maps_command.command("rollback")
@click.argument("name")
@options.alias
@options.why
@options.store
def rollback_command(name: str, alias: str, why: str, tracking_uri: str | None) -> None:
    """Give the alias back to the version of NAME that had it before, its files checked first.

    \b
    Example:
      mechdiff maps rollback cultural-demo-L26-attn_out --why "wrong prompts"
    """
    version = promotion.rollback(open_store(tracking_uri), name, alias, why=why)
    show.lines([f"{version.name} version {version.number} is @{alias} again"])


@maps_command.command("demote")
@click.argument("name")
@options.alias
@options.why
@options.store
def demote_command(name: str, alias: str, why: str, tracking_uri: str | None) -> None:
    """Take the alias away from NAME; the versions stay, and rollback undoes it.

    \b
    Example:
      mechdiff maps demote cultural-demo-L26-attn_out --why "does not replicate"
    """
    promotion.demote(open_store(tracking_uri), name, alias, why=why)
    undo = show.command("maps", "rollback", name, "--alias", alias)
    show.lines([f"{name} has no @{alias} now; {undo} undoes this"])


@maps_command.command("diff")
@click.argument("a")
@click.argument("b")
@options.store
def diff_command(a: str, b: str, tracking_uri: str | None) -> None:
    """Compare two registered maps: settings, metrics, and the cosine between them as linear maps.

    \b
    Example:
      mechdiff maps diff cultural-demo-L26-attn_out/1 cultural-demo-L26-attn_out@champion
    """
    show.map_diff(diff(open_store(tracking_uri), a, b))


def policy_of(given: dict[str, Any]) -> PromotionPolicy:
    """The policy in the options of `options.policy`: the file's, with what was given besides."""
    policy = PromotionPolicy() if given["policy"] is None else PromotionPolicy.load(given["policy"])
    return policy.with_rules(
        min_drop_pct=given["min_drop"],
        min_skill_pct=given["min_skill"],
        ci_above_zero=given["ci_above_zero"],
        allow_leak=given["allow_leak"],
        allow_pair_mismatch=given["allow_pair_mismatch"],
        force=given["force"] or None,
    )
