"""Score many replacements of many sites on one split: one recording of each model, whatever is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mechdiff_mlflow.engine import CleanRuns, PatchEngine, VariantGroup
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.progress import Stage
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.models.recordings import Rows
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Site

Array = NDArray[np.float64]

IDENTITY = "identity"
"""The tuned model's own activation put back: no less is told from noise, and no map does better."""
RAW = "raw"
"""The base model's activation put in unmapped."""


@dataclass(frozen=True, eq=False)
class Patched:
    """What one replacement did to the next-token distribution of each of n prompts.

    Args:
        kl_patched_clean_nats: KL(patched ‖ clean), [n].
        kl_clean_patched_nats: KL(clean ‖ patched), [n].
        top1_agrees: how far patched and clean prefer the same tokens, see `Divergences`, [n].
        delta_logprob_nats: Change of the log-probability of the clean run's preferred token, [n].
    """

    kl_patched_clean_nats: Array
    kl_clean_patched_nats: Array
    top1_agrees: Array
    delta_logprob_nats: Array

    @property
    def mean_kl(self) -> float:
        """Mean KL(patched ‖ clean) in nats."""
        return float(self.kl_patched_clean_nats.mean())


@dataclass(frozen=True, eq=False)
class SiteRows:
    """One site on one split.

    Args:
        site: Where.
        base_rows: Base activations [n, d_base] of this site among others, where they are kept.
        tuned_rows: Tuned activations [n, d_tuned], in the same way.
        patched: By label, what each replacement did.
        clean_noise: How far apart clean runs of the same prompts are, nats; see `Workers.clean_noise`.
    """

    site: Site
    base_rows: Mapping[Site, Tensor]
    tuned_rows: Mapping[Site, Tensor]
    patched: Mapping[str, Patched]
    clean_noise: float = 0.0

    @property
    def noise_floor(self) -> float:
        """What a mean KL must stand out from, in nats: the identity patch's, or that of two clean runs."""
        return max(self.patched[IDENTITY].mean_kl, self.clean_noise)

    @property
    def base(self) -> Tensor:
        """Base activations, float64 [n, d_base]."""
        return self.base_rows[self.site].double()

    @property
    def tuned(self) -> Tensor:
        """Tuned activations, float64 [n, d_tuned]."""
        return self.tuned_rows[self.site].double()

    def mean_kl(self, labels: Iterable[str]) -> float:
        """Mean KL(patched ‖ clean) in nats over prompts and some replacements."""
        return float(np.mean([self.patched[label].mean_kl for label in labels]))

    def labelled(self, labels: Mapping[str, str]) -> SiteRows:
        """Some of these rows under other labels, beside identity and raw."""
        patched = {label: self.patched[label] for label in (IDENTITY, RAW) if label in self.patched}
        patched |= {label: self.patched[there] for label, there in labels.items()}
        return replace(self, patched=patched)

    def with_rows(self, more: Mapping[str, Patched]) -> SiteRows:
        """These rows and more of the same site and split."""
        return replace(self, patched={**self.patched, **more})


Replacements = Mapping[Site, Mapping[str, AffineMap]]
"""For each site the maps to try, by label."""


def capture(
    pair: Pair, role: str, prompts: PromptSet, position: Position, sites: list[Site]
) -> Mapping[Site, Tensor]:
    """Activations of one model at some sites, [n, d] in the model's dtype.

    Where they are known already nothing is run, otherwise one forward a prompt.
    """
    if role == "base" and pair.one_at_a_time:
        pair.recorded_base(prompts, position)
    key = (role, prompts.digest, position)
    found = pair.recordings.captured(key, sites)
    if found is not None:
        return found
    with patchable(pair, role, prompts, position) as (engine, recorded):
        if prompts.split == "train":
            # Asked for once, by a fit, and nothing is patched on them.
            return engine.capture(pair.tokens(role, prompts, position), sites)
        if role == "tuned":
            return _completed(engine, recorded(sites), sites)
        known = pair.recordings.everything(key)
        missing = [site for site in sites if site not in known]
        pair.recordings.add(key, engine.capture(pair.tokens(role, prompts, position), missing))
        return Rows.of(pair.recordings.everything(key), sites)


