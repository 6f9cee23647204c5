"""The protocol: fit on train, choose on val, report once on test, for any number of cells.

Every split is recorded once per model however many sites, ranks, scales, solvers and controls are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd
from torch import Tensor

from mechdiff_mlflow import controls, solvers
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import rows as scoring
from mechdiff_mlflow.experiments.progress import Stage, silent
from mechdiff_mlflow.experiments.records import FitRecord, PatchRecord
from mechdiff_mlflow.experiments.rows import SiteRows
from mechdiff_mlflow.experiments.summary import alignment, mean_of_defined, summarise
from mechdiff_mlflow.maps import AffineMap
from mechdiff_mlflow.pairs import Pair
from mechdiff_mlflow.prompts import PromptSet
from mechdiff_mlflow.sites import Site
from mechdiff_mlflow.solvers import OffSpan, PairedSpectrum
from mechdiff_mlflow.spec import Alpha, Cell, Position

FLOOR_LIMIT_NATS = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
"""An identity patch that moves the logits further than rounding can is a broken patch, not noise."""


@dataclass(frozen=True, slots=True)
class Protocol:
    """What all cells of an experiment share.

    Args:
        split: Reported split; `val` also chooses, so choices leak into the report.
        n: Reported prompts; None is all.
        n_train: Prompts fitted on; None is all.
        position: Which token is read and replaced.
        shrink: Covariance shrinkage of the solvers that have one, in [0, 1].
        ridge: Penalty of the solvers that have one, as a fraction of the mean variance.
        off_span: What maps do outside the span of the training rows; None lets val choose.
        seed: Of bootstrap resamples and random controls.
        n_resamples: Bootstrap resamples.
    """

    split: str = "test"
    n: int | None = None
    n_train: int | None = None
    position: Position = Position.DECISION
    shrink: float = 0.05
    ridge: float = 0.01
    off_span: OffSpan | None = None
    seed: int = 0
    n_resamples: int = 2000

    def __post_init__(self) -> None:
        if self.split not in ("val", "test"):
            raise MechdiffError(
                f"Split {self.split!r} cannot be reported; use test, or val as the seed does."
            )


@dataclass(eq=False)
class Study:
    """A pair under one protocol, with what has been recorded so far.

    Args:
        pair: The models and prompts.
        protocol: What all cells share.
        stage: Who listens to progress.
    """

    pair: Pair
    protocol: Protocol
    stage: Stage = silent
    _train: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _spectra: dict[Site, PairedSpectrum] = field(default_factory=dict)
    _solutions: dict[tuple[Site, str, str], tuple[solvers.Solution, float]] = field(default_factory=dict)
    _rows: dict[str, dict[Site, SiteRows]] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)

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

    @property
    def prompt_sets(self) -> list[PromptSet]:
        """Every prompt set that takes part."""
        sets = [self.train_prompts, self.val_prompts, self.report_prompts]
        return sets[:2] if self.protocol.split == "val" else sets

    def fit(self, cells: Sequence[Cell]) -> list[FitRecord]:
        """Fit every cell on train and let val choose what is open (α, the off-span rule).

        Raises:
            MechdiffError: A site, solver, family or rank is impossible for this pair, or an activation is
                not finite.
        """
        self._record_train(
            {cell.site for cell in cells} | {_elsewhere(cell.site, self._n_layers) for cell in cells}
        )
        offers = self._offers(cells)
        requests: dict[Site, dict[str, AffineMap]] = {}
        for cell, maps in zip(cells, offers, strict=True):
            wanted = requests.setdefault(cell.site, {})
            if len(maps) > 1 or self.protocol.split == "val":
                wanted.update(maps)
            wanted.update(self._nulls(cell, cell.alpha.values))
        val = self._score("val", requests)
        return [self._choose(cell, maps, val[cell.site]) for cell, maps in zip(cells, offers, strict=True)]

    def patch(self, fits: Iterable[tuple[Cell, AffineMap, tuple[str, ...]]]) -> list[PatchRecord]:
        """Report maps on the report split; the null of each is the control that does best on val.

        Args:
            fits: For each map its cell as asked for, the map itself with its α, and what val chose of it.

        Raises:
            MechdiffError: A map does not fit its site, or the identity patch is not one.
        """
        fits = list(fits)
        self._record_train(
            {cell.site for cell, *_ in fits} | {_elsewhere(c.site, self._n_layers) for c, *_ in fits}
        )
        nulls = [self._nulls(cell, cell.alpha.values) for cell, *_ in fits]
        requests: dict[Site, dict[str, AffineMap]] = {}
        for (cell, *_), maps in zip(fits, nulls, strict=True):
            requests.setdefault(cell.site, {}).update(maps)
        val = self._score("val", requests)
        best = [_best_of_each(maps, val[cell.site]) for (cell, *_), maps in zip(fits, nulls, strict=True)]
        requests = {}
        for (cell, map_, _), maps, labels in zip(fits, nulls, best, strict=True):
            wanted = requests.setdefault(cell.site, {})
            wanted.update({label: maps[label] for label in labels.values()})
            wanted[_label(cell, map_)] = map_
        report = self._score(self.protocol.split, requests)
        records = []
        for (cell, map_, chosen), labels in zip(fits, best, strict=True):
            record = summarise(
                replace(cell, alpha=Alpha((map_.alpha,))),
                map_,
                report[cell.site],
                label=_label(cell, map_),
                controls=labels,
                null=min(labels, key=lambda name: val[cell.site].patched[labels[name]].mean_kl),
                prompts=self.report_prompts,
                leak=chosen if self.protocol.split == "val" else (),
                seed=self.protocol.seed,
                n_resamples=self.protocol.n_resamples,
                seconds=self._seconds[self.protocol.split],
            )
            self._check_identity(cell.site, record.noise_floor)
            records.append(record)
        return records

    @property
    def engine_mode(self) -> str:
        """Which of the engine's paths patches the tuned model."""
        with self.pair.tuned.engine() as engine:
            return str(engine.mode)

    @cached_property
    def _n_layers(self) -> int:
        with self.pair.tuned.engine() as engine:
            return engine.n_layers

    def _record_train(self, sites: set[Site]) -> None:
        missing = sorted(sites - self._train.keys())
        if not missing:
            return
        prompts, position = self.train_prompts, self.protocol.position
        with self.stage("recording train", 2) as advance:
            base = scoring.capture(self.pair, "base", prompts, position, missing)
            advance(1)
            tuned = scoring.capture(self.pair, "tuned", prompts, position, missing)
            advance(1)
        self._train.update(
            {site: (base[site].double().cpu(), tuned[site].double().cpu()) for site in missing}
        )

    def _offers(self, cells: Sequence[Cell]) -> list[dict[str, AffineMap]]:
        """For every cell the maps among which val chooses, by label."""
        with self.stage("fitting", len(cells)) as advance:
            offers = []
            for cell in cells:
                solution = self._solution(cell)
                rules: Sequence[OffSpan | None] = (self.protocol.off_span,)
                if self.protocol.off_span is None and cell.rank.k is None and not solution.spans_all:
                    rules = tuple(OffSpan)
                maps = [solution.map(cell.rank.k, rule) for rule in rules]
                scaled = [map_.with_alpha(alpha) for map_ in maps for alpha in cell.alpha.values]
                offers.append({_label(cell, map_): map_ for map_ in scaled})
                advance(1)
        return offers

    def _solution(self, cell: Cell) -> solvers.Solution:
        """The solution that all ranks and scales of a site, solver and family share."""
        key = (cell.site, cell.solver, cell.family)
        if key not in self._solutions:
            started = time.perf_counter()
            settings = self._settings(cell.solver)
            solution = solvers.fit_spectrum(cell.solver, self._spectrum(cell.site), cell.family, **settings)
            self._solutions[key] = solution, time.perf_counter() - started
        return self._solutions[key][0]

    def _spectrum(self, site: Site) -> PairedSpectrum:
        if site not in self._spectra:
            self._spectra[site] = PairedSpectrum.from_rows(*self._train[site])
        return self._spectra[site]

    def _settings(self, solver: str) -> dict[str, float]:
        """Of the protocol's hyperparameters those that a solver has."""
        names = {setting.name for setting in solvers.solver_named(solver).settings}
        return {name: getattr(self.protocol, name) for name in ("shrink", "ridge") if name in names}

    def _nulls(self, cell: Cell, alphas: Iterable[float]) -> dict[str, AffineMap]:
        """Every control at every scale that the map may have, and unscaled: the same freedom."""
        spectrum = self._spectrum(cell.site)
        other = self._solution(replace(cell, site=_elsewhere(cell.site, self._n_layers))).map()
        nulls = {}
        for name in controls.applicable_controls(spectrum, other=other):
            made = controls.control_map(name, spectrum, seed=self.protocol.seed, other=other)
            # The wrong layer's map is the only control that the solver has a part in.
            title = f"{name} {cell.solver} {cell.family}" if name == "wrong_layer" else name
            scales = (1.0,) if name == "zero" else sorted({1.0, *alphas})
            nulls.update({f"{title} α={alpha:g}": made.with_alpha(alpha) for alpha in scales})
        return nulls

    def _score(self, split: str, requests: dict[Site, dict[str, AffineMap]]) -> dict[Site, SiteRows]:
        """Rows of a split, scored only where they are not known yet."""
        known = self._rows.setdefault(split, {})
        missing = {
            site: {label: map_ for label, map_ in maps.items() if label not in known[site].patched}
            if site in known
            else maps
            for site, maps in requests.items()
        }
        missing = {site: maps for site, maps in missing.items() if maps or site not in known}
        if missing:
            prompts = self.report_prompts if split == self.protocol.split else self.val_prompts
            started = time.perf_counter()
            scored = scoring.score(self.pair, prompts, self.protocol.position, missing, self.stage)
            self._seconds[split] = self._seconds.get(split, 0.0) + time.perf_counter() - started
            for site, rows in scored.items():
                known[site] = known[site].with_rows(rows.patched) if site in known else rows
        return known

    def _choose(self, cell: Cell, offers: Mapping[str, AffineMap], val: SiteRows) -> FitRecord:
        """The offer with the least mean KL on val; of one there is nothing to choose."""
        scored = {label: val.patched[label].mean_kl for label in offers if label in val.patched}
        best = offers[min(offers, key=lambda label: scored.get(label, 0.0))]
        chosen = ["alpha"] if cell.alpha.is_choice else []
        if len({map_.meta["off_span"] for map_ in offers.values()}) > 1:
            chosen.append("off_span")
        if cell.rank.k is not None:
            best.check_rank(cell.rank.k, cell.family)
        about = {key: value for key, value in best.meta.items() if key != "rank"}  # k says it as users do
        map_ = replace(best, meta=about).with_meta(
            pair=self.pair.name,
            fingerprint=self.pair.fingerprint,
            site=str(cell.site),
            k=str(cell.rank),
            position=str(self.protocol.position),
            dtype=self.pair.spec.dtype,
        )
        rho, cosines = alignment(map_, val)
        settings = self._settings(cell.solver)
        return FitRecord(
            cell=replace(cell, alpha=Alpha((map_.alpha,))),
            asked=cell,
            shrink=settings.get("shrink"),
            ridge=settings.get("ridge"),
            off_span=str(map_.meta["off_span"]),
            map=map_,
            n_train=len(self.train_prompts),
            chosen=tuple(chosen),
            rho=rho,
            cos_mean=mean_of_defined(cosines),
            candidates=pd.DataFrame(
                [
                    {
                        "alpha": offers[label].alpha,
                        "off_span": str(offers[label].meta["off_span"]),
                        "KL_mapped": kl,
                    }
                    for label, kl in scored.items()
                ]
            ),
            seconds=self._solutions[cell.site, cell.solver, cell.family][1],
        )

    def _check_identity(self, site: Site, floor: float) -> None:
        limit = FLOOR_LIMIT_NATS[self.pair.spec.dtype]
        if not floor <= limit:
            raise MechdiffError(
                f"The identity patch at {site} moves next-token KL by {floor:.2g} nats, above {limit:.0e} "
                f"for {self.pair.spec.dtype}, so the engine does not fit this model; run mechdiff doctor."
            )


def _best_of_each(nulls: Mapping[str, AffineMap], val: SiteRows) -> dict[str, str]:
    """For each control the label of its scale that does best on val."""
    best: dict[str, str] = {}
    for label in nulls:
        name = label.split()[0]
        if name not in best or val.patched[label].mean_kl < val.patched[best[name]].mean_kl:
            best[name] = label
    return best


def _label(cell: Cell, map_: AffineMap) -> str:
    return (
        f"{cell.site} {cell.solver} {cell.family} k={cell.rank} α={map_.alpha:g} {map_.meta.get('off_span')}"
    )


def _elsewhere(site: Site, n_layers: int) -> Site:
    """The same hook an eighth of the model further on, or back near the end, for the wrong-layer control.

    Never round to the first layer: what enters it is the same for all prompts.
    """
    step = max(1, n_layers // 8)
    return replace(
        site, layer=site.layer + (step if site.layer + step < n_layers else -step) * (n_layers > 1)
    )
