"""Tasks for the models, as plain values: a task of n prompts and a pair gives tensors of n rows.

A task of a part of the prompts gives that part of the rows, so any task can be cut, done elsewhere, and kept.
"""

from __future__ import annotations

import re
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from mechdiff_mlflow.engine import VariantGroup
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import rows
from mechdiff_mlflow.experiments.rows import IDENTITY, RAW, Patched, Replacements, SiteRows, patchable
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.measures.metrics import Divergences
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Hook, Site

Tensors: TypeAlias = Mapping[str, Tensor]
"""Tensors by name, the first dimension of each being the task's prompts, in order."""

Heads: TypeAlias = tuple[int, ...]

Key = TypeVar("Key")
AnyTask = TypeVar("AnyTask", bound="Task")

_PROMPT = re.compile(r"\b([Pp]rompt) ([0-9]{1,9})\b")


class LazyTensors(UserDict[Key, Any]):
    """Readers of tensors, each called whenever its tensor is asked for, which may lie on disk."""

    def __getitem__(self, key: Key) -> Tensor:
        tensor: Tensor = self.data[key]()
        return tensor


def at_sites(found: Tensors, sites: Sequence[Site], prefix: str = "") -> Mapping[Site, Tensor]:
    """Tensors that are named by a prefix and a site, by site."""
    return LazyTensors({site: partial(found.__getitem__, f"{prefix}{site}") for site in sites})


def named(found: Mapping[Site, Tensor], sites: Sequence[Site], prefix: str = "") -> Tensors:
    """The tensors of sites, named by a prefix and the site."""
    return LazyTensors({f"{prefix}{site}": partial(found.__getitem__, site) for site in sites})


@dataclass(frozen=True, eq=False)
class Task:
    """One thing to compute for some prompts."""

    prompts: PromptSet
    position: Position  # which token is read and replaced
    rows: tuple[int, ...] = field(default=(), kw_only=True)  # of a part: its prompts' places in the whole set

    divisible: ClassVar[bool] = True
    """Whether the rows of a prompt depend on that prompt alone."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that read the prompts."""
        return ("base", "tuned")

    @property
    def about(self) -> str:
        """All that the result depends on beside the pair."""
        return " ".join([type(self).__name__, str(self.position), self.prompts.digest, *self._settings()])

    def _settings(self) -> list[str]:
        known = {field.name for field in fields(Task)}
        return [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name not in known]

    def run(self, pair: Pair) -> Tensors:
        """Do it."""
        raise NotImplementedError

    def done(self, pair: Pair) -> Tensors:
        """Do it; errors number prompts as in the whole set."""

        def in_the_whole(found: re.Match[str]) -> str:
            row = int(found[2])
            return f"{found[1]} {self.rows[row]}" if row < len(self.rows) else found[0]

        try:
            return self.run(pair)
        except MechdiffError as error:
            raise MechdiffError(_PROMPT.sub(in_the_whole, str(error))) from error

    def part(self: AnyTask, rows: Sequence[int]) -> AnyTask:
        """The same for some of the prompts; the task itself for all of them."""
        if len(rows) == len(self.prompts):
            return self
        return replace(self, prompts=self.prompts.take(rows), rows=tuple(rows))


