"""The model of a 70B sweep: counts by hand, and runs it did not see."""

from pathlib import Path

from benchmarks import scale
from benchmarks.gpu import Shape
from mechdiff_mlflow.spec.sites import Hook, Site

ROOT = Path(__file__).parents[1]
SMALL = Shape(layers=2, width=8, mlp_width=16, heads=2, key_heads=1, vocabulary=10)


def test_counts_of_a_small_model_are_those_of_a_hand_calculation() -> None:
    # A block has 8·4·(2·2 + 2·1) + 3·8·16 = 576 weights and passes on 10·8 + 4·16 = 144 numbers a token.
    clean = scale.clean_work(SMALL, 3, 5)
    assert clean == scale.Work(2 * 3 * (5 * 2 * 576 + 80), 3 * 5 * 2 * 144, 3 * 10, 0)
    # attn_out of block 0: the MLP of its own block (half of it), the block above, a row of logits.
    patched = scale.patch_work(SMALL, 3, [(Site(0, Hook.ATTN_OUT), 4)], chunk=2)
    assert patched == scale.Work(12 * 2 * (576 + 384 + 80), 12 * 1.5 * 144, 12 * 10, 2)
    flops = {hook: scale.patch_work(SMALL, 1, [(Site(1, hook), 1)]).flops for hook in Hook}
    assert flops[Hook.RESID_PRE] == 2 * (576 + 80)
    assert flops[Hook.RESID_POST] == flops[Hook.MLP_OUT] == 2 * 80


def test_runs_that_it_was_not_fitted_to_are_predicted_within_a_tenth() -> None:
    errors = [float(str(row[-1]).split()[0]) for row in scale.validation()]
    assert len(errors) == 16
    assert max(map(abs, errors)) <= 10.0


def test_the_page_shows_the_tables_that_are_made_today() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    result = (ROOT / "benchmarks" / "results" / "scale.md").read_text(encoding="utf-8")
    rows = [*scale.validation(), *scale.sweep(2000), *scale.sweep(8000)]
    for line in scale.table(("", ""), rows).splitlines()[2:]:
        assert line in result, "run python -m benchmarks.scale again"
        assert line in page
