"""Commands about registered maps: promote, fetch, maps and what is below it, import, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from mechdiff_mlflow.cli import show
from mechdiff_mlflow.cli.group import cli
from mechdiff_mlflow.cli.options import command, pair_name, params_of
from mechdiff_mlflow.experiments.options import (
    AliasOptions,
    ForceOptions,
    PairOptions,
    StoreOptions,
    WhyOptions,
)
from mechdiff_mlflow.experiments.requests import ImportRequest
from mechdiff_mlflow.spec.options import FLAG, PATH, TEXT, number, option
from mechdiff_mlflow.tracking.predecessor.exchange import export_manifest, import_manifest
from mechdiff_mlflow.tracking.registry import fetch, moves, promotion, versions
from mechdiff_mlflow.tracking.registry.compare import diff
from mechdiff_mlflow.tracking.registry.policy import PromotionPolicy
from mechdiff_mlflow.tracking.store.store import open_store


@dataclass(frozen=True, kw_only=True)
class PromoteRequest(AliasOptions, WhyOptions, ForceOptions, StoreOptions):
    """Register the map of RUN as a model version and move an alias to it.

    The policy decides whether it may have the alias: rules of --policy, those of the options on top. Without
    any, drop and skill must lie above 0 by their 95 % intervals, nothing may have been chosen on the reported
    prompts, and the version that it replaces must be of the same pair and not better on the same prompts.

    \b
    Example:
      mechdiff promote 4f1c2e9a0b7d4c58a1e3f60718293a4b --alias champion --min-drop 30 --why "best of k"
    """

    run: str = option(..., TEXT, "", is_argument=True)
    name: str | None = option(None, TEXT, "Registered name; default PAIR-LAYER-HOOK of the run.")
    policy: Path | None = option(
        None, PATH, "YAML file of rules, e.g. min_drop_pct: 30 and ci_above_zero: true."
    )
    min_drop: float | None = option(None, number("--min-drop", 30), "Minimum drop in percent.")
    min_skill: float | None = option(None, number("--min-skill", 10), "Minimum skill in percent.")
    ci_above_zero: bool | None = option(
        None,
        FLAG,
        "Whether the 95 % intervals of drop and skill must lie above 0, as they must by default.",
        flag="--ci-above-zero/--no-ci-above-zero",
    )
    allow_leak: bool | None = option(
        None,
        FLAG,
        "Also a map that something was chosen for on prompts it is reported on, or nobody knows.",
    )
    allow_pair_mismatch: bool | None = option(
        None,
        FLAG,
        "Also a map fitted on another pair than it was measured on, or than the version it replaces.",
    )

    @property
    def rules(self) -> PromotionPolicy:
        """The file's rules, with those of the options on top."""
        policy = PromotionPolicy() if self.policy is None else PromotionPolicy.load(self.policy)
        return policy.with_rules(
            min_drop_pct=self.min_drop,
            min_skill_pct=self.min_skill,
            ci_above_zero=self.ci_above_zero,
            allow_leak=self.allow_leak,
            allow_pair_mismatch=self.allow_pair_mismatch,
            force=self.force or None,
        )


@command(PromoteRequest)
def _promote(request: PromoteRequest) -> None:
    version = promotion.promote(
        open_store(request.tracking_uri),
        request.run,
        name=request.name,
        alias=request.alias,
        policy=request.rules,
        why=request.why,
        say=lambda text: show.lines([text]),
    )
    name = f"{version.name}@{request.alias}"
    show.lines(
        [
            f"{version.name} version {version.number} is @{request.alias}",
            show.command("fetch", name, "-o", "map.pt"),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class NamedRequest(StoreOptions):
    """Something of a registered map."""

    name: str = option(..., TEXT, "", is_argument=True)


@dataclass(frozen=True, kw_only=True)
class FetchRequest(NamedRequest):
    """Write the map called NAME@ALIAS (or NAME/3, runs:/…, a run's id) to a file, its hash verified.

    When the server does not answer, NAME means what it meant when it was last asked here; a warning says so.

    \b
    Example:
      mechdiff fetch cultural-demo-L26-attn_out@champion -o map.pt
    """

    out: Path = option(..., PATH, "File to write, .pt or .safetensors.", short="-o")
    offline: bool = option(False, FLAG, "Ask only the cache of this machine, never the store.")


@command(FetchRequest)
def _fetch(request: FetchRequest) -> None:
    found = fetch.fetch(request.name, request.out, tracking_uri=request.tracking_uri, offline=request.offline)
    if found.caution:
        show.warn(found.caution)
    show.lines([f"{request.out} is the map of {request.name}, sha256 {found.sha256}"])


@cli.group("maps", invoke_without_command=True, params=params_of(StoreOptions))
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


@dataclass(frozen=True, kw_only=True)
class HistoryRequest(AliasOptions, NamedRequest):
    """Show when, by whom, from where, to where and why an alias of NAME was moved.

    \b
    Example:
      mechdiff maps history cultural-demo-L26-attn_out
    """


@command(HistoryRequest, group=maps_command)
def _history(request: HistoryRequest) -> None:
    made = moves.history(open_store(request.tracking_uri), request.name, request.alias)
    show.moves(made, request.name, request.alias)


@dataclass(frozen=True, kw_only=True)
class RollbackRequest(WhyOptions, HistoryRequest):
    """Give the alias back to the version of NAME that had it before, its files checked first.

    \b
    Example:
      mechdiff maps rollback cultural-demo-L26-attn_out --why "wrong prompts"
    """


@command(RollbackRequest, group=maps_command)
def _rollback(request: RollbackRequest) -> None:
    store = open_store(request.tracking_uri)
    version = promotion.rollback(store, request.name, request.alias, why=request.why)
    show.lines([f"{version.name} version {version.number} is @{request.alias} again"])


@dataclass(frozen=True, kw_only=True)
class DemoteRequest(RollbackRequest):
    """Take the alias away from NAME; the versions stay, and rollback undoes it.

    \b
    Example:
      mechdiff maps demote cultural-demo-L26-attn_out --why "does not replicate"
    """


@command(DemoteRequest, group=maps_command)
def _demote(request: DemoteRequest) -> None:
    name, alias = request.name, request.alias
    promotion.demote(open_store(request.tracking_uri), name, alias, why=request.why)
    undo = show.command("maps", "rollback", name, "--alias", alias)
    show.lines([f"{name} has no @{alias} now; {undo} undoes this"])


@dataclass(frozen=True, kw_only=True)
class DiffRequest(StoreOptions):
    """Compare two registered maps: settings, metrics, and the cosine between them as linear maps.

    \b
    Example:
      mechdiff maps diff cultural-demo-L26-attn_out/1 cultural-demo-L26-attn_out@champion
    """

    a: str = option(..., TEXT, "", is_argument=True)
    b: str = option(..., TEXT, "", is_argument=True)


@command(DiffRequest, group=maps_command)
def _diff(request: DiffRequest) -> None:
    show.map_diff(diff(open_store(request.tracking_uri), request.a, request.b))


@command(ImportRequest)
def _import(request: ImportRequest) -> None:
    found = import_manifest(open_store(request.tracking_uri), request, say=lambda text: show.lines([text]))
    for row in found:
        did = "is" if row.is_new else "was already"
        show.lines([f"{row.key}: {row.version.name} version {row.version.number} {did} @{request.alias}"])
    name = f"{found[0].version.name}@{request.alias}"
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
