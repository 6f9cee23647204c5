"""The protocol: fit on train, choose on val, report once on test, for any number of cells.

Every split is recorded once per model however many sites, ranks, scales, solvers and controls are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import pandas as pd

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.answer_tasks import TaskRecord, task_records
from mechdiff_mlflow.experiments.answers import AnswerRecord, answer_record, with_answers
from mechdiff_mlflow.experiments.fitting import Fitter
from mechdiff_mlflow.experiments.next_tokens import NextTokens
from mechdiff_mlflow.experiments.progress import Stage, silent
from mechdiff_mlflow.experiments.protocol import Protocol
from mechdiff_mlflow.experiments.records import FitRecord, PatchRecord
from mechdiff_mlflow.experiments.rows import IDENTITY, RAW, SiteRows
from mechdiff_mlflow.experiments.summary import (
    alignment,
    mean_of_defined,
    p_against_null,
    summarise,
)
from mechdiff_mlflow.experiments.workers import LocalWorkers, Workers
from mechdiff_mlflow.maps import selection
from mechdiff_mlflow.maps.affine import AffineMap, identity_map
from mechdiff_mlflow.measures import stats
from mechdiff_mlflow.measures.bootstrap import Bootstrap
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Site

FLOOR_LIMIT_NATS = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
"""An identity patch that moves the logits further than rounding can is a broken patch, not noise."""


@dataclass(frozen=True, eq=False)
class Study:
    """A pair under one protocol, with what has been recorded so far."""

    pair: Pair
    protocol: Protocol
    stage: Stage = silent  # who listens to progress
    workers: Workers | None = None  # who runs the models; None is this process
    _fitted: list[AffineMap] = field(default_factory=list)
    _rows: dict[str, dict[Site, SiteRows]] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _answered: dict[str, PromptSet] = field(default_factory=dict)

    @cached_property
    def report_prompts(self) -> PromptSet:
        """The prompts that numbers are reported on."""
        return self.pair.prompts_of(self.protocol.split, self.protocol.n)

    @cached_property
    def val_prompts(self) -> PromptSet:
        """The prompts that choices are made on: all of val, or the reported ones when those are val."""
        return self.report_prompts if self.protocol.split == "val" else self.pair.prompts_of("val")

    @cached_property
    def train_prompts(self) -> PromptSet:
        """The prompts that maps are fitted on."""
        return self.pair.prompts_of("train", self.protocol.n_train, option="--n-train")

    def answered(self, prompts: PromptSet) -> PromptSet:
        """Prompts with the answers that are compared token by token; as they are if the first is all."""
        if prompts.digest not in self._answered:
            self._answered[prompts.digest] = with_answers(prompts, self.protocol, self.computing)
        return self._answered[prompts.digest]

    @property
    def prompt_sets(self) -> list[PromptSet]:
        """Every prompt set that takes part."""
        sets = [self.train_prompts, self.val_prompts, self.report_prompts]
        return sets[:2] if self.protocol.split == "val" else sets

    @property
    def bootstrap(self) -> Bootstrap:
        """The bootstrap of intervals over the reported prompts."""
        groups = self.report_prompts.groups
        return Bootstrap(self.protocol.n_resamples, seed=self.protocol.seed, groups=groups)

    def fit(self, cells: Sequence[Cell]) -> list[FitRecord]:
        """Fit every cell on train and let val choose what is open (α, the off-span rule).

        Raises:
            MechdiffError: A site, solver, family or rank is impossible for this pair, or an activation is
                not finite.
        """
        self._prepare()
        fitter = self._fitter
        fitter.record(cells)
        offers = []
        wanted: list[tuple[Site, AffineMap]] = []
        with self.stage("fitting", len(cells)) as advance:
            for cell in cells:
                offers.append(maps := fitter.offers(cell))
                wanted += [(cell.site, map_) for map_ in (maps if self._is_scored(maps) else ())]
                # What `patch` will want of val is scored along: val is run once.
                wanted += [(cell.site, map_) for _, tried in fitter.controls(cell) for map_ in tried]
                advance(1)
        val = self._score("val", wanted)
        found = [self._choose(cell, maps, val[cell.site]) for cell, maps in zip(cells, offers, strict=True)]
        if len(found) > 1:  # reported together, and people take the best
            one_of = selection.entry(f"{selection.CELL} (one of {len(found)})", self.report_prompts)
            found = [replace(fit, map=selection.recorded(fit.map, one_of)) for fit in found]
        self._fitted.extend(fit.map for fit in found)
        return found

    def patch(
        self,
        fits: Iterable[tuple[Cell, AffineMap]],
        each: Callable[[int, PatchRecord], None] = lambda index, record: None,
    ) -> list[PatchRecord]:
        """Report maps on the report split; the null of each is the control that does best on val.

        With permutations every map is also set against fits of shuffled pairs, among whose scales and rules
        val chooses as it did for the map itself.

        Args:
            fits: For each map its cell as asked for, and the map itself with its α.
            each: Called with the place of each record and the record as soon as it is there.

        Raises:
            MechdiffError: A map does not fit its site, or the identity patch is not one.
        """
        fits = list(fits)
        self._prepare()
        fitter = self._fitter
        fitter.record([cell for cell, _ in fits])
        tried = [(cell.site, fitter.controls(cell)) for cell, _ in fits]
        val = self._score("val", [(at, map_) for at, named in tried for _, maps in named for map_ in maps])
        chosen = [_best_controls(named, val[at]) for at, named in tried]
        wanted = [
            (cell.site, one)
            for (cell, map_), (controls, _) in zip(fits, chosen, strict=True)
            for one in (map_, *chain(*controls.values()))
        ]
        report = self._score(self.protocol.split, wanted)
        p_null = [
            p_against_null(report[cell.site], map_, controls[null], self.bootstrap)
            for (cell, map_), (controls, null) in zip(fits, chosen, strict=True)
        ]
        # Whoever looks at many sees the luckiest (Holm 1979, A simple sequentially rejective procedure).
        p_holm = stats.holm(p_null) if len(fits) > 1 else [None]
        records: list[PatchRecord] = []
        for i, (cell, map_) in enumerate(fits):
            rows, mine = report[cell.site], any(map_ is fitted for fitted in self._fitted)
            record = summarise(
                replace(cell, alpha=Alpha((map_.alpha,))),
                map_,
                rows,
                controls=chosen[i][0],
                null=chosen[i][1],
                next_tokens=self._next_tokens,
                # Of the cells reported here none has been taken yet.
                leak=selection.leaks(map_, self.report_prompts, but=selection.CELL if mine else None),
                bootstrap=self.bootstrap,
                seconds=self._seconds[self.protocol.split],
                p_null=p_null[i],
                p_holm=p_holm[i],
                answer=self._answer(map_, *chosen[i], rows, is_alone=len(fits) == 1),
            )
            floor, limit = rows.patched[IDENTITY].mean_kl, FLOOR_LIMIT_NATS[self.pair.spec.dtype]
            if not floor <= limit:
                raise MechdiffError(
                    f"The identity patch at {cell.site} moves next-token KL by {floor:.2g} nats, above "
                    f"{limit:.0e} for {self.pair.spec.dtype}, so the engine does not fit this model; run "
                    "mechdiff doctor."
                )
            each(i, record)
            records.append(record)
        return records

    @cached_property
    def computing(self) -> Workers:
        """The workers that run the models."""
        return self.workers or LocalWorkers(self.pair)

    @property
    def engine_mode(self) -> str:
        """The engine's path that patches the tuned model."""
        return self.computing.environment.engine_mode

    @cached_property
    def noise(self) -> float:
        """Distance between clean runs of the reported prompts, nats; measured after a patch, once."""
        return self.computing.clean_noise("tuned", self.report_prompts, self.protocol.position)

    def plain_patches(self, sites: Iterable[Site]) -> Mapping[Site, SiteRows]:
        """The raw and the identity patch of the reported prompts at some sites, among others perhaps."""
        return self._score(self.protocol.split, [(site, None) for site in sites])

    @cached_property
    def answer_noise(self) -> float:
        """The same of whole answers, nats an answer."""
        if self.protocol.answer_tokens == 1:
            return self.noise
        prompts = self.answered(self.report_prompts)
        return self.computing.clean_noise("tuned", prompts, self.protocol.position)

    def _answer(
        self,
        map_: AffineMap,
        controls: Mapping[str, Sequence[AffineMap]],
        null: str,
        rows: SiteRows,
        *,
        is_alone: bool,
    ) -> AnswerRecord | None:
        if self.protocol.answer_tokens == 1:
            return None
        tasks: list[TaskRecord] = []
        said: dict[str, list[str]] = {}
        if is_alone:  # words are generated with each patch at work, which takes longer than to compare them
            patches = {"mapped": map_, "null": controls[null][0]}
            prompts = self.answered(self.report_prompts)
            where = (prompts, rows.site, patches, self.protocol, self.computing, self.bootstrap)
            tasks, said = task_records(*where)
        return answer_record(map_, controls[null], rows, self.protocol, self.bootstrap, tasks, said)

    def _prepare(self) -> None:
        train, *others = self.prompt_sets
        self.computing.prepare([train, *map(self.answered, others)], self.protocol.position)

    @cached_property
    def _next_tokens(self) -> NextTokens:
        return NextTokens(self.pair, self.report_prompts)

    @cached_property
    def _fitter(self) -> Fitter:
        return Fitter(self.computing, self.protocol, self.train_prompts, self.stage)

    def _is_scored(self, offers: Sequence[AffineMap]) -> bool:
        """Whether the maps of a cell are scored on val: of one there is nothing to choose."""
        return len(offers) > 1 or self.protocol.split == "val"

    def _score(self, split: str, wanted: Iterable[tuple[Site, AffineMap | None]]) -> dict[Site, SiteRows]:
        """Rows of a split by the digests of maps, scored only where they are not known yet.

        A site of the reported prompts gets its raw and identity patch once, also for None in place of a map;
        the map that changes nothing has the rows of the raw patch.
        """
        known, is_reported = self._rows.setdefault(split, {}), split == self.protocol.split
        new: dict[Site, dict[str, AffineMap]] = {}
        more: dict[Site, dict[str, AffineMap]] = {}
        for site, map_ in wanted:
            if is_reported and site not in known:
                maps = new.setdefault(site, {})
                if map_ is not None and map_.digest != identity_map(map_.d_in).digest:
                    maps[map_.digest] = map_
            elif map_ is not None and (site not in known or map_.digest not in known[site].patched):
                more.setdefault(site, {})[map_.digest] = map_
        prompts = self.report_prompts if is_reported else self.val_prompts
        for missing in filter(None, (new, more)):
            started = time.perf_counter()
            scored = self.computing.score(
                self.answered(prompts), self.protocol.position, missing, self.stage, missing is new
            )
            self._seconds[split] = self._seconds.get(split, 0.0) + time.perf_counter() - started
            noise, answer_noise = (self.noise, self.answer_noise) if is_reported else (0.0, 0.0)
            for site, rows in scored.items():
                patched = {**(known[site].patched if site in known else {}), **rows.patched}
                if RAW in patched:
                    patched[identity_map(rows.base_rows[site].shape[1]).digest] = patched[RAW]
                known[site] = replace(rows, patched=patched, clean_noise=noise, answer_noise=answer_noise)
        return known

    def _choose(self, cell: Cell, offers: Sequence[AffineMap], val: SiteRows) -> FitRecord:
        """The offer with the least mean KL of whole answers on val."""
        best = _best(offers, val) if self._is_scored(offers) else offers[0]
        chosen = ["alpha"] if len({map_.alpha for map_ in offers}) > 1 else []
        if len({map_.meta["off_span"] for map_ in offers}) > 1:
            chosen.append("off_span")
        if cell.rank.k is not None:
            best.check_rank(cell.rank.k, cell.family)
        about = {key: value for key, value in best.meta.items() if key != "rank"}  # k says it as users do
        record = [selection.entry("weights", self.train_prompts)]
        record += [selection.entry(", ".join(chosen), self.val_prompts)] if chosen else []
        map_ = selection.recorded(replace(best, meta=about), *record).with_meta(
            pair=self.pair.name,
            fingerprint=self.pair.fingerprint,
            site=str(cell.site),
            k=str(cell.rank),
            position=str(self.protocol.position),
            dtype=self.pair.spec.dtype,
        )
        if self.protocol.answer_tokens > 1:
            map_ = map_.with_meta(answer_tokens=self.protocol.answer_tokens, patch_at=self.protocol.patch_at)
        rho, cosines = alignment(map_, val)
        candidates = [
            {
                "alpha": offer.alpha,
                "off_span": str(offer.meta["off_span"]),
                "KL_mapped": val.patched[offer.digest].mean_kl,
            }
            for offer in (offers if self._is_scored(offers) else ())
        ]
        return FitRecord(
            cell=replace(cell, alpha=Alpha((map_.alpha,))),
            asked=cell,
            off_span=str(map_.meta["off_span"]),
            map=map_,
            n_train=len(self.train_prompts),
            chosen=tuple(chosen),
            rho=rho,
            cos_mean=mean_of_defined(cosines),
            candidates=pd.DataFrame(candidates),
            seconds=self._fitter.seconds(cell),
        )


def _best(maps: Iterable[AffineMap], rows: SiteRows) -> AffineMap:
    return min(maps, key=lambda map_: rows.patched[map_.digest].mean_answer_kl)


def _best_controls(
    named: Iterable[tuple[str, Sequence[AffineMap]]], val: SiteRows
) -> tuple[dict[str, list[AffineMap]], str]:
    """Of each control and shuffle the map that does best on val, and the best control, which is the null."""
    found: dict[str, list[AffineMap]] = {}
    for name, maps in named:
        found.setdefault(name, []).append(_best(maps, val))
    return found, min(found, key=lambda name: float(val.answer_kl(found[name]).mean()))
