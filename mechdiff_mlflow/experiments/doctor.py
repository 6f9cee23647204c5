"""Plumbing checks: a pair that fails one would give numbers that look fine and are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch

from mechdiff_mlflow.engine import check_plumbing
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.rows import IDENTITY, capture
from mechdiff_mlflow.experiments.study import FLOOR_LIMIT_NATS
from mechdiff_mlflow.experiments.workers import LocalWorkers
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Hook, Site

N_PROMPTS = 8
"""Prompts that the checks run on: enough for unequal lengths, few enough for an 8B model on a laptop."""

CAPTURE_TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.2, "float16": 5e-2}
"""Largest difference over the largest activation that another batch may make.

A mask that is not honoured makes one of about 1. Matrix products of another height alone made one of 0.06 in
bfloat16, on an 8B-shaped model with random weights.
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor: what was looked at, whether it holds, and what was seen."""

    name: str
    passed: bool
    seen: str


def examine(pair: Pair) -> Iterator[Check]:
    """Run every check on a few val prompts; one that raises has failed, and the next goes on."""
    said: set[str] = set()
    for name, check in _checks(pair).items():
        try:
            yield Check(name, True, check())
        except MechdiffError as error:
            yield Check(name, False, "as above" if str(error) in said else str(error))
            said.add(str(error))


def require_sound(pair: Pair) -> None:
    """Run the checks without which no number may be printed.

    The oracle map is not among them: it is the identity patch of a site, whose floor every patch is held to.

    Raises:
        MechdiffError: What the first failing check says.
    """
    checks = _checks(pair)
    for name in _ESSENTIAL:
        checks[name]()


_INVARIANT = "capture invariant to padding and batch"
_ESSENTIAL = ("same token ids", "hooks and sublayers", "identity patch", _INVARIANT, "untouched layers agree")


def _checks(pair: Pair) -> dict[str, Callable[[], str]]:
    """Checks by name; each says what it saw, or raises."""
    prompts = pair.prompts_of("val").first(min(N_PROMPTS, len(pair.prompts["val"])))
    sites = cache(lambda: _middle_sites(pair))
    return {
        "prompts": lambda: ", ".join(f"{len(p)} {split}" for split, p in pair.prompts.items()) + ", disjoint",
        "templates and BOS": lambda: _templates(pair, prompts),
        "same token ids": lambda: _same_tokens(pair, prompts),
        "sites respond": lambda: _engine_line(pair),
        "hooks and sublayers": lambda: _hooks_and_sublayers(pair, prompts),
        _INVARIANT: lambda: _capture_is_invariant(pair, prompts, sites()),
        "identity patch": lambda: _identity(pair, prompts, sites()),
        "oracle map": lambda: _oracle(pair, prompts),
        "untouched layers agree": lambda: _untouched(pair, prompts),
    }


def _sites(pair: Pair, layers: Iterable[int]) -> list[list[Site]]:
    """The sites of each layer that both models have: the blocks of a hybrid differ."""
    both = pair.base.sites & pair.tuned.sites
    return [[site for hook in Hook if (site := Site(layer, hook)) in both] for layer in layers]


def _middle_sites(pair: Pair) -> list[Site]:
    """The sites of the block nearest to the middle that has most of them."""
    middle = pair.n_layers // 2
    return max(_sites(pair, sorted(range(pair.n_layers), key=lambda layer: abs(layer - middle))), key=len)


def _templates(pair: Pair, prompts: PromptSet) -> str:
    read = {role: pair.tokens(role, prompts, Position.DECISION).ids for role in ("base", "tuned")}
    lengths = [len(ids) for found in read.values() for ids in found]
    starts = {}
    for role in read:
        bos = pair.readers.tokenizer_for(role).bos_token_id
        counts = sorted({ids.count(bos) if bos is not None else 0 for ids in read[role]})
        starts[role] = " or ".join({0: "no", 1: "one"}.get(count, str(count)) for count in counts) + " BOS"
    same = starts["base"] == starts["tuned"]
    said = starts["base"] if same else ", ".join(f"{role} {start}" for role, start in starts.items())
    remarks = " ".join(f"; {remark.rstrip('.')}" for remark in pair.readers.remarks)
    return f"template {pair.spec.template}, {said} a prompt, {min(lengths)} to {max(lengths)} tokens{remarks}"


def _same_tokens(pair: Pair, prompts: PromptSet) -> str:
    if not pair.tokenizers_agree:
        return "tokenizers differ: each model reads the prompt through its own"
    pair.check_same_tokens(prompts, Position.DECISION)
    return "base and tuned see the same ids"


def _engine_line(pair: Pair) -> str:
    with pair.tuned.engine() as engine:
        shape = f"{engine.n_layers} layers of width {engine.width}"
        return f"{shape}, every hook changes the logits, engine {engine.mode}"


def _hooks_and_sublayers(pair: Pair, prompts: PromptSet) -> str:
    """In both models every hook fires once a forward, and blocks add what their sublayers give."""
    for side in (pair.tuned, pair.base):  # in this order, and one held at a time is loaded once fewer
        tokens = pair.tokens(side.role, prompts, Position.DECISION)
        with side.engine() as engine:
            failed = [check for check in check_plumbing(engine, tokens) if not check.passed]
        for check in failed:
            remedy = _REMEDIES.get(check.name, "name the modules in the spec")
            raise MechdiffError(f"{check.name} fails in {side.role}: {check.detail}; {remedy}.")
    sublayers = {site.hook for site in pair.base.sites & pair.tuned.sites} > {Hook.RESID_PRE, Hook.RESID_POST}
    what = "blocks add what their sublayers give" if sublayers else "resid_pre and resid_post alone are sites"
    return f"every hook fires once a forward, {what}, in both models"


_REMEDIES = {
    "capture depends on neither padding nor batch size": "pass --batch-size 1",
    "prompts are read as the model reads them": "it cannot be measured here, take another model",
}
"""Remedies of checks that other names of modules do not mend."""


def _capture_is_invariant(pair: Pair, prompts: PromptSet, sites: list[Site]) -> str:
    """Alone, unpadded, and in a batch with longer prompts, a prompt has the same activations."""
    together = capture(pair, "tuned", prompts, Position.DECISION, sites)
    tokens, worst = pair.tokens("tuned", prompts, Position.DECISION), 0.0
    with pair.tuned.engine() as engine:
        for index in range(len(prompts)):
            alone = engine.capture(tokens[index : index + 1], sites)
            for site in sites:
                one, expected = alone[site][0], together[site][index]
                worst = max(worst, float((one - expected).abs().max() / expected.abs().max()))
    if not worst <= CAPTURE_TOLERANCE[pair.spec.dtype]:
        raise MechdiffError(
            f"Activations change by {worst:.1g} with padding; the model does not honour its attention mask, "
            "pass --batch-size 1."
        )
    return f"largest relative difference {worst:.1g}"


def _identity(pair: Pair, prompts: PromptSet, sites: list[Site]) -> str:
    rows = LocalWorkers(pair).score(prompts, Position.DECISION, {site: {} for site in sites})
    floors = {site: rows[site].patched[IDENTITY].mean_kl for site in sites}
    worst = max(floors, key=lambda site: floors[site])
    limit = FLOOR_LIMIT_NATS[pair.spec.dtype]
    if not floors[worst] <= limit:
        raise MechdiffError(
            f"An activation put back at {worst} moves KL by {floors[worst]:.1g} nats, above {limit:g}; "
            "the engine does not fit this model; report it."
        )
    return f"noise floor at most {floors[worst]:.1g} nats ({worst})"


def _oracle(pair: Pair, prompts: PromptSet) -> str:
    """The tuned activation itself in place of the base one must undo the raw patch entirely."""
    site = Site(pair.n_layers - 1, Hook.RESID_POST)
    rows = LocalWorkers(pair).score(prompts, Position.DECISION, {site: {}})[site].patched
    if "raw" not in rows:
        return "widths differ: nothing to cross-patch raw"
    raw, oracle = rows["raw"].mean_kl, rows[IDENTITY].mean_kl
    if raw == 0:
        raise MechdiffError("Base and tuned agree at the last layer on every prompt; are they two models?")
    drop = 100 * (1 - oracle / raw)
    if drop < 99:
        raise MechdiffError(f"The oracle map drops KL at {site} by {drop:.1f} % only, not 100; report it.")
    return f"drop {drop:.4g} % of {raw:.3g} nats at {site}"


def _untouched(pair: Pair, prompts: PromptSet) -> str:
    first = pair.first_changed_layer()
    if first is None:
        return "weights cannot be compared tensor by tensor"
    if first == 0 or not pair.tokenizers_agree:
        return "the first layer differs already, or the tokens do"
    sites = [site for found in _sites(pair, range(first)) for site in found]
    base, tuned = (capture(pair, role, prompts, Position.DECISION, sites) for role in ("base", "tuned"))
    if not all(torch.equal(base[site], tuned[site]) for site in sites):
        again = []  # tuned may have been recorded the way in which it is patched, which rounds otherwise
        for side in (pair.tuned, pair.base):
            with side.engine() as engine:
                again.append(engine.capture(pair.tokens(side.role, prompts, Position.DECISION), sites))
        tuned, base = again
    if not torch.equal(base[sites[0]], tuned[sites[0]]):
        return "what enters the first layer differs already"
    for site in sites:
        if not torch.equal(base[site], tuned[site]):
            raise MechdiffError(
                f"Weights agree below layer {first} and activations at {site} do not; report it."
            )
    return f"first changed layer {first}; all {len(sites)} sites below are bit-identical"
