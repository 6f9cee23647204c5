"""Checks before any number: that a pair can give what is asked of it, and that its models can be measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mechdiff_mlflow.engine import check_plumbing
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments.fitting import wrong_layer_site
from mechdiff_mlflow.experiments.protocol import Protocol
from mechdiff_mlflow.experiments.rows import IDENTITY, capture
from mechdiff_mlflow.experiments.study import Study
from mechdiff_mlflow.experiments.workers import LocalWorkers
from mechdiff_mlflow.maps.affine import AffineMap, Family
from mechdiff_mlflow.models.pairs import Pair
from mechdiff_mlflow.solvers import OffSpan, check_possible
from mechdiff_mlflow.spec.pair_spec import Cell, Position
from mechdiff_mlflow.spec.prompts import PromptSet
from mechdiff_mlflow.spec.sites import Hook, Site

N_PROMPTS = 8
"""Prompts that the checks run on: enough for unequal lengths, few enough for an 8B model on a laptop."""

_ESSENTIAL = ("same token ids", "plumbing", "untouched layers agree")
"""Checks without which no number may be printed."""


def check_pair(protocol: Protocol, pair: Pair) -> None:
    """Raise a MechdiffError unless there are as many prompts as asked for and both sides can read them."""
    study = Study(pair, protocol)
    if study.report_prompts.n_groups < 2:
        raise MechdiffError(
            f"{len(study.report_prompts)} {protocol.split} prompts, {study.report_prompts.n_groups} of them "
            "independent, give no interval; pass a larger --n, or add prompts of another group to the file."
        )
    if few := study.report_prompts.few:
        warnings.warn(few, stacklevel=2)
    for prompts in study.prompt_sets:
        pair.check_same_tokens(prompts, protocol.position)
    plant, widths = pair.spec.tuned.plant, _widths(pair)
    if plant is not None:
        check_sites([plant.site], pair)
        if widths is not None:
            plant.check_width(widths[0])


def check_sites(sites: Iterable[Site], pair: Pair) -> None:
    """Raise a MechdiffError unless both models have these sites."""
    outlines = pair.outlines()
    for site in dict.fromkeys(sites):
        if site.layer >= pair.n_layers:
            n = pair.n_layers
            raise MechdiffError(f"Layer {site.layer} does not exist: the model has {n} layers, 0 to {n - 1}.")
        for outline in outlines:
            outline.check(site)


def check_cells(cells: Sequence[Cell], protocol: Protocol, pair: Pair) -> None:
    """Raise a MechdiffError unless every map can be fitted: sites, solvers, families, ranks and scales."""
    check_pair(protocol, pair)
    sites = dict.fromkeys(cell.site for cell in cells)
    check_sites([*sites, *(wrong_layer_site(site, pair) for site in sites)], pair)
    n_train, widths = len(Study(pair, protocol).train_prompts), _widths(pair)
    if n_train < 2:
        raise MechdiffError(f"{n_train} train prompt is too little to fit on; give --n-train 2 or more.")
    if protocol.alpha_fit == "inside" and any(0 in cell.alpha.values for cell in cells):
        raise MechdiffError("α=0 cannot be taken inside a fit; pass α above 0, or --alpha-fit after.")
    if widths is None:  # the configuration does not say
        return
    for solver, family, rank in dict.fromkeys((c.solver, c.family, c.rank) for c in cells):
        check_possible(solver, family, *widths, rank.k)
        natural = OffSpan.natural(Family.parse(family))
        if protocol.off_span not in (None, natural) and rank.k is not None and n_train <= widths[0]:
            raise MechdiffError(
                f"{n_train} train prompts do not span {widths[0]} dimensions, and a rank-{rank} map of the "
                f"{family} family cannot treat the others as {protocol.off_span}; use {natural}, or the full "
                "map."
            )
        if solver == "logit_subspace" and protocol.directions > widths[1]:
            raise MechdiffError(
                f"{protocol.directions} output directions are more than the {widths[1]} dimensions that the "
                "tuned model has; lower --directions."
            )
    full = {(c.site, c.solver, c.family, c.alpha) for c in cells if c.rank.k is None}
    for cell in cells:
        if cell.rank.k == min(widths) and (cell.site, cell.solver, cell.family, cell.alpha) in full:
            raise MechdiffError(
                f"Rank {cell.rank} and full are the same at {cell.site}, whose width is {min(widths)}; leave "
                "one of them out."
            )


def check_map(map_: AffineMap, name: str, site: Site, pair: Pair, *, allow_pair_mismatch: bool) -> None:
    """Raise a MechdiffError unless the map called `name` fits its site, and its pair where that is asked."""
    check_sites([site], pair)
    widths = _widths(pair)
    if widths is not None and (map_.d_in, map_.d_out) != widths:
        raise MechdiffError(
            f"Map {name} takes {map_.d_in} to {map_.d_out} dimensions and {site} of this pair needs "
            f"{widths[0]} to {widths[1]}; use a map that was fitted on this pair."
        )
    theirs = map_.meta.get("fingerprint", "unknown")
    if theirs != pair.fingerprint and not allow_pair_mismatch:
        raise MechdiffError(
            f"Map {name} was fitted on pair {theirs} and this is {pair.fingerprint} (other weights, "
            "tokenizer, template, dtype or prompts, or an earlier mechdiff); name its own pair, fit again, "
            "or --allow-pair-mismatch."
        )


def _widths(pair: Pair) -> tuple[int, int] | None:
    """The widths of base and tuned, as their configurations say."""
    outlines = pair.outlines()
    return (outlines[0].width, outlines[1].width) if len(outlines) == 2 else None


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
    """Raise what the first failing check says of those without which no number may be printed.

    They look at few prompts and layers: this precedes every run, and `examine` looks at all.
    """
    checks = _checks(pair, thorough=False)
    for name in _ESSENTIAL:
        checks[name]()


def _checks(pair: Pair, *, thorough: bool = True) -> dict[str, Callable[[], str]]:
    """Checks by name; each says what it saw, or raises."""
    prompts = pair.prompts_of("val").first(min(N_PROMPTS, len(pair.prompts["val"])))
    return {
        "prompts": lambda: _counts(pair),
        "templates and BOS": lambda: _templates(pair, prompts),
        "same token ids": lambda: _same_tokens(pair, prompts),
        "sites respond": lambda: _engine_line(pair),
        "plumbing": lambda: _plumbing(pair, prompts, thorough=thorough),
        "oracle map": lambda: _oracle(pair, prompts),
        "untouched layers agree": lambda: _untouched(pair, prompts, thorough=thorough),
    }


def _counts(pair: Pair) -> str:
    found = ", ".join(f"{len(prompts)} {split}" for split, prompts in pair.prompts.items()) + ", disjoint"
    few = pair.prompts["test"].few if "test" in pair.prompts else ""
    return f"{found}; {few}" if few else found


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


def _plumbing(pair: Pair, prompts: PromptSet, *, thorough: bool) -> str:
    """The engine's own checks of both models: hooks, padding, sublayers, identity patches, plain forwards."""
    for side in (pair.tuned, pair.base):  # in this order, and one held at a time is loaded once fewer
        tokens = pair.tokens(side.role, prompts, Position.DECISION)
        with side.engine() as engine:
            checks = check_plumbing(engine, tokens, thorough=thorough)
        for check in checks:
            if not check.passed:
                remedy = _REMEDIES.get(check.name, "name the modules in the spec")
                raise MechdiffError(f"{check.name} fails in {side.role}: {check.detail}; {remedy}.")
    return "in both models; in base, " + "; ".join(f"{check.name}: {check.detail}" for check in checks)


_REMEDIES = {
    "capture depends on neither padding nor batch size": "pass --batch-size 1",
    "prompts are read as the model reads them": "it cannot be measured here, take another model",
    "identity patches change nothing": "the engine does not fit this model, report it",
}
"""Remedies of checks that other names of modules do not mend."""


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


def _untouched(pair: Pair, prompts: PromptSet, *, thorough: bool) -> str:
    first = pair.first_changed_layer()
    if first is None:
        return "weights cannot be compared tensor by tensor"
    if first == 0 or not pair.tokenizers_agree:
        return "the first layer differs already, or the tokens do"
    both = pair.base.sites & pair.tuned.sites  # the blocks of a hybrid differ
    layers = range(first) if thorough else sorted({0, first // 2, first - 1})
    sites = [site for layer in layers for hook in Hook if (site := Site(layer, hook)) in both]
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