@dataclass(frozen=True, eq=False)
class Capture(Task):
    """Activations of one model at some sites: by site, [n, d] in the model's dtype."""

    role: str
    sites: tuple[Site, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """The model whose activations they are."""
        return (self.role,)

    def run(self, pair: Pair) -> Tensors:
        """See `rows.capture`."""
        found = rows.capture(pair, self.role, self.prompts, self.position, list(self.sites))
        return named(found, self.sites)


@dataclass(frozen=True, eq=False)
class Score(Task):
    """Patches of the tuned model with maps: for each site `base/…` and `tuned/…` rows and `patched/…`.

    The latter is [n, v, 6] in float64: v are the maps, after the identity, and raw where the widths agree, if
    these are asked for (`plain`); 6 are the first fields of `Patched`. With answers of up to T tokens the KL
    after each follows, [n, v, 6 + T]. `top/base` and `top/tuned` are as by `top_tokens`, [n, 2].
    """

    replacements: Replacements
    plain: bool = True

    def _settings(self) -> list[str]:
        """Maps are told apart by what they compute, whatever they are called."""
        maps = [f"{site} {one.digest}" for site, of in self.replacements.items() for one in of.values()]
        return [f"plain={self.plain}", *maps]

    def run(self, pair: Pair) -> Tensors:
        """Patch with every map of every site, from one recording of each model."""
        sites, answers = list(self.replacements), self.prompts.answers
        n_replaced = 1 if answers is None else answers.most_replaced
        base = rows.capture(pair, "base", self.prompts, self.position, sites)
        groups: list[VariantGroup] = []
        with patchable(pair, "tuned", self.prompts, self.position, sites) as (engine, recorded):
            for site, maps in self.replacements.items():
                groups += [VariantGroup.identity(site)] if self.plain else []
                groups += variants_of(
                    site, base, list(maps.values()), engine.width, n_replaced, raw=self.plain
                )
            result = engine.score(recorded, groups)
        patched: dict[Site, list[Tensor]] = {site: [] for site in sites}
        for group, found in zip(groups, result.divergences, strict=True):
            patched[group.site].append(_numbers(found, 0 if answers is None else answers.n_tokens))
        readers: dict[str, Callable[[], Tensor]] = {}
        for role in self.roles:
            key = (role, self.prompts.digest, self.position)
            readers[f"top/{role}"] = partial(torch.clone, pair.recordings.top(key))
        for site in sites:
            readers[f"base/{site}"] = partial(_first_vector, base, site, n_replaced)
            readers[f"tuned/{site}"] = partial(_first_vector, result.clean, site, n_replaced)
            readers[f"patched/{site}"] = partial(torch.cat, patched[site], 1)
        return LazyTensors(readers)

    def site_rows(self, found: Tensors) -> dict[Site, SiteRows]:
        """The tensors of `run` by site and label."""
        sites = list(self.replacements)
        base, tuned = (at_sites(found, sites, f"{role}/") for role in ("base", "tuned"))
        top = {role: found[f"top/{role}"].numpy() for role in self.roles}
        result = {}
        for site, maps in self.replacements.items():
            patched = found[f"patched/{site}"]
            names = [*(IDENTITY, RAW)[: patched.shape[1] - len(maps)], *maps]
            by_name = {name: _patched(one) for name, one in zip(names, patched.unbind(1), strict=True)}
            result[site] = SiteRows(site, base, tuned, by_name, top)
        return result


@dataclass(frozen=True, eq=False)
class Gradients(Task):
    """Gradients of sampled log-probabilities in the tuned activations: by site, [n, d] in float64.

    The sampled tokens of all prompts come from one seed, so the prompts stay together.
    """

    sites: tuple[Site, ...]
    seed: int

    divisible: ClassVar[bool] = False

    def run(self, pair: Pair) -> Tensors:
        """See `PatchEngine.score_gradients`."""
        tokens = pair.tokens("tuned", self.prompts, self.position)
        with pair.tuned.engine() as engine:
            return named(engine.score_gradients(tokens, self.sites, seed=self.seed), self.sites)


@dataclass(frozen=True, eq=False)
class Swap(Task):
    """Patches of one model, the taker, with the other's activations as they are, each site by itself.

    `KL` and `floor` are KL(patched ‖ clean) in nats of the patch and of the identity patch, [n, sites];
    `base/…` and `tuned/…` are the activations at each site, [n, d].
    """

    taker: str
    sites: tuple[Site, ...]

    def run(self, pair: Pair) -> Tensors:
        """See above."""
        giver, sites = "tuned" if self.taker == "base" else "base", list(self.sites)
        given = rows.capture(pair, giver, self.prompts, self.position, sites, to_patch=True)

        def replacement(site: Site, index: Tensor, clean: Tensor) -> Tensor:
            return given[site][index].unsqueeze(1)

        groups = [VariantGroup(site, partial(replacement, site), n_variants=1) for site in sites]
        groups += [VariantGroup.identity(site) for site in sites]
        with patchable(pair, self.taker, self.prompts, self.position, sites) as (engine, recorded):
            scored = engine.score(recorded, groups)
        kls = torch.cat([found.kl_patched_clean for found in scored.divergences], 1)  # [n, 2 · sites]
        return {
            "KL": kls[:, : len(sites)],
            "floor": kls[:, len(sites) :],
            **named(given, sites, f"{giver}/"),
            **named(scored.clean, sites, f"{self.taker}/"),
        }


@dataclass(frozen=True, eq=False)
class HeadPatches(Task):
    """Base's attention heads in place of the tuned model's before the output projection, for sets of heads.

    `KL` is KL(patched ‖ clean) in nats, [n, sets].
    """

    layer: int
    sets: tuple[Heads, ...]

    def run(self, pair: Pair) -> Tensors:
        """See above; no heads give the noise floor."""
        site = Site(self.layer, Hook.ATTN_OUT)
        base, tuned = self._head_outputs(pair, site)
        chosen = torch.zeros(len(self.sets), tuned.shape[1], 1, dtype=torch.bool)
        for row, heads in enumerate(self.sets):
            chosen[row, list(heads)] = True
        with patchable(pair, "tuned", self.prompts, self.position, [site]) as (engine, recorded):
            projection = engine.heads(self.layer)

            def replaced(index: Tensor, clean: Tensor) -> Tensor:
                mixed = torch.where(chosen, base[index].unsqueeze(1), tuned[index].unsqueeze(1))
                return projection.project(mixed).to(clean.device)

            group = VariantGroup(site, replaced, n_variants=len(self.sets))
            (found,) = engine.score(recorded, [group]).divergences
        return {"KL": found.kl_patched_clean}

    def _head_outputs(self, pair: Pair, site: Site) -> tuple[Tensor, Tensor]:
        """Outputs of each head of base and tuned before the output projection, [n, heads, width]."""
        found = []
        for role in ("base", "tuned"):
            key = (f"heads of {role}", self.prompts.digest, self.position)
            known = pair.recordings.captured(key, [site])
            if known is None:
                tokens = pair.tokens(role, self.prompts, self.position)
                with pair.side(role).engine() as engine:
                    known = {site: engine.heads(site.layer).capture(tokens)}
                pair.recordings.add(key, known)
            found.append(known[site])
        base, tuned = found
        if base.shape != tuned.shape:
            raise MechdiffError(
                f"Base and tuned have heads of {list(base.shape[1:])} and {list(tuned.shape[1:])} "
                f"(number, width) in layer {site.layer}; heads can be substituted only where they correspond."
            )
        return base, tuned


def _first_vector(found: Mapping[Site, Tensor], site: Site, n_replaced: int) -> Tensor:
    """Of activations of up to so many tokens, one after another, those of the first, [n, d]."""
    return found[site][:, : found[site].shape[1] // n_replaced]


def _numbers(found: Divergences, n_tokens: int) -> Tensor:
    """The columns of `Score`, [n, v, 6 + n_tokens]."""
    columns = [getattr(found, field.name) for field in fields(found)]
    by_step = [column.reshape(*column.shape[:2], -1) for column in columns]
    first = torch.stack([column[..., 0] for column in by_step], -1)
    if not n_tokens:
        return first
    after_end = (0, n_tokens - by_step[0].shape[-1])
    return torch.cat([first, torch.nn.functional.pad(by_step[0], after_end, value=torch.nan)], -1)


def _patched(numbers: Tensor) -> Patched:
    """What one replacement did, from its columns of `Score`, [n, 6 or 6 + T]."""
    kl, reverse, agrees, delta, top, logprob, *steps = (x.contiguous().numpy() for x in numbers.unbind(-1))
    by_token = np.stack(steps, 1) if steps else kl[:, None]
    return Patched(kl, reverse, agrees, delta, top, logprob, by_token)


def variants_of(
    site: Site,
    base: Mapping[Site, Tensor],
    maps: Sequence[AffineMap],
    width: int,
    n_replaced: int,
    *,
    raw: bool,
) -> list[VariantGroup]:
    """Mapped replacements, and before them `raw` ones where the widths agree.

    They are made chunk by chunk: all of them at once would be n · v · d numbers.
    """
    d_base = base[site].shape[1] // n_replaced
    raw = raw and d_base == width
    for map_ in maps:
        if (map_.d_in, map_.d_out) != (d_base, width):
            raise MechdiffError(
                f"A map takes {map_.d_in} to {map_.d_out} dimensions and {site} of this pair needs "
                f"{d_base} to {width}; use a map that was fitted on this pair."
            )

    def replacements(index: Tensor, clean: Tensor) -> Tensor:
        x = base[site][index].view(-1, d_base)  # a row for each token that is replaced
        unscaled: dict[tuple[int, ...], Tensor] = {}
        mapped = []
        for map_ in maps:  # maps that differ in α alone cost one product
            key = (id(map_.weight), id(map_.mean_in), id(map_.mean_out))
            if key not in unscaled:
                unscaled[key] = map_.with_alpha(1.0)(x.double())
            mapped.append((map_.alpha * unscaled[key]).to(x.dtype))
        by_prompt = [rows.view(len(index), -1) for rows in ([x, *mapped] if raw else mapped)]
        return torch.stack(by_prompt, dim=1).to(clean.device)  # (n, v, n_replaced · d)

    n_variants = len(maps) + raw
    return [VariantGroup(site, replacements, n_variants=n_variants)] if n_variants else []
