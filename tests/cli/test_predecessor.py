"""The mistakes of the hand-run predecessor, one test each: none of them can be made here.

Where a number is compared, the reference is `scripts.demo_pairs.measure`: one hook, one plain forward, and
no padding.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import toy as toys
from cli.conftest import Invoke
from cli.test_run import runs_of

from mechdiff_mlflow import load_map
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.rows import capture
from mechdiff_mlflow.measures.stats import drop_pct
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Position, Rank
from mechdiff_mlflow.spec.sites import Hook, Site
from scripts.chat_tokens import encode
from scripts.demo_pairs import measure

SITE = Site(3, Hook.RESID_POST)


@pytest.fixture
def pair(toy: Path) -> Pair:
    return loaded(toy)


def loaded(spec: Path, dtype: str | None = None) -> Pair:
    return load_pair(PairSpec.load(str(spec)), dtype=dtype, options=EngineOptions(batch_size=7))


def edited(toy: Path, folder: Path, edit: Callable[[Path], object]) -> Path:
    """A copy of the toy pair, changed; its spec."""
    shutil.copytree(toy.parent, folder / "pair")
    edit(folder / "pair")
    return folder / "pair" / "toy.yaml"


def cell(site: Site = SITE, *, k: int | None = None, alpha: str = "1", family: str = "update") -> Cell:
    return Cell(site, "procrustes_scaled", family, Rank(k), Alpha.parse(alpha))


def ids(pair: Pair, role: str) -> list[list[int]]:
    side = pair.side(role)
    return encode(side.tokenizer, [p.text for p in pair.prompts["test"].prompts])


def kl_by_hand(pair: Pair, site: Site, values: torch.Tensor) -> np.ndarray:
    prompts = ids(pair, "tuned")
    clean = measure.next_token_logits(pair.tuned.model, prompts)
    return measure.kl_patched_clean_nats(pair.tuned.model, prompts, site, values, clean).numpy()


def base_by_hand(pair: Pair, site: Site) -> torch.Tensor:
    return measure.activations(pair.base.model, ids(pair, "base"), [site])[0][site]


def test_the_rank_flag_is_not_ignored(pair: Pair) -> None:
    for family in ("update", "content"):
        study = Study(pair, Protocol())
        fits = study.fit([cell(k=k, family=family) for k in (1, 2, 5)])
        assert [fit.map.weight_rank(family) for fit in fits] == [1, 2, 5]
        assert len({record.kl_mapped for record in study.patch([fit.to_patch for fit in fits])}) == 3


@pytest.mark.parametrize("hook", Hook)
def test_raw_is_the_base_activation_as_it_is_and_not_moment_matched(pair: Pair, hook: Hook) -> None:
    site = Site(3, hook)
    (record,) = Study(pair, Protocol()).patch([f.to_patch for f in Study(pair, Protocol()).fit([cell(site)])])
    expected = kl_by_hand(pair, site, base_by_hand(pair, site))
    np.testing.assert_allclose(record.per_prompt["KL_raw"], expected, rtol=1e-3, atol=1e-6)
    assert abs(record.controls["moment_matched"] / expected.mean() - 1) > 1e-3


def test_alpha_is_applied_once_at_attn_out(pair: Pair) -> None:
    site, study = Site(3, Hook.ATTN_OUT), Study(pair, Protocol())
    (fit,) = study.fit([cell(site, alpha="0.3")])
    (record,) = study.patch([fit.to_patch])
    once = 0.3 * fit.map.with_alpha(1.0)(base_by_hand(pair, site).double()).float()
    expected = kl_by_hand(pair, site, once)
    np.testing.assert_allclose(record.per_prompt["KL_mapped"], expected, rtol=1e-3, atol=1e-6)
    assert abs(kl_by_hand(pair, site, 0.3 * once).mean() / expected.mean() - 1) > 1e-2


@pytest.mark.parametrize("hook", [Hook.MLP_OUT, Hook.ATTN_OUT])
def test_a_sublayers_output_is_not_put_into_the_block_output(pair: Pair, hook: Hook) -> None:
    site, study = Site(2, hook), Study(pair, Protocol())
    (record,) = study.patch([f.to_patch for f in study.fit([cell(site)])])
    values = record.map(base_by_hand(pair, site).double()).float()
    expected = kl_by_hand(pair, site, values)
    np.testing.assert_allclose(record.per_prompt["KL_mapped"], expected, rtol=1e-3, atol=1e-6)
    wrong = kl_by_hand(pair, Site(2, Hook.RESID_POST), values)
    assert abs(wrong.mean() - expected.mean()) > 0.1 * expected.mean()


def test_n_is_what_was_asked_and_not_capped_at_150(toy: Path, tmp_path: Path) -> None:
    pair = loaded(edited(toy, tmp_path, lambda folder: toys.write_prompts(folder, n_test=170)))
    for n in (160, None):
        study = Study(pair, Protocol(n=n))
        (record,) = study.patch([f.to_patch for f in study.fit([cell()])])
        assert record.n == len(record.per_prompt) == (n or 170)
    with pytest.raises(MechdiffError, match="171 test prompts were asked for and there are 170"):
        Study(pair, Protocol(n=171)).patch([f.to_patch for f in Study(pair, Protocol()).fit([cell()])])


def test_fit_and_patch_share_a_dtype(toy: Path, pair: Pair) -> None:
    half = loaded(toy, "bfloat16")
    for role in ("base", "tuned"):
        rows = capture(half, role, half.prompts["train"], Position.DECISION, [SITE])[SITE]
        assert rows.dtype is torch.bfloat16
    (fit,) = Study(half, Protocol()).fit([cell()])
    assert fit.map.meta["dtype"] == "bfloat16"
    assert fit.map.meta["fingerprint"] == half.fingerprint != pair.fingerprint, "the other dtype is refused"


def test_the_base_is_read_at_its_own_position(toy: Path, tmp_path: Path) -> None:
    """The tuned model's template is longer, so its decision token has another index."""

    def lengthen(folder: Path) -> None:
        template = toys.TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}<user> well well <end>")
        (folder / "tuned" / "chat_template.jinja").write_text(template)

    pair = loaded(edited(toy, tmp_path, lengthen))
    assert len(ids(pair, "tuned")[0]) == len(ids(pair, "base")[0]) + 4
    found = capture(pair, "base", pair.prompts["test"], Position.DECISION, [SITE])[SITE]
    torch.testing.assert_close(found, base_by_hand(pair, SITE), rtol=1e-4, atol=1e-5)


