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
from mechdiff_mlflow.experiments.workers.tasks import Gradients, at_sites
from mechdiff_mlflow.experiments.workers.workers import Workers, unembedding
from mechdiff_mlflow.maps.affine import JSON, AffineMap
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.solvers import OffSpan, PairedSpectrum, Solution, controls
from mechdiff_mlflow.spec.pair_spec import ALPHA_GRID, Cell
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Site

SHUFFLED = "shuffled"
"""The control that is made of fits of shuffled pairs."""

Key = tuple[Site, str, str, float]
"""Site, solver, family and the α that a fit divides y by."""


@dataclass(eq=False)
class Fitter:
    """The train split of a pair under one protocol."""

    workers: Workers
    protocol: Protocol
    prompts: PromptSet
    stage: Stage
    _train: dict[Site, tuple[Mapping[Site, Tensor], Mapping[Site, Tensor]]] = field(default_factory=dict)
    _spectra: dict[Site, PairedSpectrum] = field(default_factory=dict)
    _solutions: dict[Key, tuple[Solution, float]] = field(default_factory=dict)
    _shuffled: dict[Key, list[Solution]] = field(default_factory=dict)
    _gradients: dict[Site, Tensor] = field(default_factory=dict)
    _controls: dict[tuple[Site, str], AffineMap] = field(default_factory=dict)
    _basis: Tensor | None = None

    def record(self, cells: Sequence[Cell]) -> None:
        """Record what the cells and their controls are fitted on, where that is not known yet."""
        asked, pair = sorted({cell.site for cell in cells}), self.workers.pair
        # The asked-for sites first: of a layer that does not exist, the user's own number is named.
        sites = dict.fromkeys([*asked, *sorted({wrong_layer_site(site, pair) for site in asked})])
        missing = [site for site in sites if site not in self._train]
        if not missing:
            return
        position = self.protocol.position
        with self.stage("recording train", 2) as advance:
            base = self.workers.capture("base", self.prompts, position, missing)
            advance(1)
            tuned = self.workers.capture("tuned", self.prompts, position, missing)
            advance(1)
        self._train.update({site: (base, tuned) for site in missing})

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

    def offers(self, cell: Cell) -> list[AffineMap]:
        """The maps among which val chooses."""
        return self._offers(cell, {alpha: self._solution(cell, alpha) for alpha in self._fits(cell)})

    def controls(self, cell: Cell) -> list[tuple[str, list[AffineMap]]]:
        """Controls by name, each at every scale that the map may have, and unscaled: the same freedom.

        `shuffled` stands once for each permutation, with the `offers` when base and tuned rows are paired at
        random.
        """
        spectrum, scales = self._spectrum(cell.site), sorted({1.0, *self.alphas(cell)})
        # All cells of a site share its controls; the wrong layer's map alone depends on the solver.
        wrong_layer = cell.site, f"wrong_layer {cell.solver} {cell.family}"
        if wrong_layer not in self._controls:
            there = wrong_layer_site(cell.site, self.workers.pair)
            other = self._solution(replace(cell, site=there), 1.0).map()
            self._controls[wrong_layer] = controls.control_map("wrong_layer", spectrum, other=other)
        found = []
        for name in controls.applicable_controls(spectrum, other=self._controls[wrong_layer]):
            key = wrong_layer if name == "wrong_layer" else (cell.site, name)
            if key not in self._controls:
                self._controls[key] = controls.control_map(name, spectrum, seed=self.protocol.seed)
            alphas = [1.0] if name == "zero" else scales
            found.append((name, [self._controls[key].with_alpha(alpha) for alpha in alphas]))
        by_alpha = {alpha: self._shuffled_solutions(cell, alpha) for alpha in self._fits(cell)}
        for b in range(self.protocol.permutations):
            solutions = {alpha: shuffled[b] for alpha, shuffled in by_alpha.items()}
            found.append((SHUFFLED, self._offers(cell, solutions)))
        return found

    def seconds(self, cell: Cell) -> float:
        """Seconds of the factorisations that all ranks of the cell's site, solver and family share."""
        return sum(self._solutions[self._key(cell, alpha)][1] for alpha in self._fits(cell))

    def _fits(self, cell: Cell) -> tuple[float, ...]:
        """The α that a fit of its own is needed for."""
        return self.alphas(cell) if self.protocol.alpha_fit == "inside" else (1.0,)

    def _offers(self, cell: Cell, solutions: dict[float, Solution]) -> list[AffineMap]:
        spectrum = self._spectrum(cell.site)
        rules: Sequence[OffSpan | None] = (self.protocol.off_span,)
        if self.protocol.off_span is None and cell.rank.k is None and spectrum.vx.shape[1] < spectrum.d_in:
            rules = tuple(OffSpan) if spectrum.d_in == spectrum.d_out else (OffSpan.ZERO,)
        maps = []
        for rule in rules:
            made = {alpha: solution.map(cell.rank.k, rule) for alpha, solution in solutions.items()}
            maps += [made[a if a in made else 1.0].with_alpha(a) for a in self.alphas(cell)]
        notes: dict[str, JSON] = {"alpha_fit": self.protocol.alpha_fit}  # what a map's own meta does not say
        for setting in solvers.solver_named(cell.solver).tensor_settings:
            notes[setting.name] = getattr(self.protocol, setting.name)
        return [map_.with_meta(**notes) for map_ in maps]

    def _key(self, cell: Cell, alpha: float) -> Key:
        return cell.site, cell.solver, cell.family, alpha

    def _solution(self, cell: Cell, alpha: float) -> Solution:
        """The solution that all ranks of a site, solver and family share; fitted to y/α."""
        key = self._key(cell, alpha)
        if key not in self._solutions:
            started = time.perf_counter()
            solution = self._solve(cell, self._spectrum(cell.site), alpha)
            self._solutions[key] = solution, time.perf_counter() - started
        return self._solutions[key][0]

    def _shuffled_solutions(self, cell: Cell, alpha: float) -> list[Solution]:
        """One a permutation, kept: each takes as long as the fit itself, and all ranks share it."""
        key, times, protocol = self._key(cell, alpha), self.protocol.permutations, self.protocol
        if times and key not in self._shuffled:
            mixed = controls.shuffled_pairs(
                self._spectrum(cell.site), times, protocol.seed, self.prompts.groups
            )
            self._shuffled[key] = []
            with self.stage("fitting shuffled pairs", times) as advance:
                for spectrum in mixed:
                    self._shuffled[key].append(self._solve(cell, spectrum, alpha))
                    advance(1)
        return self._shuffled.get(key, [])

    def _solve(self, cell: Cell, spectrum: PairedSpectrum, alpha: float) -> Solution:
        if alpha == 0:
            raise MechdiffError("α=0 cannot be taken inside a fit; pass α above 0, or --alpha-fit after.")
        if alpha != 1:
            spectrum = spectrum.scaled(1 / alpha)
        solver = solvers.solver_named(cell.solver)
        arguments: dict[str, object] = {s.name: getattr(self.protocol, s.name) for s in solver.settings}
        if "basis" in solver.tensors:
            arguments["basis"] = self._output_directions(spectrum.d_out)
        if "fisher" in solver.tensors and self.protocol.output_metric == "fisher":
            arguments["fisher"] = self._fisher(cell.site)
        return solvers.fit_spectrum(cell.solver, spectrum, cell.family, **arguments)

    def _spectrum(self, site: Site) -> PairedSpectrum:
        if site not in self._spectra:
            base, tuned = (rows[site].double() for rows in self._train[site])
            self._spectra[site] = PairedSpectrum.from_rows(base, tuned)
        return self._spectra[site]

    def _output_directions(self, width: int) -> Tensor:
        """Top directions of the unembedding, [q, d]."""
        if self._basis is None:
            roles = ("tuned", "base") if self.protocol.unembedding == "joint" else ("tuned",)
            first, *others = (self.workers.ask(unembedding, role) for role in roles)
            widths = [matrix.shape[1] for matrix in (first, *others)]
            if set(widths) != {width}:
                raise MechdiffError(
                    f"The unembeddings read {' and '.join(map(str, widths))} dimensions and the tuned "
                    f"activations have {width}; use --unembedding tuned, or another solver."
                )
            self._basis = solvers.unembedding_directions(first, self.protocol.directions, *others).cpu()
        return self._basis

    def _fisher(self, site: Site) -> Tensor:
        """Gradients of sampled log-probabilities in the tuned activations of the train prompts, [n, d]."""
        if site not in self._gradients:
            # All sites at once: one backward pass however many there are.
            missing = sorted(self._train.keys() - self._gradients.keys())
            position, seed = self.protocol.position, self.protocol.seed
            found = self.workers.whole(Gradients(self.prompts, position, tuple(missing), seed))
            self._gradients.update(at_sites(found, missing))
        return self._gradients[site]


def wrong_layer_site(site: Site, pair: Pair) -> Site:
    """The site of the wrong-layer control: the same hook an eighth of the model further on, or back.

    Never round to the first layer: what enters it is the same for all prompts. Where the blocks of a hybrid
    there lack the hook, the nearest that have it; the site itself if no other block does.
    """
    n_layers = pair.n_layers
    step = max(1, n_layers // 8)
    wanted = site.layer + (step if site.layer + step < n_layers else -step)
    outlines = pair.outlines()
    others = sorted({*range(n_layers)} - {site.layer}, key=lambda layer: abs(layer - wanted))
    there = (replace(site, layer=layer) for layer in others)
    return next((other for other in there if all(outline.has(other) for outline in outlines)), site)
