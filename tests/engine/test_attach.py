"""A map at work in a live model does what patching by definition does, and leaves nothing behind."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from families import FAMILIES, Family
from torch import Tensor, nn

from mechdiff_mlflow.engine import PatchEngine, VariantGroup
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.models.attach import attached
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

SITE = Site(2, Hook.ATTN_OUT)
PAD, NEW = 0, 5


def a_map(d: int, seed: int = 0, **meta: Any) -> AffineMap:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator).double() for shape in ((d, 2), (2, d)))
    means = torch.randn(2, d, generator=generator).double()
    return AffineMap(means[0], means[1], Weight.low_rank(0.3 * left, right, 1.0), 0.8, meta)


def padded(prompts: TokenizedPrompts, side: str = "left") -> dict[str, Tensor]:
    """A batch as a tokenizer gives it."""
    length = max(map(len, prompts.ids))
    fill = [[PAD] * (length - len(ids)) for ids in prompts.ids]
    rows = [[*f, *ids] if side == "left" else [*ids, *f] for f, ids in zip(fill, prompts.ids, strict=True)]
    real = [[0] * len(f) for f in fill]
    ones = [[1] * len(ids) for ids in prompts.ids]
    mask = [[*r, *o] if side == "left" else [*o, *r] for r, o in zip(real, ones, strict=True)]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def is_input(site: Site) -> bool:
    return site.hook is Hook.RESID_PRE


def own_activations(model: nn.Module, ids: tuple[int, ...], module: nn.Module, *, at_input: bool) -> Tensor:
    """The activations of one unpadded prompt, [tokens, width]."""
    kept = []

    def keep_output(_: nn.Module, args: Any, out: Any) -> None:
        kept.append(
            (out[0] if isinstance(out, tuple) else out).view(len(ids), -1).clone()
        )  # Falcon adds in place

    def keep_input(_: nn.Module, args: Any, kwargs: Any) -> None:
        kept.append((args[0] if args else kwargs["hidden_states"]).view(len(ids), -1))

    if at_input:
        handle = module.register_forward_pre_hook(keep_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(keep_output)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return kept[0]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return tiny.llama(seed=1)


@pytest.fixture(scope="module")
def tuned() -> nn.Module:
    return tiny.llama(seed=2)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_forward_is_the_one_patched_by_definition(family: Family) -> None:
    """Every family, every hook, a padded batch: the map of base activations, and of the model's own."""
    base, tuned = (family.build(family.attentions[0]) for _ in range(2))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.1)
    prompts = tiny.prompts(5, 9, 7)
    batch = padded(prompts)
    # Some models take positions from the mask only when they are told.
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    accepts = inspect.signature(type(tuned).forward).parameters
    batch = {name: x for name, x in batch.items() if name != "position_ids" or "position_ids" in accepts}
    for hook in Hook:
        site = Site(2, hook)
        the_map = a_map(tuned.config.get_text_config().hidden_size)
        for source in (base, None):
            with torch.no_grad(), attached(the_map, tuned, site, source=source):
                found = tuned(**batch).logits[:, -1]
            for row, ids in enumerate(prompts.ids):
                read = base if source is base else tuned
                x = own_activations(read, ids, family.module(read, site), at_input=is_input(site))[-1]
                wanted = tiny.patched_logits(
                    tuned, ids, len(ids) - 1, family.module(tuned, site), the_map(x), is_input=is_input(site)
                )
                torch.testing.assert_close(found[row], wanted, atol=3e-5, rtol=1e-4, msg=f"{site} {row}")


def test_a_forward_is_the_patch_engines(base: nn.Module, tuned: nn.Module) -> None:
    prompts = tiny.prompts(6, 6, 6)
    the_map = a_map(32, site=str(SITE))
    x = PatchEngine(base).capture(prompts, [SITE])[SITE]
    engine = PatchEngine(tuned, mode="naive")
    clean = tuned(**padded(prompts)).logits[:, -1].log_softmax(-1)
    score = engine.score(prompts, [VariantGroup(SITE, the_map(x)[:, None])])
    for source in (base, x):
        with torch.no_grad(), attached(the_map, tuned, source=source, tokens="decision"):
            patched = tuned(**padded(prompts)).logits[:, -1].log_softmax(-1)
        kl = (patched.exp() * (patched - clean)).sum(-1)
        torch.testing.assert_close(
            kl.double(), score.divergences[0].kl_patched_clean[:, 0], atol=1e-6, rtol=1e-4
        )


