"""From recorded train activations to maps: what val chooses among, the controls, and fits of shuffled pairs.

Every site is factorised once; ranks, scales, rules and shuffles follow from that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from mechdiff_mlflow import solvers
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.progress import Stage
from mechdiff_mlflow.experiments.protocol import Protocol
from mechdiff_mlflow.experiments.workers import Workers
from mechdiff_mlflow.maps.affine import JSON, AffineMap
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.solvers import OffSpan, PairedSpectrum, Solution, controls
from mechdiff_mlflow.spec.pair_spec import ALPHA_GRID, Cell
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Site
from mechdiff_mlflow.text import text_of

Offers = dict[str, AffineMap]
"""Maps among which val chooses, by label."""

Key = tuple[Site, str, str, float]
"""Site, solver, family and the α that a fit divides y by."""


@dataclass(eq=False)
class Fitter:
    """The train split of a pair under one protocol.

    Args:
        workers: Who runs the models.
        protocol: What all cells share.
        prompts: Fitted on.
        stage: Who listens to progress.
    """

    workers: Workers
    protocol: Protocol
    prompts: PromptSet
    stage: Stage
    _train: dict[Site, tuple[Mapping[Site, Tensor], Mapping[Site, Tensor]]] = field(default_factory=dict)
    _spectra: dict[Site, PairedSpectrum] = field(default_factory=dict)
    _solutions: dict[Key, tuple[Solution, float]] = field(default_factory=dict)
    _shuffled: dict[Key, list[Solution]] = field(default_factory=dict)
    _gradients: dict[Site, Tensor] = field(default_factory=dict)
    _controls: dict[Site, Offers] = field(default_factory=dict)
    _basis: Tensor | None = None

    def record(self, cells: Sequence[Cell]) -> None:
        """Record what the cells and their controls are fitted on, where that is not known yet."""
        sites = {cell.site for cell in cells} | {self.elsewhere(cell.site) for cell in cells}
        # The asked-for sites first: of a layer that does not exist, the user's own number is named.
        missing = sorted(
            sites - self._train.keys(), key=lambda site: (site not in {c.site for c in cells}, site)
        )
        if not missing:
            return
        position = self.protocol.position
        self.workers.pair.check_same_tokens(self.prompts, position)
        with self.stage("recording train", 2) as advance:
            base = self.workers.capture("base", self.prompts, position, missing)
            advance(1)
            tuned = self.workers.capture("tuned", self.prompts, position, missing)
            advance(1)
        self._train.update({site: (base, tuned) for site in missing})

    def elsewhere(self, site: Site) -> Site:
        """Where the wrong-layer control of a site is fitted."""
        return elsewhere(site, self.workers.pair)

    def alphas(self, cell: Cell) -> tuple[float, ...]:
        """The scales that a cell's map may have, α of the identity among them where that was asked for."""
        spectrum = self._spectrum(cell.site)
        if (
            self.protocol.alpha_fit == "inside"
            and cell.alpha.values == ALPHA_GRID
            and spectrum.d_in == spectrum.d_out
        ):
            # Three digits: more could not be told apart by KL, and so the grid's own values stay themselves.
            own = float(f"{solvers.identity_scale(spectrum):.3g}")
            return tuple(sorted({*ALPHA_GRID, *([own] if own > 0 else [])}))
        return cell.alpha.values

    def offers(self, cell: Cell) -> Offers:
        """The maps among which val chooses."""
        return self._offers(
            cell, self._spectrum(cell.site), {a: self._solution(cell, a) for a in self._fits(cell)}
        )

    def shuffled(self, cell: Cell) -> list[Offers]:
        """What `offers` are when base and tuned rows are paired at random, once for each permutation."""
        if not self.protocol.permutations:
            return []
        spectrum = self._spectrum(cell.site)
        by_alpha = {alpha: self._shuffled_solutions(cell, alpha) for alpha in self._fits(cell)}
        found = []
        for b in range(self.protocol.permutations):
            offers = self._offers(cell, spectrum, {alpha: some[b] for alpha, some in by_alpha.items()})
            found.append({f"shuffle {b + 1} {label}": map_ for label, map_ in offers.items()})
        return found

    def nulls(self, cell: Cell) -> Offers:
        """Every control at every scale that the map may have, and unscaled: the same freedom."""
        nulls = {}
        for title, made in self._controls_of(cell).items():
            scales = (1.0,) if title == "zero" else sorted({1.0, *self.alphas(cell)})
            nulls.update({f"{title} α={text_of(alpha)}": made.with_alpha(alpha) for alpha in scales})
        return nulls

    def _controls_of(self, cell: Cell) -> Offers:
        """The site's controls, unscaled, each made once: all cells of a site share them, and their memory."""
        known = self._controls.setdefault(cell.site, {})
        spectrum = self._spectrum(cell.site)
        # The wrong layer's map is the only control that the solver has a part in.
        wrong_layer = f"wrong_layer {cell.solver} {cell.family}"
        if wrong_layer not in known:
            other = self._solution(replace(cell, site=self.elsewhere(cell.site)), 1.0).map()
            for name in controls.applicable_controls(spectrum, other=other):
                title = wrong_layer if name == "wrong_layer" else name
                if title not in known:
                    known[title] = controls.control_map(name, spectrum, seed=self.protocol.seed, other=other)
        mine = {title: made for title, made in known.items() if not title.startswith("wrong_layer")}
        return mine | ({wrong_layer: known[wrong_layer]} if wrong_layer in known else {})

    def seconds(self, cell: Cell) -> float:
        """What the factorisations took that all ranks of the cell's site, solver and family share."""
        return sum(self._solutions[self._key(cell, alpha)][1] for alpha in self._fits(cell))

    def _fits(self, cell: Cell) -> tuple[float, ...]:
        """The α that a fit of its own is needed for."""
        return self.alphas(cell) if self.protocol.alpha_fit == "inside" else (1.0,)

    def _offers(self, cell: Cell, spectrum: PairedSpectrum, solutions: dict[float, Solution]) -> Offers:
        rules: Sequence[OffSpan | None] = (self.protocol.off_span,)
        if self.protocol.off_span is None and cell.rank.k is None and spectrum.vx.shape[1] < spectrum.d_in:
            rules = tuple(OffSpan) if spectrum.d_in == spectrum.d_out else (OffSpan.ZERO,)
        maps = []
        for rule in rules:
            made = {alpha: solution.map(cell.rank.k, rule) for alpha, solution in solutions.items()}
            maps += [made[a if a in made else 1.0].with_alpha(a) for a in self.alphas(cell)]
        return {label_of(cell, map_): map_.with_meta(**self._notes(cell.solver)) for map_ in maps}

    def _notes(self, solver: str) -> dict[str, JSON]:
        """What a map's own meta does not say of how it was made."""
        notes: dict[str, JSON] = {"alpha_fit": self.protocol.alpha_fit}
        if "basis" in solvers.solver_named(solver).tensors:
            notes |= {"directions": self.protocol.directions, "unembedding": self.protocol.unembedding}
        return notes

    def _key(self, cell: Cell, alpha: float) -> Key:
        return cell.site, cell.solver, cell.family, alpha

    def _solution(self, cell: Cell, alpha: float) -> Solution:
        """What all ranks of a site, solver and family share; fitted to y/α."""
        key = self._key(cell, alpha)
        if key not in self._solutions:
            started = time.perf_counter()
            solution = self._solve(cell, self._spectrum(cell.site), alpha)
            self._solutions[key] = solution, time.perf_counter() - started
        return self._solutions[key][0]

    def _shuffled_solutions(self, cell: Cell, alpha: float) -> list[Solution]:
        """One a permutation, kept: each takes as long as the fit itself, and all ranks share it."""
        key = self._key(cell, alpha)
        if key not in self._shuffled:
            protocol, spectrum = self.protocol, self._spectrum(cell.site)
            with self.stage("fitting shuffled pairs", protocol.permutations) as advance:
                self._shuffled[key] = []
                times, groups = protocol.permutations, self.prompts.groups
                for mixed in controls.shuffled_pairs(spectrum, times, protocol.seed, groups):
                    self._shuffled[key].append(self._solve(cell, mixed, alpha))
                    advance(1)
        return self._shuffled[key]

    def _solve(self, cell: Cell, spectrum: PairedSpectrum, alpha: float) -> Solution:
        if alpha == 0:
            raise MechdiffError("α=0 cannot be taken inside a fit; pass α above 0, or --alpha-fit after.")
        if alpha != 1:
            spectrum = spectrum.scaled(1 / alpha)
        settings = self._settings(cell.solver) | self._tensors(cell, spectrum)
        return solvers.fit_spectrum(cell.solver, spectrum, cell.family, **settings)

    def _spectrum(self, site: Site) -> PairedSpectrum:
        if site not in self._spectra:
            base, tuned = (rows[site].double() for rows in self._train[site])
            self._spectra[site] = PairedSpectrum.from_rows(base, tuned)
        return self._spectra[site]

    def _settings(self, solver: str) -> dict[str, object]:
        """Of the protocol's hyperparameters those that a solver has."""
        names = {setting.name for setting in solvers.solver_named(solver).settings}
        known = ("shrink", "ridge", "output_metric")
        return {name: getattr(self.protocol, name) for name in known if name in names}

    def _tensors(self, cell: Cell, spectrum: PairedSpectrum) -> dict[str, object]:
        """The inputs of a solver that come from the models themselves."""
        wanted = solvers.solver_named(cell.solver).tensors
        if "basis" in wanted:
            return {"basis": self._output_directions(spectrum.d_out)}
        if "fisher" in wanted and self.protocol.output_metric == "fisher":
            return {"fisher": self._fisher(cell.site)}
        return {}

    def _output_directions(self, width: int) -> Tensor:
        """Top directions of the unembedding, [q, d]."""
        if self._basis is None:
            matrices = [self.workers.unembedding("tuned")]
            if self.protocol.unembedding == "joint":
                matrices.append(self.workers.unembedding("base"))
            if any(matrix.shape[1] != width for matrix in matrices):
                raise MechdiffError(
                    f"The unembeddings read {' and '.join(str(m.shape[1]) for m in matrices)} dimensions and "
                    f"the tuned activations have {width}; use --unembedding tuned, or another solver."
                )
            self._basis = solvers.unembedding_directions(
                matrices[0], self.protocol.directions, *matrices[1:]
            ).cpu()
        return self._basis

    def _fisher(self, site: Site) -> Tensor:
        """Gradients of sampled log-probabilities in the tuned activations of the train prompts, [n, d]."""
        if site not in self._gradients:
            # All sites at once: one backward pass however many there are.
            missing = sorted(self._train.keys() - self._gradients.keys())
            position, seed = self.protocol.position, self.protocol.seed
            self._gradients.update(self.workers.gradients(self.prompts, position, missing, seed))
        return self._gradients[site]


def elsewhere(site: Site, pair: Pair) -> Site:
    """The same hook an eighth of the model further on, or back near the end, for the wrong-layer control.

    Never round to the first layer: what enters it is the same for all prompts. Where the blocks of a hybrid
    there lack the hook, the nearest that have it; the site itself if no other block does.
    """
    n_layers = pair.n_layers
    step = max(1, n_layers // 8)
    wanted = site.layer + (step if site.layer + step < n_layers else -step)
    outlines = [outline for side in (pair.base, pair.tuned) if (outline := side.outline()) is not None]
    others = sorted({*range(n_layers)} - {site.layer}, key=lambda layer: abs(layer - wanted))
    there = (replace(site, layer=layer) for layer in others)
    return next((other for other in there if all(outline.has(other) for outline in outlines)), site)


def label_of(cell: Cell, map_: AffineMap) -> str:
    """What a map of a site is called among others; ends in what it computes, for settings are left out."""
    about = f"{cell.site} {cell.solver} {cell.family} k={cell.rank} α={text_of(map_.alpha)}"
    return f"{about} {map_.meta.get('off_span')} {map_.digest}"
