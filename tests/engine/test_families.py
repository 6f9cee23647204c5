import warnings
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from families import CASES, FAMILIES, N_LAYERS, Family
from torch import Tensor

from mechdiff_mlflow.engine import PatchEngine, VariantGroup
from mechdiff_mlflow.engine.model.chunks import in_chunks
from mechdiff_mlflow.engine.paths.startup_check import ONE
from mechdiff_mlflow.engine.paths.variants import ScoreBoard
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import TokenizedPrompts

SITES = [
    Site(0, Hook.RESID_PRE),
    *(Site(1, hook) for hook in Hook),
    Site(2, Hook.ATTN_OUT),  # another kind of attention than block 1 where there are two
    Site(N_LAYERS - 1, Hook.MLP_OUT),
]


COPIES = 20


def engine_logits(engine: PatchEngine, prompts: TokenizedPrompts, groups: list[VariantGroup]) -> Tensor:
    """Patched logits [N, variants, vocabulary] from which the engine scores."""
    n_variants = sum(group.count() for group in groups)
    path, found = engine._paths[ONE], None
    for chunk in in_chunks(prompts, engine.limits.batch_size, engine.forward.device):
        recording = path.record(chunk, [group.site for group in groups])
        variants, _ = ScoreBoard(groups, prompts).variants(recording)
        for rows in path.run(recording, variants, engine.limits):
            if found is None:
                shape = (len(prompts), n_variants, rows.logits.shape[-1])
                found = torch.full(shape, torch.nan, dtype=rows.logits.dtype)
            found[chunk.index[rows.owner], rows.column] = rows.logits
    assert found is not None
    return found


def worst_logit_error(family: Family, attention: str, dtype: torch.dtype, from_end: int) -> float:
    """Of patched logits, relative to the largest logit."""
    model = family.build(attention, dtype)
    # Longer than the windows; one chunk is padded and one is not.
    prompts = tiny.prompts(9, 12, 4, from_end=from_end)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PatchEngine(model, batch_size=2)
    assert engine.mode == family.mode
    captured = engine.capture(prompts, SITES)
    generator = torch.Generator().manual_seed(0)
    groups = [
        VariantGroup(s, (x + x.std() * torch.randn(x.shape, generator=generator).to(dtype)).unsqueeze(1))
        for s, x in captured.items()
    ]
    # Where many rows are alive the engine treats those that enter differently.
    many = VariantGroup(groups[0].site, groups[0].replacements.repeat(1, COPIES, 1))
    found = engine_logits(engine, prompts, [many, *groups[1:]])
    worst = 0.0
    for i, group in enumerate(groups):
        columns = found[:, :COPIES] if i == 0 else found[:, COPIES + i - 1, None]
        module = family.module(model, group.site)
        expected = tiny.patched_by_definition(model, prompts, module, group)
        worst = max(worst, float((columns - expected).abs().max() / expected.abs().max()))
    return worst


@pytest.mark.parametrize("from_end", [1, 3])
@pytest.mark.parametrize(("family", "attention"), CASES, ids=lambda x: getattr(x, "name", x))
def test_float32_logits_are_those_of_one_hook_per_variant(
    family: Family, attention: str, from_end: int
) -> None:
    assert worst_logit_error(family, attention, torch.float32, from_end) < 5e-6


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.layer_norm and "sdpa" in f.attentions], ids=lambda f: f.name
)
def test_float64_logits_are_exact_where_nothing_is_computed_in_less(family: Family) -> None:
    assert worst_logit_error(family, "sdpa", torch.float64, from_end=1) < 1e-12


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_sublayers_add_up_to_the_residual_stream(family: Family) -> None:
    model, prompts = family.build(family.attentions[-1]), tiny.prompts(8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PatchEngine(model)
    x = engine.capture(prompts, [Site(2, hook) for hook in Hook])
    before, attn, mlp, after = (x[Site(2, hook)] for hook in Hook)
    scale = model.config.residual_multiplier if family.scaled else 1.0
    torch.testing.assert_close(before + scale * (attn + mlp), after, rtol=1e-4, atol=1e-5)


def test_the_table_in_the_docs_is_this_one() -> None:
    page = Path(__file__).parents[2] / "docs" / "supported-models.md"
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in rows]
    expected = [[f.name, f.mode, ", ".join(f.attentions), f.attn_out, f.mlp_out, f.note] for f in FAMILIES]
    if transformers.__version__.startswith("4."):  # Mixtral's MLP has another name there
        cells, expected = ([row[:4] + row[5:] for row in table] for table in (cells, expected))
    assert cells == expected, "run python scripts/supported_models.py"
