import pytest
import tiny
from torch import nn

from mechdiff_mlflow.engine import ModuleNames, PatchEngine
from mechdiff_mlflow.engine.model.architecture import Decoder
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.sites import Hook, Site


class Odd(nn.Module):
    """A decoder whose names nobody has seen before."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for layer in model.model.layers:
            layer.mixer, layer.transition = layer.self_attn, layer.mlp
            del layer.self_attn, layer.mlp
        self.config, self.stack = model.config, model.model.layers


def test_llama_is_found() -> None:
    model = tiny.llama()
    decoder = Decoder.of(model)
    assert [block.module for block in decoder.blocks] == list(model.model.layers)
    assert decoder.module(Site(2, Hook.ATTN_OUT)) is model.model.layers[2].self_attn
    assert decoder.module(Site(2, Hook.MLP_OUT)) is model.model.layers[2].mlp
    assert decoder.module(Site(2, Hook.RESID_PRE)) is model.model.layers[2]
    assert decoder.width == 32


def test_unknown_models_name_the_override_and_what_there_is() -> None:
    odd = Odd(tiny.llama())
    assert Decoder.of(odd).blocks[3].module is odd.stack[3], "the only list of that length"
    with pytest.raises(MechdiffError, match=r"L0/attn_out .* hook resid_pre or resid_post, or set modules"):
        Decoder.of(odd).check(Site(0, Hook.ATTN_OUT))
    odd.stack.pop(3)
    with pytest.raises(
        MechdiffError, match=r"none of stack \(3\) fits; set modules\.layers in the pair's spec"
    ):
        Decoder.of(odd)


def test_overrides_find_what_names_do_not() -> None:
    odd = Odd(tiny.llama())
    decoder = Decoder.of(odd, ModuleNames(layers="stack", attention="mixer", mlp="transition"))
    assert decoder.module(Site(1, Hook.ATTN_OUT)) is odd.stack[1].mixer
    assert decoder.module(Site(1, Hook.MLP_OUT)) is odd.stack[1].transition
    by_attention = Decoder.of(odd, ModuleNames(attention="mixer"))
    assert by_attention.blocks[3].module is odd.stack[3]
    with pytest.raises(
        MechdiffError, match=r"L0/mlp_out was not found .*set modules\.mlp in the pair's spec"
    ):
        by_attention.check(Site(0, Hook.MLP_OUT))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ModuleNames(layers="stack.0"),
            r"modules\.layers is 'stack\.0', which is no list .* lists are stack \(4\)",
        ),
        (ModuleNames(layers="nowhere"), r"modules\.layers is 'nowhere'"),
        (
            ModuleNames(layers="stack", attention="attn2"),
            r"modules\.attention is 'attn2'.*modules are .*mixer",
        ),
        (ModuleNames(layers="stack", mlp="mlp2"), r"modules\.mlp is 'mlp2'"),
        (
            ModuleNames(layers="stack", attn_out="mixer.oproj"),
            r"modules\.attn_out is 'mixer\.oproj'.*mixer\.o_proj",
        ),
        (ModuleNames(layers="stack", mlp_out="x"), r"modules\.mlp_out is 'x'"),
    ],
)
def test_overrides_that_do_not_exist_say_what_does(names: ModuleNames, message: str) -> None:
    with pytest.raises(MechdiffError, match=message):
        Decoder.of(Odd(tiny.llama()), names)


def test_of_two_candidate_lists_the_one_beside_the_embeddings_is_meant() -> None:
    model = tiny.llama()
    model.vision = nn.ModuleList(list(tiny.llama(seed=1).model.layers))
    assert Decoder.of(model).layers is model.model.layers
    assert Decoder.of(model, ModuleNames(layers="vision")).blocks[0].module is model.vision[0]
    model.model.vision = model.vision
    del model.vision
    with pytest.raises(
        MechdiffError, match=r"several could be \(model\.layers, model\.vision\); set modules\.layers"
    ):
        Decoder.of(model)


def test_layers_beyond_the_last_are_refused() -> None:
    with pytest.raises(MechdiffError, match=r"Layer 99 does not exist: the model has 4 layers, 0 to 3\."):
        Decoder.of(tiny.llama()).check(Site(99, Hook.RESID_POST))


def test_models_of_other_libraries_are_refused() -> None:
    with pytest.raises(
        MechdiffError, match="Linear is not a transformers causal language model; load it with"
    ):
        Decoder.of(nn.Linear(2, 2))


def test_a_site_the_model_does_not_compute_with_is_refused() -> None:
    model = tiny.llama()
    for layer in model.model.layers:
        layer.spare = nn.Linear(32, 32)
    with pytest.raises(MechdiffError, match=r"L2/mlp_out was not reached .*set modules\.mlp_out"):
        PatchEngine(model, overrides=ModuleNames(mlp_out="spare"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_whose_output_is_dropped_is_refused() -> None:
    model = tiny.llama()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, out: (out, module.spare(out))[0])
        layer.mlp.spare = nn.Linear(32, 32)
    with pytest.raises(
        MechdiffError, match=r"Replacing .* L2/mlp_out leaves the logits .* set modules\.mlp_out"
    ):
        PatchEngine(model, overrides=ModuleNames(mlp_out="mlp.spare"))