def generated_by_definition(
    tuned: nn.Module, base: nn.Module | None, ids: tuple[int, ...], the_map: AffineMap, *, only_first: bool
) -> tuple[list[int], Tensor]:
    """Greedy tokens and their logits, every step from scratch without cache, padding or batch."""
    n_prompt, all_logits = len(ids), []
    module = tuned.model.layers[2].self_attn
    replaced: dict[int, Tensor] = {}
    for _ in range(NEW):
        for position in range(n_prompt - 1, n_prompt if only_first else len(ids)):
            # The model's own activation at a position does not depend on later ones.
            read = tuned if base is None else base
            if position not in replaced:
                with patched_at(module, replaced, len(ids)) if base is None else nullcontext():
                    x = own_activations(read, ids, read.model.layers[2].self_attn, at_input=False)
                replaced[position] = the_map(x[position])
        with patched_at(module, replaced, len(ids)), torch.no_grad():
            logits = tuned(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        all_logits.append(logits)
        ids = (*ids, int(logits.argmax()))
    return list(ids[n_prompt:]), torch.stack(all_logits)


class patched_at:
    """A plain hook that puts vectors at positions of one prompt."""

    def __init__(self, module: nn.Module, vectors: dict[int, Tensor], length: int) -> None:
        self.module, self.vectors = module, vectors

    def __enter__(self) -> None:
        def replace(_: nn.Module, args: Any, out: Any) -> Any:
            hidden = out[0].clone()
            for position, vector in self.vectors.items():
                hidden[:, position] = vector
            return (hidden, *out[1:])

        self.handle = self.module.register_forward_hook(replace)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("tokens", ["new", "decision"])
@pytest.mark.parametrize("has_source", [True, False])
def test_generate_is_patching_step_by_step(
    base: nn.Module, tuned: nn.Module, use_cache: bool, tokens: str, has_source: bool
) -> None:
    prompts = tiny.prompts(5, 9, 7)
    the_map = a_map(32, site=str(SITE))
    source = base if has_source else None
    with attached(the_map, tuned, tokens=tokens, source=source) as model:
        out = model.generate(
            **padded(prompts),
            max_new_tokens=NEW,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=PAD,
            eos_token_id=None,
        )
    for row, ids in enumerate(prompts.ids):
        wanted, logits = generated_by_definition(tuned, source, ids, the_map, only_first=tokens == "decision")
        assert out.sequences[row, -NEW:].tolist() == wanted
        found = torch.stack([step[row] for step in out.logits])
        torch.testing.assert_close(found, logits, atol=3e-5, rtol=1e-4)


def test_the_first_generated_token_is_the_patched_distributions_mode(
    base: nn.Module, tuned: nn.Module
) -> None:
    prompts = tiny.prompts(5, 9, 7, 12)
    the_map = a_map(32, site=str(SITE))
    x = PatchEngine(base).capture(prompts, [SITE])[SITE]
    module = tuned.model.layers[2].self_attn
    wanted = [
        int(tiny.patched_logits(tuned, ids, len(ids) - 1, module, the_map(row)).argmax())
        for ids, row in zip(prompts.ids, x, strict=True)
    ]
    for source, tokens in ((base, "new"), (base, "decision"), (x, "decision")):
        with attached(the_map, tuned, source=source, tokens=tokens):
            out = tuned.generate(**padded(prompts), max_new_tokens=1, do_sample=False, pad_token_id=PAD)
        assert out[:, -1].tolist() == wanted


@pytest.mark.parametrize("has_source", [True, False])
@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_need_no_cache_to_agree(
    base: nn.Module, tuned: nn.Module, has_source: bool, how: dict[str, int]
) -> None:
    with attached(a_map(32, site=str(SITE)), tuned, source=base if has_source else None):
        found = [
            tuned.generate(
                **padded(tiny.prompts(5, 9)), max_new_tokens=6, do_sample=False, pad_token_id=PAD, **how,
                use_cache=use_cache, eos_token_id=None,
            ).tolist()
            for use_cache in (True, False)
        ]  # fmt: skip
    assert found[0] == found[1]


def test_a_loop_of_ones_own_with_a_cache(base: nn.Module, tuned: nn.Module) -> None:
    ids = tiny.prompts(7).ids[0]
    the_map = a_map(32, site=str(SITE))
    wanted, _ = generated_by_definition(tuned, base, ids, the_map, only_first=False)
    found: list[int] = []
    with torch.no_grad(), attached(the_map, tuned, source=base):
        out = tuned(torch.tensor([ids]))
        for _ in range(NEW):
            found.append(int(out.logits[0, -1].argmax()))
            out = tuned(torch.tensor([found[-1:]]), past_key_values=out.past_key_values)
    assert found == wanted
    assert "reorder_cache" not in vars(out.past_key_values), "the cache is the model's own again"


def test_prompts_padded_on_the_right_have_their_decision_token_patched(
    base: nn.Module, tuned: nn.Module
) -> None:
    prompts = tiny.prompts(5, 9)
    the_map = a_map(32, site=str(SITE))
    batch = padded(prompts, "right")
    with torch.no_grad(), attached(the_map, tuned, source=base):
        found = tuned(**batch).logits
    for row, ids in enumerate(prompts.ids):
        x = own_activations(base, ids, base.model.layers[2].self_attn, at_input=False)[-1]
        wanted = tiny.patched_logits(tuned, ids, len(ids) - 1, tuned.model.layers[2].self_attn, the_map(x))
        torch.testing.assert_close(found[row, len(ids) - 1], wanted, atol=3e-5, rtol=1e-4)


def test_all_tokens_are_those_of_the_prompt_too(tuned: nn.Module) -> None:
    batch = padded(tiny.prompts(6))
    the_map = a_map(32, site=str(SITE))
    seen = []
    with torch.no_grad(), attached(the_map, tuned, tokens="all"):
        handle = tuned.model.layers[2].self_attn.o_proj.register_forward_hook(lambda *a: seen.append(a[2]))
        after = tuned.model.layers[2].self_attn.register_forward_hook(lambda *a: seen.append(a[2][0]))
        tuned(**batch)
        handle.remove()
        after.remove()
    torch.testing.assert_close(seen[1], the_map(seen[0]))


def test_alpha_replaces_the_maps_own(base: nn.Module, tuned: nn.Module) -> None:
    batch, the_map = padded(tiny.prompts(6)), a_map(32, site=str(SITE))
    with torch.no_grad():
        with attached(the_map, tuned, alpha=0.25):
            one = tuned(**batch).logits
        with attached(the_map.with_alpha(0.25), tuned):
            assert torch.equal(tuned(**batch).logits, one)


def test_attached_maps_nest_and_the_later_sees_what_the_earlier_left(tuned: nn.Module) -> None:
    batch = padded(tiny.prompts(6))
    one, two = a_map(32, 1), a_map(32, 2)
    x = own_activations(tuned, tiny.prompts(6).ids[0], tuned.model.layers[2].self_attn, at_input=False)[-1]
    with torch.no_grad(), attached(one, tuned, SITE), attached(two, tuned, SITE):
        found = tuned(**batch).logits[0, -1]
    wanted = tiny.patched_logits(
        tuned, tiny.prompts(6).ids[0], 5, tuned.model.layers[2].self_attn, two(one(x))
    )
    torch.testing.assert_close(found, wanted, atol=3e-5, rtol=1e-4)
    other = Site(1, Hook.MLP_OUT)
    with torch.no_grad(), attached(one, tuned, SITE), attached(two, tuned, other):
        both = tuned(**batch).logits
    with torch.no_grad(), attached(two, tuned, other), attached(one, tuned, SITE):
        assert torch.equal(tuned(**batch).logits, both)


def test_nothing_is_left_behind_by_an_exception(base: nn.Module, tuned: nn.Module) -> None:
    batch = padded(tiny.prompts(6))
    before = tuned(**batch).logits

    def hooks(model: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    the_map, other = a_map(32), Site(1, Hook.MLP_OUT)

    def work() -> None:
        with attached(the_map, tuned, SITE, source=base), attached(the_map, tuned, other):
            tuned.generate(**batch, max_new_tokens=2, pad_token_id=PAD)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert hooks(tuned) == hooks(base) == 0
    assert "generate" not in vars(tuned)
    assert torch.equal(tuned(**batch).logits, before)


def test_a_forward_that_fails_leaves_the_next_one_right(base: nn.Module, tuned: nn.Module) -> None:
    batch, the_map = padded(tiny.prompts(6)), a_map(32)
    with torch.no_grad(), attached(the_map, tuned, SITE, source=base):
        wanted = tuned(**batch).logits
        with pytest.raises(MechdiffError, match="Token 200 does not exist in the source"):
            tuned(input_ids=torch.tensor([[200]]))
        with pytest.raises(MechdiffError, match="ends with padding"):
            tuned.generate(**padded(tiny.prompts(3, 5), "right"), max_new_tokens=1)
        assert torch.equal(tuned(**batch).logits, wanted)


def test_one_peft_model_can_be_both_sides(base: nn.Module) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    both = peft.get_peft_model(tiny.llama(seed=1), config).eval()
    apart = peft.get_peft_model(tiny.llama(seed=1), config).eval()
    apart.load_state_dict(both.state_dict())
    batch, the_map = padded(tiny.prompts(5, 9)), a_map(32, site=str(SITE))
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD}
    with attached(the_map, both, source=both, source_context=both.disable_adapter):
        found = both.generate(**batch, **options)
    with attached(the_map, apart, source=base):
        assert torch.equal(apart.generate(**batch, **options), found)
    assert not torch.equal(both.generate(**batch, **options), found)
    with (
        pytest.raises(MechdiffError, match="source is the model itself"),
        attached(the_map, both, source=both),
    ):
        pass


def test_gradients_pass_through_the_map(tuned: nn.Module) -> None:
    batch = padded(tiny.prompts(6))
    weight = tuned.model.layers[2].self_attn.o_proj.weight
    with attached(a_map(32), tuned, SITE):
        tuned(**batch).logits[0, -1].logsumexp(-1).backward()
    assert weight.grad is not None
    assert weight.grad.norm() > 0
    tuned.zero_grad()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": None}, "does not say at which site"),
        ({"site": "L9/attn_out"}, "Layer 9 does not exist"),
        ({"site": "nowhere"}, "not of the form"),
        ({"tokens": "some"}, "'some' is unknown; use one of new, decision, all"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"source": torch.zeros(2, 32)}, 'tokens="decision"'),
        ({"source": torch.zeros(2, 8), "tokens": "decision"}, "8-wide activations come in"),
    ],
)
def test_what_cannot_be_attached_is_refused(tuned: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MechdiffError, match=message), attached(a_map(32), tuned, **{"site": SITE, **options}):
        pass


