import pytest
import tiny
import torch
from torch import Tensor, nn

from mechdiff_mlflow.engine import PatchEngine, VariantGroup
from mechdiff_mlflow.measures.metrics import next_token_divergences
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

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
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", ["sweep", "masked", "naive"])
def test_score_is_patching_by_definition(mode: str, attention: str, from_end: int) -> None:
    model, prompts = tiny.llama(attention=attention), tiny.prompts(*LENGTHS, from_end=from_end)
    engine = PatchEngine(model, mode=mode, batch_size=3)
    assert engine.mode == mode
    groups = noisy(engine, prompts, ALL_SITES, 2)
    before = engine.n_forwards
    result = engine.score(prompts, groups)
    if mode != "naive":
        assert engine.n_forwards == before + len(prompts)
    clean = clean_logits(model, prompts)
    for group, found in zip(groups, result.divergences, strict=True):
        patched = tiny.patched_by_definition(model, prompts, module_at(model, group.site), group)
        expected = next_token_divergences(patched, clean[:, None])
        torch.testing.assert_close(found.kl_patched_clean, expected.kl_patched_clean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.kl_clean_patched, expected.kl_clean_patched, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.delta_logprob, expected.delta_logprob, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.top1_agrees, expected.top1_agrees)
        if from_end == 1 or (group.site.layer < 3 and group.site.hook is not Hook.RESID_POST):
            assert found.kl_patched_clean.min() > 1e-4
    captured = engine.capture(prompts, ALL_SITES)
    assert all(torch.equal(result.clean[site], captured[site]) for site in ALL_SITES)


@pytest.mark.parametrize("mode", ["sweep", "masked"])
@pytest.mark.parametrize(
    ("max_rows", "head_rows", "batch_size"), [(1, 1, 1), (7, 5, 3), (40, 3, 7), (9999, 9999, 7)]
)
def test_scores_do_not_depend_on_how_rows_are_grouped(
    mode: str, max_rows: int, head_rows: int, batch_size: int
) -> None:
    model, prompts = tiny.llama(dtype=torch.float64), tiny.prompts(*LENGTHS, from_end=2)
    expected = PatchEngine(model, mode="naive")
    groups = noisy(expected, prompts, ALL_SITES[::3], 3)
    engine = PatchEngine(model, mode=mode, max_rows=max_rows, head_rows=head_rows, batch_size=batch_size)
    pairs = zip(
        expected.score(prompts, groups).divergences, engine.score(prompts, groups).divergences, strict=True
    )
    for reference, found in pairs:
        torch.testing.assert_close(found.kl_patched_clean, reference.kl_patched_clean, rtol=1e-10, atol=1e-13)


def test_prompts_with_different_positions_are_scored_each_at_its_own() -> None:
    model, prompts = tiny.llama(dtype=torch.float64), tiny.prompts(*LENGTHS)
    positions = tuple(n - 1 - i % 3 for i, n in enumerate(LENGTHS))
    prompts = TokenizedPrompts((*prompts.ids, (5,)), (*positions, 0))  # and one of a single token
    naive, engine = PatchEngine(model, mode="naive", batch_size=1), PatchEngine(model)
    groups = noisy(naive, prompts, ALL_SITES[4:8], 2)
    pairs = zip(
        naive.score(prompts, groups).divergences, engine.score(prompts, groups).divergences, strict=True
    )
    for reference, found in pairs:
        torch.testing.assert_close(found.kl_patched_clean, reference.kl_patched_clean, rtol=1e-10, atol=1e-13)


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
