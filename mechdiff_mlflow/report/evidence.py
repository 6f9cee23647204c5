"""Evidence from runs: their table as typed rows, the newest of each cell, and the one to quote a site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import pandas as pd

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.records import PatchRecord
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.measures.bootstrap import Interval
from mechdiff_mlflow.solvers import SETTINGS
from mechdiff_mlflow.spec import untrusted_fields as foreign
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.text import markdown

Row: TypeAlias = Mapping[str, Any]
_PRECEDENCE = {"report_pass": 3, "run": 2, "patch": 2, "sweep": 1, "atlas": 0}
"""Kinds of runs that patches stand under, by how much their choice of map is worth quoting."""
_PICKED_FROM = ("sweep", "atlas")
"""Kinds of runs from which the best is picked on the reported split itself."""
_LEVEL = 0.95
_REVISION = len("sha256:") + 12
_OLD_LEAKS = {"true": "Leak: settings chosen on the reported prompts", "unknown": selection.sentence(None)}


@dataclass(frozen=True, slots=True)
class Conditions:
    """Conditions that two patches must share for their numbers to be compared."""

    split: str
    n: int
    n_train: int = 0
    seed: int = 0
    position: str = ""
    dtype: str = ""
    answer_tokens: int = 1  # of which val chose by the KL
    patch_at: str = "decision"

    def __str__(self) -> str:
        tokens = f", answers of {self.answer_tokens} tokens" if self.answer_tokens > 1 else ""
        return f"{self.n} {self.split} prompts, {self.n_train} train prompts, seed {self.seed}{tokens}"


@dataclass(frozen=True, slots=True)
class Answered:
    """What a patch run says of whole answers; KL is its sum over their tokens, mean nats an answer."""

    kl_raw: float | None
    kl_mapped: float
    drop: Interval | None  # drop_answer_pct
    exact_match: Mapping[str, float]  # of base, tuned, raw, mapped where known
    recovered: Mapping[str, Interval | None]  # by measure, `exact_match` and `answer_logprob`


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One patch run, or what will be one; KL is mean KL(patched ‖ clean) in nats."""

    run_id: str = ""
    parent_id: str | None = None  # of the run above it
    source: str = "patch"  # kind of the run above it; `patch` of a lone run
    site: Site
    solver: str
    family: str  # what its rank bounds
    k: int | None  # rank; None is full
    alpha: float
    conditions: Conditions
    kl_raw: float | None
    kl_mapped: float
    noise_floor: float  # what KL must stand out from
    rho: float | None  # ‖Y − Ŷ‖ / ‖Y − X‖
    drop: Interval | None  # drop_pct
    skill: Interval | None  # skill_pct
    null: str  # the best control, chosen on val
    controls: Mapping[str, float]  # KL of every control
    leak: str  # what was chosen on reported prompts, or that nobody knows; empty if nothing
    undefined: Mapping[str, str]  # why numbers have no value, by name
    settings: str = ""  # how the map was made beyond solver, family, rank and scale
    p_permutation: float | None  # against fits of shuffled pairs; None where there were none
    asked_alpha: str = ""  # α as the run above was asked for it, such as `auto`
    accuracy: Mapping[str, float] = field(default_factory=dict)  # of base, tuned, raw, mapped where known
    answer: Answered | None = None  # None where the first token is all that was compared
    picked_among: int = 1  # of how many cells `quoted` picked it for its drop on the very split reported

    @property
    def rank(self) -> str:
        """The rank as users write it."""
        return "full" if self.k is None else str(self.k)