def capture_to_patch(
    pair: Pair, role: str, prompts: PromptSet, position: Position, sites: list[Site]
) -> Mapping[Site, Tensor]:
    """As `capture`, of a model that will be patched on the same prompts: base too, which seldom is."""
    if pair.one_at_a_time:  # its clean run would not outlast the other model
        return capture(pair, role, prompts, position, sites)
    with patchable(pair, role, prompts, position) as (engine, recorded):
        return _completed(engine, recorded(sites), sites)


def _completed(engine: PatchEngine, recorded: CleanRuns, sites: list[Site]) -> Mapping[Site, Tensor]:
    engine.complete(recorded)
    return Rows.of(recorded.activations, sites)


@contextmanager
def patchable(
    pair: Pair, role: str, prompts: PromptSet, position: Position
) -> Iterator[tuple[PatchEngine, Callable[[Sequence[Site]], CleanRuns]]]:
    """The engine of one model, and what gives the prompts as they were recorded for patches at some sites."""
    side = pair.base if role == "base" else pair.tuned
    key = (role, prompts.digest, position)
    with side.engine() as engine:
        tokens = pair.tokens(role, prompts, position)
        yield engine, lambda sites: pair.recordings.to_patch(engine, key, tokens, sites)


def score(
    pair: Pair, prompts: PromptSet, position: Position, replacements: Replacements, stage: Stage
) -> dict[Site, SiteRows]:
    """Patch the tuned model with every map of every site; identity and raw rows come with each site.

    Where base and tuned differ in width there is no raw row.

    Raises:
        MechdiffError: A site does not exist, a map does not fit the site, or an activation is not finite.
    """
    sites = list(replacements)
    base = capture(pair, "base", prompts, position, sites)
    with patchable(pair, "tuned", prompts, position) as (engine, recorded):
        groups: list[VariantGroup] = []
        labels: list[tuple[Site, list[str]]] = []
        for site, maps in replacements.items():
            d_base = base[site].shape[1]
            same_width = d_base == engine.width
            for map_ in maps.values():
                _check_fits(map_, site, d_base, engine.width)
            groups.append(VariantGroup.identity(site))
            labels.append((site, [IDENTITY]))
            if names := [*([RAW] if same_width else []), *maps]:
                groups.append(_group(site, base, same_width, list(maps.values())))
                labels.append((site, names))
        with stage("patching tuned", len(prompts)) as advance:
            done = 0

            def progress(n_done: int) -> None:
                nonlocal done
                advance(n_done - done)
                done = n_done

            result = engine.score(recorded(sites), groups, progress=progress)
    rows: dict[Site, dict[str, Patched]] = {site: {} for site in sites}
    for (site, names), found in zip(labels, result.divergences, strict=True):
        for column, name in enumerate(names):
            rows[site][name] = Patched(
                found.kl_patched_clean[:, column].numpy(),
                found.kl_clean_patched[:, column].numpy(),
                found.top1_agrees[:, column].double().numpy(),
                found.delta_logprob[:, column].numpy(),
            )
    return {site: SiteRows(site, base, result.clean, rows[site]) for site in sites}


def _group(site: Site, base: Mapping[Site, Tensor], raw: bool, maps: list[AffineMap]) -> VariantGroup:
    """Replacements made chunk by chunk: all of them at once would be n · v · d numbers."""

    def replace(index: Tensor, clean: Tensor) -> Tensor:
        x = base[site][index]
        units: dict[tuple[int, ...], Tensor] = {}
        mapped = []
        for map_ in maps:  # maps that differ in α alone cost one product
            key = (id(map_.weight), id(map_.mean_in), id(map_.mean_out))
            if key not in units:
                units[key] = map_.with_alpha(1.0)(x.double())
            mapped.append((map_.alpha * units[key]).to(x.dtype))
        return torch.stack([x, *mapped] if raw else mapped, dim=1).to(clean.device)  # (n, v, d)

    return VariantGroup(site, replace, n_variants=len(maps) + raw)


def _check_fits(map_: AffineMap, site: Site, d_base: int, d_tuned: int) -> None:
    if (map_.d_in, map_.d_out) != (d_base, d_tuned):
        raise MechdiffError(
            f"A map takes {map_.d_in} to {map_.d_out} dimensions and {site} of this pair needs "
            f"{d_base} to {d_tuned}; use a map that was fitted on this pair."
        )
