import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mechdiff_mlflow.spec.sites import Hook, Site
from scripts.demo_pairs.measure import activations, kl_patched_clean_nats, next_token_logits

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 1], [2, 2, 2, 3]]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_logits_are_those_of_each_prompt_alone(model: LlamaForCausalLM) -> None:
    alone = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in PROMPTS])
    torch.testing.assert_close(next_token_logits(model, PROMPTS), alone)
    torch.testing.assert_close(next_token_logits(model, PROMPTS, batch=1), alone)


def test_the_hooks_are_where_the_residual_stream_says(model: LlamaForCausalLM) -> None:
    sites = [Site(layer, hook) for layer in range(3) for hook in Hook]
    at, _ = activations(model, PROMPTS, sites)
    for layer in range(3):
        before, after = at[Site(layer, Hook.RESID_PRE)], at[Site(layer, Hook.RESID_POST)]
        added = at[Site(layer, Hook.ATTN_OUT)] + at[Site(layer, Hook.MLP_OUT)]
        torch.testing.assert_close(before + added, after)
    torch.testing.assert_close(at[Site(0, Hook.RESID_POST)], at[Site(1, Hook.RESID_PRE)])


@pytest.mark.parametrize("hook", list(Hook))
def test_patching_replaces_the_decision_token_only(model: LlamaForCausalLM, hook: Hook) -> None:
    site = Site(1, hook)
    at, clean = activations(model, PROMPTS, [site])
    assert kl_patched_clean_nats(model, PROMPTS, site, at[site], clean).abs().max() == 0
    kl = kl_patched_clean_nats(model, PROMPTS, site, at[site] + 1, clean)
    assert (kl > 1e-6).all()
    again = next_token_logits(model, PROMPTS)  # the hooks are gone
    assert torch.equal(again, clean)


def test_kl_of_the_last_residual_is_that_of_the_two_heads(model: LlamaForCausalLM) -> None:
    site = Site(2, Hook.RESID_POST)
    at, clean = activations(model, PROMPTS, [site])
    values = at[site].flip(0)  # each prompt gets another's final residual, hence its distribution
    p, q = clean.flip(0).double().softmax(-1), clean.double().softmax(-1)
    torch.testing.assert_close(
        kl_patched_clean_nats(model, PROMPTS, site, values, clean),
        (p * (p / q).log()).sum(-1),
        atol=1e-6,
        rtol=1e-5,
    )
