"""Rows of prompts: activations at sites, and what patches there do to the next token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mechdiff_mlflow.engine import CleanRuns, PatchEngine
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.models.pairs import Pair
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
    """Effects of one replacement on the next-token distributions of n prompts, [n] each."""

    kl_patched_clean_nats: Array  # KL(patched ‖ clean)
    kl_clean_patched_nats: Array  # KL(clean ‖ patched)
    top1_agrees: Array  # how far patched and clean prefer the same tokens, see `Divergences`
    delta_logprob_nats: Array  # change of the log-probability of the clean run's preferred token
    top: Array  # the most probable next token
    top_logprob_nats: Array  # its log-probability

    @property
    def mean_kl(self) -> float:
        """Mean KL(patched ‖ clean) in nats."""
        return float(self.kl_patched_clean_nats.mean())


@dataclass(frozen=True, eq=False)
class SiteRows:
    """One site on one split."""

    site: Site
    base_rows: Mapping[Site, Tensor]  # base activations [n, d_base] of this site among others
    tuned_rows: Mapping[Site, Tensor]  # tuned activations [n, d_tuned], in the same way
    patched: Mapping[str, Patched]  # by label, what each replacement did
    top: Mapping[str, Array]  # of base and tuned untouched: as by `top_tokens` [n, 2]
    clean_noise: float = 0.0  # how far apart clean runs of the same prompts are, nats: `Workers.clean_noise`

    @property
    def noise_floor(self) -> float:
        """KL that a mean KL must stand out from, nats: the identity patch's, or that of two clean runs."""
        return max(self.patched[IDENTITY].mean_kl, self.clean_noise)

    @property
    def base(self) -> Tensor:
        """Base activations, float64 [n, d_base]."""
        return self.base_rows[self.site].double()

    @property
    def tuned(self) -> Tensor:
        """Tuned activations, float64 [n, d_tuned]."""
        return self.tuned_rows[self.site].double()

    def kl(self, maps: Sequence[AffineMap]) -> Array:
        """KL(patched ‖ clean) of each prompt, the mean over maps labelled by their digests, nats [n]."""
        mean: Array = np.mean([self.patched[map_.digest].kl_patched_clean_nats for map_ in maps], axis=0)
        return mean


Replacements = Mapping[Site, Mapping[str, AffineMap]]
"""For each site the maps to try, by label."""


def capture(
    pair: Pair,
    role: str,
    prompts: PromptSet,
    position: Position,
    sites: list[Site],
    *,
    to_patch: bool = False,
) -> Mapping[Site, Tensor]:
    """Activations of one model at some sites, perhaps at others too, [n, d] in the model's dtype.

    Where they are known already nothing is run, otherwise one forward a prompt; its clean run is kept for
    patches of the tuned model, and `to_patch` of base too.
    """
    if role == "base" and pair.one_at_a_time:
        pair.recorded_base(prompts, position)
    key = (role, prompts.digest, position)
    found = pair.recordings.captured(key, sites)
    if found is not None:
        return found
    if prompts.split != "train" and (role == "tuned" or to_patch):
        with patchable(pair, role, prompts, position, sites) as (engine, recorded):
            engine.complete(recorded)
            return recorded.activations
    with pair.side(role).engine() as engine:
        tokens = pair.tokens(role, prompts, position)
        if prompts.split == "train":  # asked for once, by a fit, and nothing is patched on them
            return engine.capture(tokens, sites)
        known = pair.recordings.everything(key)
        captured = engine.run_clean(tokens, [site for site in sites if site not in known])
        pair.recordings.add(key, captured.activations, captured.top)
        return pair.recordings.everything(key)


@contextmanager
def patchable(
    pair: Pair, role: str, prompts: PromptSet, position: Position, sites: Sequence[Site]
) -> Iterator[tuple[PatchEngine, CleanRuns]]:
    """The engine of one model, and prompts that are recorded for patches at some sites."""
    with pair.side(role).engine() as engine:
        tokens = pair.tokens(role, prompts, position)
        yield engine, pair.recordings.recorded(engine, (role, prompts.digest, position), tokens, sites)
