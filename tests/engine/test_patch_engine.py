import pytest
import tiny
import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine import PatchEngine, VariantGroup
from mechdiff_mlflow.metrics import next_token_divergences
from mechdiff_mlflow.prompts import TokenizedPrompts
from mechdiff_mlflow.sites import Hook, Site

ALL_SITES = [Site(layer, hook) for layer in range(4) for hook in Hook]
LENGTHS = (9, 5, 12, 5, 7, 3, 9)


def module_at(model: nn.Module, site: Site) -> nn.Module:
    layer = model.model.layers[site.layer]
    return {Hook.ATTN_OUT: layer.self_attn, Hook.MLP_OUT: layer.mlp}.get(site.hook, layer)


def clean_logits(model: nn.Module, prompts: TokenizedPrompts) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts.ids])


def noisy(
    engine: PatchEngine, prompts: TokenizedPrompts, sites: list[Site], n_variants: int
) -> list[VariantGroup]:
    captured = engine.capture(prompts, sites)
    generator = torch.Generator().manual_seed(1)
    return [
        VariantGroup(
            site,
            x[:, None]
            + x.std() * torch.randn(len(x), n_variants, x.shape[1], generator=generator, dtype=x.dtype),
        )
        for site, x in captured.items()
    ]


@pytest.mark.parametrize("from_end", [1, 3])
def test_capture_reads_what_a_lone_unpadded_prompt_computes(from_end: int) -> None:
    model, prompts = tiny.llama(), tiny.prompts(*LENGTHS, from_end=from_end)
    engine = PatchEngine(model, batch_size=3)
    captured = engine.capture(prompts, ALL_SITES)
    assert list(captured) == ALL_SITES
    assert engine.n_forwards == len(prompts)
    for site in ALL_SITES:
        seen: list[Tensor] = []
        module = module_at(model, site)
        if site.hook is Hook.RESID_PRE:
            handle = module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        else:
            take = lambda m, a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
            handle = module.register_forward_hook(take)
        clean_logits(model, prompts)
        handle.remove()
        expected = torch.stack([h[0, p] for h, p in zip(seen, prompts.positions, strict=True)])
        torch.testing.assert_close(captured[site], expected, rtol=1e-5, atol=1e-5)


def test_capture_depends_on_neither_padding_nor_batch_size() -> None:
    model, prompts = tiny.llama(dtype=torch.float64), tiny.prompts(*LENGTHS)
    alone = PatchEngine(model, batch_size=1).capture(prompts, ALL_SITES)
    together = PatchEngine(model, batch_size=7).capture(prompts, ALL_SITES)
    for site in ALL_SITES:
        torch.testing.assert_close(alone[site], together[site], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("from_end", [1, 3])
def test_score_is_patching_by_definition(from_end: int) -> None:
    model, prompts = tiny.llama(), tiny.prompts(*LENGTHS, from_end=from_end)
    engine = PatchEngine(model, batch_size=3)
    groups = noisy(engine, prompts, [Site(0, Hook.RESID_PRE), *ALL_SITES[5:8], ALL_SITES[12]], 2)
    result = engine.score(prompts, groups)
    clean = clean_logits(model, prompts)
    for group, found in zip(groups, result.divergences, strict=True):
        patched = tiny.patched_by_definition(model, prompts, module_at(model, group.site), group)
        expected = next_token_divergences(patched, clean[:, None])
        torch.testing.assert_close(found.kl_patched_clean, expected.kl_patched_clean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.kl_clean_patched, expected.kl_clean_patched, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.delta_logprob, expected.delta_logprob, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.top1_agrees, expected.top1_agrees)
        if group.site.layer < 3 or from_end == 1:
            assert found.kl_patched_clean.min() > 1e-3
        captured = engine.capture(prompts, [group.site])[group.site]
        assert torch.equal(result.clean[group.site], captured)
    assert torch.equal(result.clean_top, clean.argmax(-1))


def test_identity_patches_are_run_and_equal_vectors_are_exactly_zero() -> None:
    model, prompts = tiny.llama(), tiny.prompts(*LENGTHS)
    engine = PatchEngine(model, batch_size=3)
    site, other = Site(1, Hook.ATTN_OUT), Site(2, Hook.RESID_POST)
    own = engine.capture(prompts, [site])[site]
    mixed = torch.stack([own, own + 1, own], 1)
    mixed[2, 1] = own[2]
    groups = [
        VariantGroup(site, mixed),
        VariantGroup.identity(other),
        VariantGroup(other, lambda i, x: 0 * x[:, None], 1),
    ]
    before = engine.n_forwards
    unchanged, identity, zero = engine.score(prompts, groups).divergences
    assert engine.n_forwards >= before + len(prompts)
    assert (unchanged.kl_patched_clean[:, [0, 2]] == 0).all()
    assert (unchanged.top1_agrees[:, [0, 2]] == 1).all()
    changed = torch.arange(len(prompts)) != 2
    assert (unchanged.kl_patched_clean[changed, 1] > 1e-4).all()
    assert unchanged.kl_patched_clean[2, 1] == 0
    assert identity.kl_patched_clean.abs().max() < 1e-9
    assert zero.kl_patched_clean.min() > 1e-4


def test_functions_are_given_prompts_and_their_own_activations() -> None:
    model, prompts = tiny.llama(), tiny.prompts(*LENGTHS)
    engine, site = PatchEngine(model, batch_size=3), Site(2, Hook.MLP_OUT)
    own = engine.capture(prompts, [site])[site]
    offsets = torch.randn(len(prompts), 2, 32)
    lazy = VariantGroup(site, lambda index, clean: clean[:, None] + offsets[index], 2)
    eager = VariantGroup(site, own[:, None] + offsets)
    first, second = engine.score(prompts, [lazy, eager]).divergences
    torch.testing.assert_close(first.kl_patched_clean, second.kl_patched_clean)


def test_progress_counts_prompts() -> None:
    prompts, seen = tiny.prompts(*LENGTHS), list[int]()
    engine = PatchEngine(tiny.llama(), batch_size=3)
    engine.score(prompts, [VariantGroup.identity(Site(0, Hook.MLP_OUT))], seen.append)
    assert seen == [3, 6, 7]
