"""Gradients of sampled log-probabilities, against differences of log-probabilities in float64."""

from __future__ import annotations

import tiny
import torch

from mechdiff_mlflow.engine import PatchEngine, VariantGroup
from mechdiff_mlflow.spec.sites import Hook, Site

PROMPTS = tiny.prompts(9, 4, 12, 5, from_end=2)


def test_half_of_delta_fisher_delta_is_the_kl_of_a_small_replacement() -> None:
    """Summed over every next token by its probability; here over many samples."""
    engine = PatchEngine(tiny.llama(dtype=torch.float64))
    site = Site(1, Hook.ATTN_OUT)
    clean = engine.capture(PROMPTS, [site])[site]
    delta = torch.randn(clean.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    delta *= 1e-3 * clean.norm() / delta.norm()
    group = VariantGroup(site, (clean + delta).unsqueeze(1))
    kl = engine.score(PROMPTS, [group]).divergences[0].kl_clean_patched[:, 0]
    samples = [engine.score_gradients(PROMPTS, [site], seed=seed)[site] for seed in range(400)]
    predicted = torch.stack([(g @ delta) ** 2 / 2 for g in samples]).mean(0)
    torch.testing.assert_close(predicted, kl, rtol=0.3, atol=0.0)
    mean = torch.stack([g @ delta for g in samples]).mean(0)
    assert bool((mean.abs() < 0.3 * (2 * kl).sqrt()).all()), "the expected score is 0"


def test_sites_and_chunks_do_not_matter_and_the_model_is_as_before() -> None:
    model = tiny.llama(dtype=torch.float64)
    sites = [Site(0, Hook.RESID_PRE), Site(1, Hook.MLP_OUT), Site(1, Hook.RESID_POST)]
    before = [p.requires_grad for p in model.parameters()]
    together = PatchEngine(model, batch_size=4).score_gradients(PROMPTS, sites, seed=3)
    for site in sites:
        alone = PatchEngine(model, batch_size=4).score_gradients(PROMPTS, [site], seed=3)[site]
        torch.testing.assert_close(alone, together[site], rtol=1e-10, atol=1e-14)
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
