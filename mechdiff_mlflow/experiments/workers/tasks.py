"""What is asked of the models, as plain values: a task of some prompts and a pair gives tensors of n rows.

A task of a part of the prompts gives that part of the rows, so any task can be cut, done elsewhere, and kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import rows
from mechdiff_mlflow.experiments.progress import silent
from mechdiff_mlflow.experiments.rows import IDENTITY, RAW, Patched, Replacements, SiteRows
from mechdiff_mlflow.experiments.substitution import Heads, Substitution
from mechdiff_mlflow.experiments.unmapped import swap
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Site

Tensors: TypeAlias = Mapping[str, Tensor]
"""By name; the first dimension of each is the task's prompts, in order."""

_NONE: Replacements = {}
_PROMPT = re.compile(r"\b([Pp]rompt) ([0-9]{1,9})\b")

AnyTask = TypeVar("AnyTask", bound="Task")


@dataclass(frozen=True, eq=False)
class Task:
    """One thing to compute for some prompts.

    Args:
        prompts: Which.
        position: Which token is read and replaced.
        rows: Where the prompts stand in the set that they are a part of; empty for all of it.
    """

    prompts: PromptSet
    position: Position
    rows: tuple[int, ...] = field(default=(), kw_only=True)

    divisible: ClassVar[bool] = True
    """Whether the rows of a prompt depend on that prompt alone."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that read the prompts."""
        return ("base", "tuned")

    @property
    def names(self) -> tuple[str, ...]:
        """What the result has."""
        raise NotImplementedError

    @property
    def maps(self) -> Replacements:
        """The maps that it needs."""
        return _NONE

    @property
    def about(self) -> str:
        """All else that the result depends on, beside the pair."""
        raise NotImplementedError

    def run(self, pair: Pair) -> Tensors:
        """Do it."""
        raise NotImplementedError

    def done(self, pair: Pair) -> Tensors:
        """Do it; errors number prompts as in the whole set.

        Raises:
            MechdiffError: What `run` raises.
        """
        try:
            return self.run(pair)
        except MechdiffError as error:
            if not self.rows:
                raise
            raise MechdiffError(_PROMPT.sub(self._in_the_whole, str(error))) from error

    def _in_the_whole(self, found: re.Match[str]) -> str:
        row = int(found[2])
        return f"{found[1]} {self.rows[row]}" if row < len(self.rows) else found[0]

    def with_maps(self: AnyTask, maps: Replacements) -> AnyTask:
        """The same with other maps, where it has any: they may travel apart from it."""
        return self

    def part(self: AnyTask, rows: Sequence[int]) -> AnyTask:
        """The same for some of the prompts."""
        prompts = PromptSet(self.prompts.split, tuple(self.prompts.prompts[i] for i in rows))
        return replace(self, prompts=prompts, rows=tuple(rows))