def test_positions_are_right_in_padded_batches(pair: Pair) -> None:
    assert len({len(prompt) for prompt in ids(pair, "base")}) > 1, "batches are padded"
    found = capture(pair, "base", pair.prompts["test"], Position.DECISION, [SITE])[SITE]
    torch.testing.assert_close(found, base_by_hand(pair, SITE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no') }}", "fails on"),
        (toys.TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"), "two BOS tokens"),
    ],
    ids=["a failing template", "a doubled BOS"],
)
def test_stops_the_run(toy: Path, tmp_path: Path, template: str, says: str) -> None:
    spec = edited(toy, tmp_path, lambda f: (f / "tuned" / "chat_template.jinja").write_text(template))
    with pytest.raises(MechdiffError, match=says):
        loaded(spec)


def test_special_tokens_that_differ_under_one_tokenizer_stop_the_run(toy: Path, tmp_path: Path) -> None:
    """Vocabulary and template agree, and the two models would read different text."""

    def other_bos(folder: Path) -> None:
        path = folder / "tuned" / "tokenizer_config.json"
        path.write_text(path.read_text().replace('"bos_token": "<s>"', '"bos_token": "<end>"'))

    pair = loaded(edited(toy, tmp_path, other_bos))
    assert pair.tokenizers_agree
    with pytest.raises(MechdiffError, match="base and tuned see different tokens"):
        Study(pair, Protocol()).fit([cell()])


def test_a_map_is_found_by_its_name_and_not_as_the_last_file(
    toy: Path, mechdiff: Invoke, client: mlflow.MlflowClient
) -> None:
    """And its name says the hook, so that runs do not overwrite each other."""
    for hook, alpha in (("resid_post", "0.9"), ("attn_out", "0.5"), ("resid_post", "0.1")):
        mechdiff(
            *(
                "run",
                "--pair",
                str(toy),
                "--layer",
                "3",
                "--hook",
                hook,
                "--alpha",
                alpha,
                "--promote",
                "--force",
            )
        )
    assert load_map("toy-L3-resid_post@champion").alpha == 0.1
    assert load_map("toy-L3-attn_out@champion").alpha == 0.5
    (first,) = (run for run in runs_of(client)["fit"] if run.data.params["alpha"] == "0.9")
    mechdiff("promote", first.info.run_id, "--force")
    assert load_map("toy-L3-resid_post@champion").alpha == 0.9


def test_a_truncated_rotation_has_its_own_scale(pair: Pair) -> None:
    """s_k is the least-squares scale of Q_k: what is left of Yw is orthogonal to s_k·Xw·Q_k."""
    study = Study(pair, Protocol())
    x, y = (
        capture(pair, role, study.train_prompts, Position.DECISION, [SITE])[SITE].double()
        for role in ("base", "tuned")
    )
    whitened, back = [], []
    for rows in (x, y):
        centred = rows - rows.mean(0)
        cov = torch.cov(rows.mT)
        shrunk = 0.95 * cov + 0.05 * cov.trace() / len(cov) * torch.eye(len(cov), dtype=torch.float64)
        values, axes = torch.linalg.eigh(shrunk)
        whitened.append(centred @ axes @ (values.rsqrt()[:, None] * axes.mT))
        back.append((axes * values.sqrt()) @ axes.mT)
    for fit in study.fit([cell(k=k, family="content") for k in (1, 3, 8)]):
        scaled_rotation = back[0] @ fit.map.dense() @ torch.linalg.inv(back[1])
        mapped = whitened[0] @ scaled_rotation
        left = whitened[1] - mapped
        assert abs(float((mapped * left).sum())) < 1e-8 * float((mapped * mapped).sum())


def test_nothing_is_chosen_on_the_reported_split(toy: Path, tmp_path: Path, pair: Pair) -> None:
    def other_questions(folder: Path) -> None:
        lines = (folder / "test.jsonl").read_text().splitlines()
        (folder / "test.jsonl").write_text("\n".join(lines[:5]))

    other = loaded(edited(toy, tmp_path, other_questions))
    chosen = []
    for each in (pair, other):
        study = Study(each, Protocol(n_train=10))
        (fit,) = study.fit([cell(alpha="auto")])
        (record,) = study.patch([fit.to_patch])
        assert fit.chosen == ("alpha", "off_span")
        chosen.append((fit.map.alpha, fit.off_span, fit.map.dense(), record.null))
        assert record.leak == ()
    (alpha, rule, weight, null), (alpha_2, rule_2, weight_2, null_2) = chosen
    assert (alpha, rule, null) == (alpha_2, rule_2, null_2)
    assert torch.equal(weight, weight_2)


def test_no_drop_of_a_raw_kl_in_the_noise() -> None:
    raw, mapped = np.full(20, 0.002), np.full(20, 0.001)
    assert drop_pct(raw, mapped, noise_floor=3e-4).estimate is None
    assert drop_pct(raw, mapped, noise_floor=1e-5).estimate == pytest.approx(50.0)
