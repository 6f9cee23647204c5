"""What runs support: their table as typed rows, the newest of each cell, and the one to quote a site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pandas as pd

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.records import PatchRecord
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.measures.stats import Interval
from mechdiff_mlflow.solvers import SETTINGS
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.text import markdown

Row: TypeAlias = Mapping[str, Any]
LEVEL = 0.95
_OLD_LEAKS = {"true": "Leak: settings chosen on the reported prompts", "unknown": selection.sentence(None)}
FROM = {"report_pass": 3, "run": 2, "patch": 2, "sweep": 1, "atlas": 0}
"""Kinds of runs that patches stand under, by how much their choice of map is worth quoting."""
PICKED_FROM = ("sweep", "atlas")
"""Where the best of several is picked on the reported split itself."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """What two patches must share for their numbers to be compared."""

    split: str
    n: int
    n_train: int
    seed: int
    position: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.n} {self.split} prompts, {self.n_train} train prompts, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Measured:
    """One patch run.

    Args:
        run_id: Of the run.
        parent_id: Of the run above it, or None.
        source: Kind of the run above it; `patch` of a lone run.
        site: Where.
        solver: By which solver.
        family: What its rank bounds.
        k: Rank; None is full.
        alpha: Scale.
        conditions: Of the measurement.
        kl_raw: Mean KL of the raw cross-patch in nats, or None.
        kl_mapped: Mean KL of the mapped patch in nats.
        noise_floor: What KL must stand out from, nats.
        rho: ‖Y − Ŷ‖ / ‖Y − X‖, or None.
        drop: drop_pct with its interval, or None.
        skill: skill_pct with its interval, or None.
        null: The best control, chosen on val.
        controls: Mean KL of every control in nats.
        leak: In words what was chosen on prompts that are reported, or that nobody knows; empty if nothing.
        undefined: Why numbers have no value, by name.
        settings: How the map was made beyond solver, family, rank and scale.
        p_permutation: Of fits of shuffled pairs, or None where there were none.
        asked_alpha: α as the run above was asked for it, such as `auto`.
    """

    run_id: str
    parent_id: str | None
    source: str
    site: Site
    solver: str
    family: str
    k: int | None
    alpha: float
    conditions: Conditions
    kl_raw: float | None
    kl_mapped: float
    noise_floor: float
    rho: float | None
    drop: Interval | None
    skill: Interval | None
    null: str
    controls: Mapping[str, float]
    leak: str
    undefined: Mapping[str, str]
    settings: str
    p_permutation: float | None
    asked_alpha: str

    @property
    def rank(self) -> str:
        """The rank as users write it."""
        return "full" if self.k is None else str(self.k)


@dataclass(frozen=True, slots=True)
class Quoted:
    """The patch that stands for a site.

    Args:
        patch: It.
        picked_among: How many cells of the site it is the best of, on the very split reported; 1 if it was
            not picked so.
    """

    patch: Measured
    picked_among: int


@dataclass(frozen=True)
class Evidence:
    """All that the runs of a pair show, of one state of its models and prompts.

    Args:
        pair: Its name.
        fingerprint: Of its models and prompts.
        patches: The newest run of every cell and conditions, by site and rank.
        parents: Runs above them: run_id, name, kind, started, `tag.mechdiff.command`.
        least_ranks: Rows of the sweeps' `least_ranks.json`, newest first, with their run_id.
        atlas: The newest atlas's `atlas.json`, or None.
        atlas_run: Its run id.
        layers: The newest `layers.json`, or None.
        layers_run: Its run id.
        heads: By site the newest `heads.json`.
        left_out: Patch runs of other states of the pair, which are not comparable.
    """

    pair: str
    fingerprint: str
    patches: Sequence[Measured]
    parents: pd.DataFrame
    least_ranks: pd.DataFrame
    atlas: pd.DataFrame | None = None
    atlas_run: str = ""
    layers: pd.DataFrame | None = None
    layers_run: str = ""
    heads: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    left_out: int = 0

    @classmethod
    def of(cls, pair: str, runs: pd.DataFrame, tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> Evidence:
        """Read a table of runs.

        Args:
            pair: The pair's name.
            runs: What `tracking.results.results_df` gives, newest first.
            tables: By name of the artifact and run id, the tables of runs.

        Raises:
            MechdiffError: No run has patched anything.
        """
        kinds = dict(zip(runs["run_id"], runs["kind"], strict=True))
        plain: list[Row] = [{str(key): row[key] for key in row} for row in runs.to_dict("records")]
        ours = [row for row in plain if not foreign.is_missing(row["kind"])]  # others have their own params
        asked = {str(row["run_id"]): _text(row, "alpha") for row in ours}
        rows = [row for row in ours if _is_patch(row, pair)]
        if not rows:
            raise MechdiffError(
                f"No finished patch run of pair {pair!r} is there to report on; make one with mechdiff run "
                "or mechdiff sweep, or name its --experiment."
            )
        every: list[tuple[str, Measured]] = []
        for row in rows:
            try:
                every.append((_text(row, "tag.pair_fingerprint"), _measured(row, kinds, asked)))
            except foreign.Malformed as error:
                foreign.left_out(f"run {row['run_id']}", error)
        fingerprint = every[0][0] if every else ""
        own = [patch for theirs, patch in every if theirs == fingerprint]
        if not own:
            raise MechdiffError(f"Every patch run of pair {pair!r} is malformed; correct or delete them.")
        newest: dict[tuple[object, ...], Measured] = {}
        for patch in own:
            map_ = (patch.solver, patch.family, patch.k, patch.alpha, patch.settings)
            cell = (patch.site, *map_, patch.conditions)
            # A map that was pinned under a report pass is the same cell as the sweep's that found it.
            kept = newest.get(cell)
            if kept is None or FROM.get(patch.source, 0) > FROM.get(kept.source, 0):
                newest[cell] = patch
        above = {patch.parent_id or patch.run_id for patch in newest.values()}
        used = {run_id for found in tables.values() for run_id in found}
        parents = runs[runs["run_id"].isin(above | used)]
        atlas_run, atlas = _newest(runs, tables.get("atlas.json", {}))
        layers_run, layers = _newest(runs, tables.get("layers.json", {}))
        return cls(
            pair,
            markdown(fingerprint, 80),
            sorted(newest.values(), key=lambda p: (p.site, p.solver, p.family, p.k or math.inf, p.alpha)),
            parents,
            _stacked(runs, tables.get("least_ranks.json", {})),
            atlas,
            atlas_run,
            layers,
            layers_run,
            _by_site(runs, tables.get("heads.json", {})),
            len(every) - len(own),
        )

    def quoted(self) -> list[Quoted]:
        """The patch that stands for each site: of a pinned winner, else of the newest run, else the best."""
        by_site: dict[Site, list[Measured]] = {}
        for patch in self.patches:
            by_site.setdefault(patch.site, []).append(patch)
        order = {run_id: i for i, run_id in enumerate(self.parents["run_id"])}
        found = []
        for _, patches in sorted(by_site.items()):
            best = max(FROM.get(patch.source, 0) for patch in patches)
            among = [patch for patch in patches if FROM.get(patch.source, 0) == best]
            if among[0].source in PICKED_FROM:
                top = max(among, key=lambda p: -math.inf if p.drop is None else p.drop.estimate or -math.inf)
                found.append(Quoted(top, len(among)))
            else:
                found.append(
                    Quoted(min(among, key=lambda p: order.get(p.parent_id or p.run_id, len(order))), 1)
                )
        return found


def of_record(record: PatchRecord) -> Measured:
    """A patch that has just been measured, whose run is not there yet."""
    cell = record.cell
    return Measured(
        run_id="",
        parent_id=None,
        source="patch",
        site=cell.site,
        solver=cell.solver,
        family=cell.family,
        k=cell.rank.k,
        alpha=record.map.alpha,
        conditions=Conditions(record.split, record.n, 0, 0, "", ""),
        kl_raw=record.kl_raw,
        kl_mapped=record.kl_mapped,
        noise_floor=record.noise_floor,
        rho=record.rho,
        drop=record.drop_pct,
        skill=record.skill_pct,
        null=record.null,
        controls=record.controls,
        leak=selection.sentence(record.leak),
        undefined=record.undefined,
        settings="",
        p_permutation=record.p_permutation,
        asked_alpha="",
    )


def _is_patch(row: Row, pair: str) -> bool:
    measured = (
        row["kind"] == "patch"
        and row["status"] == "FINISHED"
        and not foreign.is_missing(row.get("KL_mapped"))
    )
    return bool(measured and row.get("pair") == pair)


def _measured(row: Row, kinds: Mapping[str, str], asked: Mapping[str, str]) -> Measured:
    parent = None if foreign.is_missing(row["parent_id"]) else str(row["parent_id"])
    return Measured(
        run_id=str(row["run_id"]),
        parent_id=parent,
        source=kinds.get(parent or "", "patch"),
        site=foreign.site(row),
        solver=foreign.word(row, "solver"),
        family=foreign.word(row, "family"),
        k=foreign.rank(row, "k"),
        alpha=foreign.number(row, "alpha"),
        conditions=Conditions(
            foreign.word(row, "split"),
            foreign.whole(row, "n"),
            foreign.whole(row, "n_train"),
            foreign.whole(row, "seed"),
            foreign.word(row, "position"),
            foreign.word(row, "dtype"),
        ),
        kl_raw=_number(row, "KL_raw"),
        kl_mapped=foreign.number(row, "KL_mapped"),
        noise_floor=foreign.number(row, "noise_floor"),
        rho=_number(row, "rho"),
        drop=_interval(row, "drop_pct"),
        skill=_interval(row, "skill_pct"),
        null=markdown(_text(row, "tag.null")),
        controls={
            markdown(str(key).removeprefix("control/")): foreign.number(row, key)
            for key in row
            if str(key).startswith("control/") and not foreign.is_missing(row[key])
        },
        leak=_text(row, "tag.selection") or _OLD_LEAKS.get(_text(row, "tag.selection_leak"), ""),
        undefined={
            str(key).removeprefix("tag.mechdiff.undefined."): markdown(row[key])
            for key in row
            if str(key).startswith("tag.mechdiff.undefined.") and not foreign.is_missing(row[key])
        },
        settings=", ".join(
            f"{setting.name}={markdown(_text(row, setting.name), 80)}"
            for setting in SETTINGS
            if _text(row, setting.name) not in ("", "n/a")
        ),
        p_permutation=_number(row, "p/permutation"),
        asked_alpha=str(foreign.scales(asked, parent or "")) if asked.get(parent or "") else "",
    )


def _newest(runs: pd.DataFrame, found: Mapping[str, pd.DataFrame]) -> tuple[str, pd.DataFrame | None]:
    for run_id in runs["run_id"]:
        if run_id in found:
            return str(run_id), found[run_id]
    return "", None


def _stacked(runs: pd.DataFrame, found: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """The rows of several runs, newest first, each question once."""
    empty: pd.DataFrame = pd.DataFrame()
    parts = [found[run_id].assign(run_id=run_id) for run_id in runs["run_id"] if run_id in found]
    if not parts:
        return empty
    keys = ["site", "solver", "family", "alpha", "target_pct"]
    stacked: pd.DataFrame = pd.concat(parts).drop_duplicates(keys).sort_values(keys).reset_index(drop=True)
    return stacked


def _by_site(runs: pd.DataFrame, found: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    newest: dict[str, pd.DataFrame] = {}
    for run_id in runs["run_id"]:
        if run_id in found and len(found[run_id]):
            newest.setdefault(str(found[run_id]["site"].iloc[0]), found[run_id].assign(run_id=run_id))
    return newest


def _interval(row: Row, key: str) -> Interval | None:
    estimate = _number(row, key)
    if estimate is None:
        return None
    return Interval(estimate, _number(row, f"ci/{key}_low"), _number(row, f"ci/{key}_high"), LEVEL)


def _number(row: Mapping[Any, Any], key: str) -> float | None:
    return None if foreign.is_missing(row.get(key)) else foreign.number(row, key)


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    return "" if foreign.is_missing(value) else str(value)
