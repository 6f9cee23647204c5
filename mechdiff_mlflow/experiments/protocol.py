"""Settings that all cells of an experiment share."""

from __future__ import annotations

from dataclasses import dataclass

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.solvers import SETTINGS, Settings
from mechdiff_mlflow.spec.pair_spec import Position

MAX_PERMUTATIONS = 100_000
"""Each is a fit of its own that is kept; so many tell p-values from 1e-5."""


@dataclass(frozen=True)
class Protocol(Settings):
    """What all cells of an experiment share, the settings of solvers included.

    `alpha_fit` `after`: a map is fitted to y, then α multiplies it. `inside`: it is fitted to y/α, so that W
    and not α·W is near the identity; `auto` then also offers the scale at which W is it in most directions.

    Raises:
        MechdiffError: A setting is out of its range.
    """

    split: str = "test"  # reported split; `val` also chooses, so choices leak into the report
    n: int | None = None  # reported prompts; None is all
    n_train: int | None = None  # prompts fitted on; None is all
    position: Position = Position.DECISION  # which token is read and replaced
    permutations: int = 0  # how often the fit is repeated on shuffled pairs, its choices inside; 0 is never
    seed: int = 0  # random seed: bootstrap, shuffles, sampled gradients, random controls
    n_resamples: int = 2000  # of the bootstrap

    def __post_init__(self) -> None:
        if self.split not in ("val", "test"):
            raise MechdiffError(
                f"Split {self.split!r} cannot be reported; use test, or val as the original experiment does."
            )
        if not 0 <= self.permutations <= MAX_PERMUTATIONS:
            raise MechdiffError(
                f"{self.permutations} permutations are impossible; give 0 to {MAX_PERMUTATIONS}."
            )
        if not 0 <= self.seed < 2**63:
            raise MechdiffError(f"Seed {self.seed} is impossible; give 0 to {2**63 - 1}.")
        for setting in SETTINGS:
            setting.checked(getattr(self, setting.name))