@dataclass(frozen=True)
class Evidence:
    """All that the runs of a pair show, of one state of its models and prompts."""

    pair: str
    fingerprint: str  # of its models and prompts
    revisions: tuple[str, str]  # of base and tuned
    patches: Sequence[Measured]  # the newest run of every cell and conditions, by site and rank
    parents: pd.DataFrame  # runs above them: run_id, name, kind, started, `tag.mechdiff.command`
    least_ranks: pd.DataFrame  # rows of the sweeps' `least_ranks.json`, newest first, with their run_id
    atlas: pd.DataFrame | None  # the newest `atlas.json`, with its run_id
    layers: pd.DataFrame | None  # the newest `layers.json`, likewise
    heads: Mapping[str, pd.DataFrame]  # by site the newest `heads.json`, likewise
    left_out: int  # patch runs of other states of the pair, which are not comparable

    @classmethod
    def of(cls, pair: str, runs: pd.DataFrame, tables: Mapping[str, Mapping[str, pd.DataFrame]]) -> Evidence:
        """Read what runs, newest first, and their tables, by artifact and run id, show of a pair.

        Raises:
            MechdiffError: No run has patched anything.
        """
        kinds = dict(zip(runs["run_id"], runs["kind"], strict=True))
        plain: list[Row] = [{str(key): row[key] for key in row} for row in runs.to_dict("records")]
        ours = [row for row in plain if not foreign.is_missing(row["kind"])]  # others have their own params
        asked = {str(row["run_id"]): _text(row, "alpha") for row in ours}
        rows = [
            row
            for row in ours
            if (row["kind"], row["status"], row.get("pair")) == ("patch", "FINISHED", pair)
            and not foreign.is_missing(row.get("KL_mapped"))
        ]
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
            how = (patch.solver, patch.family, patch.k, patch.alpha, patch.settings)
            cell = (patch.site, *how, patch.conditions)
            # A map that was pinned under a report pass is the same cell as the sweep's that found it.
            kept = newest.get(cell)
            if kept is None or _PRECEDENCE.get(patch.source, 0) > _PRECEDENCE.get(kept.source, 0):
                newest[cell] = patch
        above = {patch.parent_id or patch.run_id for patch in newest.values()}
        used = {run_id for found in tables.values() for run_id in found}
        by_run = {name: _by_run(runs, found) for name, found in tables.items()}
        return cls(
            pair=pair,
            fingerprint=markdown(fingerprint, 80),
            revisions=next(
                _revisions(row) for row in rows if _text(row, "tag.pair_fingerprint") == fingerprint
            ),
            patches=sorted(
                newest.values(), key=lambda p: (p.site, p.solver, p.family, p.k or math.inf, p.alpha)
            ),
            parents=runs[runs["run_id"].isin(above | used)],
            least_ranks=_stacked(by_run.get("least_ranks.json", [])),
            atlas=next(iter(by_run.get("atlas.json", [])), None),
            layers=next(iter(by_run.get("layers.json", [])), None),
            heads={str(table["site"].iloc[0]): table for table in reversed(by_run.get("heads.json", []))},
            left_out=len(every) - len(own),
        )

    def quoted(self) -> list[Measured]:
        """The patch that stands for each site: of a pinned winner, else of the newest run, else the best."""
        by_site: dict[Site, list[Measured]] = {}
        for patch in self.patches:
            by_site.setdefault(patch.site, []).append(patch)
        order = {run_id: i for i, run_id in enumerate(self.parents["run_id"])}

        def drop(patch: Measured) -> float:
            estimate = None if patch.drop is None else patch.drop.estimate
            return -math.inf if estimate is None else estimate

        def age(patch: Measured) -> int:
            return order.get(patch.parent_id or patch.run_id, len(order))

        found = []
        for _, patches in sorted(by_site.items()):
            best = max(_PRECEDENCE.get(patch.source, 0) for patch in patches)
            among = [patch for patch in patches if _PRECEDENCE.get(patch.source, 0) == best]
            if among[0].source in _PICKED_FROM:
                found.append(replace(max(among, key=drop), picked_among=len(among)))
            else:
                found.append(min(among, key=age))
        return found


def of_record(record: PatchRecord) -> Measured:
    """A patch that has just been measured, whose run is not there yet."""
    cell = record.cell
    return Measured(
        site=cell.site,
        solver=cell.solver,
        family=cell.family,
        k=cell.rank.k,
        alpha=record.map.alpha,
        conditions=Conditions(record.split, record.n),
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
        p_permutation=record.p_permutation,
    )


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
            1 if foreign.is_missing(row.get("answer_tokens")) else foreign.whole(row, "answer_tokens"),
            _text(row, "patch_at") or "decision",
        ),
        kl_raw=_number(row, "KL_raw"),
        kl_mapped=foreign.number(row, "KL_mapped"),
        noise_floor=foreign.number(row, "noise_floor"),
        rho=_number(row, "rho"),
        drop=_interval(row, "drop_pct"),
        skill=_interval(row, "skill_pct"),
        null=markdown(_text(row, "tag.null")),
        controls=_group(row, "control/"),
        accuracy=_group(row, "accuracy/"),
        answer=_answered(row),
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


def _answered(row: Row) -> Answered | None:
    kl_mapped = _number(row, "KL_answer_mapped")
    if kl_mapped is None:
        return None
    return Answered(
        _number(row, "KL_answer_raw"),
        kl_mapped,
        _interval(row, "drop_answer_pct"),
        _group(row, "exact_match/"),
        {name: _interval(row, f"recovered_{name}_pct") for name in ("exact_match", "answer_logprob")},
    )


def _revisions(row: Row) -> tuple[str, str]:
    """Of base and tuned, short; an adapter's without its base's."""
    base, tuned = (_text(row, f"{role}_revision").rpartition("+")[2] for role in ("base", "tuned"))
    return markdown(base[:_REVISION] or "unknown"), markdown(tuned[:_REVISION] or "unknown")


def _by_run(runs: pd.DataFrame, found: Mapping[str, pd.DataFrame]) -> list[pd.DataFrame]:
    """The tables of runs that have any rows, newest first, each with the id of its run."""
    return [found[run].assign(run_id=run) for run in runs["run_id"] if run in found and len(found[run])]


def _stacked(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The rows of several runs, newest first, each question once."""
    keys = ["site", "solver", "family", "alpha", "target_pct"]
    stacked: pd.DataFrame = pd.DataFrame()
    if parts:
        stacked = pd.concat(parts).drop_duplicates(keys).sort_values(keys).reset_index(drop=True)
    return stacked


def _interval(row: Row, key: str) -> Interval | None:
    estimate = _number(row, key)
    if estimate is None:
        return None
    return Interval(estimate, _number(row, f"ci/{key}_low"), _number(row, f"ci/{key}_high"), _LEVEL)


def _group(row: Row, prefix: str) -> dict[str, float]:
    """The numbers of a row whose names begin so, by the rest of their names."""
    keys = [str(key) for key in row if str(key).startswith(prefix) and not foreign.is_missing(row[key])]
    return {markdown(key.removeprefix(prefix)): foreign.number(row, key) for key in keys}


def _number(row: Mapping[Any, Any], key: str) -> float | None:
    return None if foreign.is_missing(row.get(key)) else foreign.number(row, key)


def _text(row: Row, key: str) -> str:
    value = row.get(key)
    return "" if foreign.is_missing(value) else str(value)