def test_calls_that_cannot_be_placed_are_refused(base: nn.Module, tuned: nn.Module) -> None:
    ids = torch.tensor(tiny.prompts(6).ids)
    with torch.no_grad():
        cache = tuned(ids).past_key_values
        with attached(a_map(32), tuned, SITE, source=base):
            with pytest.raises(MechdiffError, match="holds 6 tokens that the source model has not seen"):
                tuned(ids[:, :1], past_key_values=cache)
            with pytest.raises(MechdiffError, match="needs token ids"):
                tuned(inputs_embeds=tuned.get_input_embeddings()(ids))
            with pytest.raises(MechdiffError, match="A part of a model"):
                tuned.model(ids)
        rows = attached(a_map(32), tuned, SITE, source=torch.zeros(4, 32), tokens="decision")
        with rows, pytest.raises(MechdiffError, match="4 activations were given"):
            tuned(ids)
        with attached(a_map(32), tuned, SITE), pytest.raises(MechdiffError, match="another kind"):
            tuned(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))


def generated(model: Any, prompts: TokenizedPrompts, **how: Any) -> list[list[int]]:
    never = tiny.VOCABULARY  # transformers 4 needs an id to look for
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": never}
    return model.generate(**padded(prompts), **options, **how)[:, -6:].tolist()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_generate_needs_neither_cache_nor_batch_to_agree(family: Family) -> None:
    """Sliding windows, ALiBi and learnt positions: the source's cache goes along with the model's."""
    base, tuned = (family.build("eager") for _ in range(2))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.mul_(1.1)
    prompts = tiny.prompts(5, 9, 7)
    with attached(a_map(tuned.config.get_text_config().hidden_size), tuned, SITE, source=base):
        together = generated(tuned, prompts)
        assert generated(tuned, prompts, use_cache=False) == together
        assert [generated(tuned, prompts[i : i + 1])[0] for i in range(3)] == together


@pytest.mark.parametrize("has_source", [True, False])
def test_other_ways_to_generate(base: nn.Module, tuned: nn.Module, has_source: bool) -> None:
    """Candidates that are taken back, and a prompt in pieces."""
    prompts = tiny.prompts(9)
    with attached(a_map(32), tuned, SITE, source=base if has_source else None):
        plain = generated(tuned, prompts)
        assert generated(tuned, prompts, prompt_lookup_num_tokens=3) == plain
        assert generated(tuned, prompts, assistant_model=base) == plain
        if int(transformers.__version__.split(".")[0]) < 5:
            return  # which calls forward past its hooks here; an attached map refuses that
        assert generated(tuned, prompts, prefill_chunk_size=4) == plain
        if has_source:
            with pytest.raises(MechdiffError, match="no static cache"):
                generated(tuned, prompts, cache_implementation="static")
        else:
            assert generated(tuned, prompts, cache_implementation="static") == plain
