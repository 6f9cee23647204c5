"""Patches and comparisons along an answer, against plain hooks in float64, one prompt at a time."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, Family
from torch import Tensor, nn

from mechdiff_mlflow.engine import PatchEngine, VariantGroup
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import Answers, TokenizedPrompts

LENGTHS = (5, 9, 7, 5)
SITES = [Site(1, Hook.RESID_PRE), Site(1, Hook.ATTN_OUT), Site(2, Hook.MLP_OUT), Site(3, Hook.RESID_POST)]


def answered(n_tokens: int, *, each: bool) -> TokenizedPrompts:
    """Prompts of unequal length with answers of unequal length, at most `n_tokens`."""
    lengths = [max(1, n_tokens - i) for i in range(len(LENGTHS))]
    ids = tiny.prompts(*lengths, seed=1).ids
    return tiny.prompts(*LENGTHS).answered(Answers(ids, n_tokens, each))


def by_definition(
    model: nn.Module, module: nn.Module, site: Site, ids: tuple[int, ...], first: int, vectors: Tensor
) -> Tensor:
    """Log-probabilities [tokens, vocabulary] once the activations from `first` on are `vectors`."""

    def put(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden.view(1, len(ids), -1)[0, first : first + len(vectors)] = vectors
        return hidden

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (put(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": put(kwargs["hidden_states"])}

    def after(_: nn.Module, args: Any, out: Any) -> Any:
        return (put(out[0]), *out[1:]) if isinstance(out, tuple) else put(out)

    if site.hook is Hook.RESID_PRE:
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("each", [False, True], ids=["decision", "answer"])
@pytest.mark.parametrize("n_tokens", [1, 4, 16])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_step_is_what_plain_hooks_give(family: Family, n_tokens: int, each: bool) -> None:
    # Routers and RMS norms compute in float32 whatever the dtype, and some experts know no other.
    exact = family.layer_norm and family.name != "Bloom"  # whose padding is NaN in float64
    model = family.build(family.attentions[0], torch.float64 if exact else torch.float32)
    prompts = answered(n_tokens, each=each)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some are computed the slower way
        engine = PatchEngine(model, batch_size=2)
        sites = [site for site in SITES if engine.forward.decoder.has(site)]
        own = engine.capture(prompts, sites)
        generator = torch.Generator().manual_seed(0)
        values = {
            site: x[:, None] + 0.5 * x.std() * torch.randn(len(x), 2, x.shape[1], generator=generator).to(x)
            for site, x in own.items()
        }
        result = engine.score(prompts, [VariantGroup(site, values[site]) for site in sites])
    close = {"rtol": 1e-9, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-6}
    for site, found in zip(sites, result.divergences, strict=True):
        module = family.module(model, site)
        for i, ids in enumerate(prompts.ids):
            first, steps = prompts.positions[i], prompts.n_steps(i)
            clean = by_definition(model, module, site, ids, 0, torch.zeros(0, 32))[-steps:]
            n_replaced = steps if each else 1
            for v in range(2):
                vectors = values[site][i, v].view(-1, 32)[:n_replaced]
                patched = by_definition(model, module, site, ids, first, vectors)[-steps:]
                expected = (patched.exp() * (patched - clean)).sum(-1)
                kl = found.kl_patched_clean[i, v].reshape(-1)
                torch.testing.assert_close(kl[:steps], expected, **close)
                assert kl[steps:].isnan().all()


@pytest.mark.parametrize("mode", ["auto", "masked", "naive"])
def test_the_first_step_is_the_measure_of_one_token_whatever_follows(mode: str) -> None:
    engine = PatchEngine(tiny.llama(dtype=torch.float64), mode=mode)
    site, plain = Site(1, Hook.ATTN_OUT), tiny.prompts(*LENGTHS)
    values = engine.capture(plain, [site])[site].unsqueeze(1).roll(1, 0)
    (alone,) = engine.score(plain, [VariantGroup(site, values)]).divergences
    for each in (False, True):
        prompts = answered(4, each=each)
        both = values.repeat(1, 1, 4) if each else values
        (found,) = engine.score(prompts, [VariantGroup(site, both)]).divergences
        torch.testing.assert_close(found.kl_patched_clean[:, :, 0], alone.kl_patched_clean)
        torch.testing.assert_close(found.delta_logprob[:, :, 0], alone.delta_logprob)


@pytest.mark.parametrize("each", [False, True])
def test_ones_own_activations_change_nothing_and_the_floor_is_of_the_whole_answer(each: bool) -> None:
    engine, prompts = PatchEngine(tiny.llama()), answered(4, each=each)
    captured = engine.capture(prompts, SITES)
    same = engine.score(prompts, [VariantGroup(site, captured[site].unsqueeze(1)) for site in SITES])
    assert all(torch.nansum(found.kl_patched_clean) == 0 for found in same.divergences)
    recorded = engine.record(prompts, SITES)
    before = engine.n_forwards
    again = engine.score(recorded, [VariantGroup.identity(site) for site in SITES])
    assert engine.n_forwards == before, "a recorded answer was run again"
    assert all(torch.nansum(found.kl_patched_clean) < 1e-6 for found in again.divergences)
    floors = engine.clean_noise(prompts)
    assert floors.shape == (len(prompts), 2)
    first = engine.clean_noise(tiny.prompts(*LENGTHS))
    assert bool((floors[:, 1] >= first[:, 1] * (1 - 1e-6)).all())
