"""Patching the mean of a span, against hooks written from the definition."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES
from test_elastic import assert_equal_scores
from test_patch_engine import module_at
from torch import Tensor, nn

from mechdiff_mlflow.engine import PatchEngine, VariantGroup
from mechdiff_mlflow.measures.metrics import next_token_divergences
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

SITES = [Site(layer, hook) for layer in range(2) for hook in Hook]
LENGTHS, STARTS, SPANS = (9, 6, 12, 6, 7, 5), (2, 1, 5, 1, 0, 4), (4, 3, 4, 2, 7, 1)


def prompts() -> TokenizedPrompts:
    """Padded chunks, a span from the first token to the last, and one of a single token."""
    return TokenizedPrompts(tiny.prompts(*LENGTHS).ids, STARTS, SPANS)


def by_definition(
    model: nn.Module, module: nn.Module, *, is_input: bool, ids: tuple[int, ...], span: slice, vector: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean of the span's own activations, and the logits once all have moved by vector − mean."""
    means: list[Tensor] = []

    def move(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        means.append(hidden[0, span].mean(0))
        hidden[0, span] += vector - means[0]
        return hidden

    def on_output(_: nn.Module, args: Any, out: Any) -> Any:
        return (move(out[0]), *out[1:]) if isinstance(out, tuple) else move(out)

    if is_input:
        handle = module.register_forward_pre_hook(lambda m, args: (move(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(on_output)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    handle.remove()
    return means[0], logits


@pytest.mark.parametrize(("mode", "batch_size"), [("auto", 2), ("auto", 16), ("naive", 3)])
def test_scores_are_the_definition(mode: str, batch_size: int) -> None:
    model = tiny.llama(n_layers=2, dtype=torch.float64)
    engine = PatchEngine(model, mode=mode, batch_size=batch_size)
    captured = engine.capture(prompts(), SITES)
    generator = torch.Generator().manual_seed(1)
    values = {
        site: x[:, None] + x.std() * torch.randn(len(x), 3, 32, generator=generator, dtype=x.dtype)
        for site, x in captured.items()
    }
    result = engine.score(prompts(), [VariantGroup(site, v) for site, v in values.items()])
    with torch.no_grad():
        clean = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts().ids]
    for site, found in zip(SITES, result.divergences, strict=True):
        for i, ids in enumerate(prompts().ids):
            span = slice(STARTS[i], STARTS[i] + SPANS[i])
            for v in range(3):
                mean, logits = by_definition(
                    model,
                    module_at(model, site),
                    is_input=site.hook is Hook.RESID_PRE,
                    ids=ids,
                    span=span,
                    vector=values[site][i, v],
                )
                torch.testing.assert_close(captured[site][i], mean, rtol=1e-6, atol=1e-9)
                expected = next_token_divergences(logits, clean[i]).kl_patched_clean
                torch.testing.assert_close(found.kl_patched_clean[i, v], expected, rtol=1e-5, atol=1e-9)


def test_the_own_mean_changes_nothing_and_a_span_of_one_is_that_token() -> None:
    engine = PatchEngine(tiny.llama(n_layers=2, dtype=torch.float64))
    for found in engine.score(prompts(), [VariantGroup.identity(site) for site in SITES]).divergences:
        assert found.kl_patched_clean.abs().max() < 1e-12
    plain = tiny.prompts(*LENGTHS, from_end=3)
    ones = TokenizedPrompts(plain.ids, plain.positions, (1,) * len(LENGTHS))
    groups = [VariantGroup(site, lambda i, x: x.unsqueeze(1) + 1, 1) for site in SITES]
    assert_equal_scores(engine.score(ones, groups), engine.score(plain, groups))


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.name in ("GPT-2", "Mistral")], ids=lambda f: f.name
)
def test_models_that_need_the_reference_take_it(family: Any) -> None:
    model = family.build(family.attentions[0])
    groups = [VariantGroup(site, lambda i, x: x.unsqueeze(1) + x.std(), 1) for site in SITES]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine = PatchEngine(model)
        found = engine.score(prompts(), groups)
    assert any("'naive'" in str(w.message) for w in said) == (family.name == "Mistral")
    expected = PatchEngine(model, mode="naive").score(prompts(), groups)
    for a, b in zip(found.divergences, expected.divergences, strict=True):
        torch.testing.assert_close(a.kl_patched_clean, b.kl_patched_clean, rtol=1e-4, atol=1e-6)


def test_gradients_are_of_the_replacement() -> None:
    """½·δᵀFδ, F from sampled gradients, is the KL of a small replacement."""
    engine = PatchEngine(tiny.llama(n_layers=2, dtype=torch.float64))
    site = Site(0, Hook.MLP_OUT)
    clean = engine.capture(prompts(), [site])[site]
    delta = torch.randn(clean.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delta *= 1e-3 * clean.norm() / delta.norm()
    kl = engine.score(prompts(), [VariantGroup(site, (clean + delta).unsqueeze(1))]).divergences[0]
    samples = [engine.score_gradients(prompts(), [site], seed=seed)[site] for seed in range(150)]
    predicted = torch.stack([(g @ delta) ** 2 / 2 for g in samples]).mean(0)
    torch.testing.assert_close(predicted, kl.kl_clean_patched[:, 0], rtol=0.4, atol=0.0)


def test_heads_are_averaged_like_what_they_add_up_to() -> None:
    engine = PatchEngine(tiny.llama(n_layers=2, dtype=torch.float64))
    site, heads = Site(1, Hook.ATTN_OUT), engine.heads(1)
    torch.testing.assert_close(
        heads.project(heads.capture(prompts())), engine.capture(prompts(), [site])[site], rtol=1e-6, atol=1e-8
    )


def test_what_was_captured_is_put_back_to_the_bit() -> None:
    """Whatever computes the models faster elsewhere."""
    engine = PatchEngine(tiny.llama(n_layers=2))
    captured = engine.capture(prompts(), SITES)
    result = engine.score(prompts(), [VariantGroup(site, captured[site].unsqueeze(1)) for site in SITES])
    assert all(torch.equal(result.clean[site], captured[site]) for site in SITES)
    assert all((found.kl_patched_clean == 0).all() for found in result.divergences)