@dataclass(frozen=True, eq=False)
class Capture(Task):
    """Activations of one model at some sites: by site, [n, d] in the model's dtype."""

    role: str
    sites: tuple[Site, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """One."""
        return (self.role,)

    @property
    def names(self) -> tuple[str, ...]:
        """The sites."""
        return tuple(map(str, self.sites))

    @property
    def about(self) -> str:
        """Whose activations, and where."""
        return f"capture {self.role} {' '.join(self.names)}"

    def run(self, pair: Pair) -> Tensors:
        """See `rows.capture`."""
        found = rows.capture(pair, self.role, self.prompts, self.position, list(self.sites))
        return {str(site): found[site] for site in self.sites}


@dataclass(frozen=True, eq=False)
class Score(Task):
    """Patches of the tuned model with maps: for each site `base/…` and `tuned/…` rows and `patched/…`.

    The latter is [n, v, 4] in float64: v are the identity, raw where the widths agree, then the maps; 4 are
    the fields of `Patched`.
    """

    replacements: Replacements

    @property
    def names(self) -> tuple[str, ...]:
        """Three a site."""
        return tuple(f"{what}/{site}" for site in self.replacements for what in ("base", "tuned", "patched"))

    @property
    def maps(self) -> Replacements:
        """All that is tried."""
        return self.replacements

    def with_maps(self, maps: Replacements) -> Score:
        """These maps scored in place of its own."""
        return replace(self, replacements=maps)

    @property
    def about(self) -> str:
        """That maps are scored; the maps themselves are told apart by their content."""
        return "score"

    def run(self, pair: Pair) -> Tensors:
        """See `rows.score`."""
        found = rows.score(pair, self.prompts, self.position, self.replacements, silent)
        result = {}
        for site, at in found.items():
            result[f"base/{site}"] = at.base_rows[site]
            result[f"tuned/{site}"] = at.tuned_rows[site]
            result[f"patched/{site}"] = torch.stack([_stacked(patched) for patched in at.patched.values()], 1)
        return result

    def site_rows(self, found: Tensors) -> dict[Site, SiteRows]:
        """What `rows.score` gives, from the tensors of `run`."""
        result = {}
        for site, maps in self.replacements.items():
            patched = found[f"patched/{site}"]
            names = [IDENTITY, *([RAW] if patched.shape[1] == len(maps) + 2 else []), *maps]
            by_name = {name: _unstacked(x) for name, x in zip(names, patched.unbind(1), strict=True)}
            base, tuned = (AtSites(found, f"{role}/", self.replacements) for role in ("base", "tuned"))
            result[site] = SiteRows(site, base, tuned, by_name)
        return result


@dataclass(frozen=True, eq=False)
class Gradients(Task):
    """Gradients of sampled log-probabilities in the tuned activations: by site, [n, d] in float64.

    The sampled tokens of all prompts come from one seed, so the prompts stay together.
    """

    sites: tuple[Site, ...]
    seed: int

    divisible: ClassVar[bool] = False

    @property
    def roles(self) -> tuple[str, ...]:
        """One."""
        return ("tuned",)

    @property
    def names(self) -> tuple[str, ...]:
        """The sites."""
        return tuple(map(str, self.sites))

    @property
    def about(self) -> str:
        """Where, and which tokens."""
        return f"gradients {self.seed} {' '.join(self.names)}"

    def run(self, pair: Pair) -> Tensors:
        """See `PatchEngine.score_gradients`."""
        tokens = pair.tokens("tuned", self.prompts, self.position)
        with pair.tuned.engine() as engine:
            found = engine.score_gradients(tokens, self.sites, seed=self.seed)
        return {str(site): found[site] for site in self.sites}


@dataclass(frozen=True, eq=False)
class CleanNoise(Task):
    """How far apart two clean runs of the same prompts are, see `PatchEngine.clean_noise`: [n, 2]."""

    role: str

    divisible: ClassVar[bool] = False

    @property
    def roles(self) -> tuple[str, ...]:
        """One."""
        return (self.role,)

    @property
    def names(self) -> tuple[str, ...]:
        """One."""
        return ("KL",)

    @property
    def about(self) -> str:
        """Whose runs."""
        return f"clean noise {self.role}"

    def run(self, pair: Pair) -> Tensors:
        """See `PatchEngine.clean_noise`."""
        side = pair.base if self.role == "base" else pair.tuned
        with side.engine() as engine:
            return {"KL": engine.clean_noise(pair.tokens(self.role, self.prompts, self.position))}


@dataclass(frozen=True, eq=False)
class Swap(Task):
    """Unmapped patches of one model with the other's activations, see `unmapped.swap`."""

    taker: str
    sites: tuple[Site, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """KL and floor [n, sites], and both models' rows at each site."""
        return ("KL", "floor", *(f"{role}/{site}" for site in self.sites for role in ("base", "tuned")))

    @property
    def about(self) -> str:
        """Who takes, and where."""
        return f"swap {self.taker} {' '.join(map(str, self.sites))}"

    def run(self, pair: Pair) -> Tensors:
        """See `unmapped.swap`."""
        return swap(pair, self.taker, self.prompts, self.position, self.sites)


@dataclass(frozen=True, eq=False)
class HeadPatches(Task):
    """KL(patched ‖ clean) of the base's heads in place of the tuned model's, for sets of heads: [n, sets]."""

    layer: int
    sets: tuple[Heads, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """One."""
        return ("KL",)

    @property
    def about(self) -> str:
        """Which layer and heads."""
        return f"heads {self.layer} {self.sets}"

    def run(self, pair: Pair) -> Tensors:
        """See `Substitution`."""
        at = Substitution.of(pair, self.layer, self.prompts, self.position)
        return {"KL": at.score(pair, self.sets)}


class AtSites(Mapping[Site, Tensor]):
    """Those of some tensors whose names are a prefix and a site, looked up when they are asked for."""

    def __init__(self, found: Tensors, prefix: str, sites: Mapping[Site, object] | tuple[Site, ...]) -> None:
        self._found, self._prefix, self._sites = found, prefix, tuple(sites)

    def __getitem__(self, site: Site) -> Tensor:
        if site not in self._sites:
            raise KeyError(site)
        return self._found[f"{self._prefix}{site}"]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


_FIELDS = ("kl_patched_clean_nats", "kl_clean_patched_nats", "top1_agrees", "delta_logprob_nats")


def _stacked(patched: Patched) -> Tensor:
    return torch.stack([torch.as_tensor(getattr(patched, name)).double() for name in _FIELDS], -1)


def _unstacked(x: Tensor) -> Patched:
    return Patched(*(column.contiguous().numpy() for column in x.unbind(-1)))
