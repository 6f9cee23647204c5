"""The protocol end to end on the toy pair: what is recorded, chosen, permuted and tested."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats as scipy_stats

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import PatchRecord, Protocol, Study
from mechdiff_mlflow.experiments.atlas import AtlasRecord, atlas
from mechdiff_mlflow.experiments.fitting import SHUFFLED
from mechdiff_mlflow.experiments.profiles import heads_of, layer_profile
from mechdiff_mlflow.experiments.rows import capture
from mechdiff_mlflow.experiments.workers import LocalWorkers
from mechdiff_mlflow.maps.affine import identity_map
from mechdiff_mlflow.measures import similarity, stats
from mechdiff_mlflow.models.pairs import EngineOptions, Pair, load_pair
from mechdiff_mlflow.spec.pair_spec import ALPHA_GRID, Alpha, Cell, PairSpec, Position, Rank
from mechdiff_mlflow.spec.sites import Hook, Site

SITE = Site(3, Hook.RESID_POST)
N_TRAIN, N_VAL, N_TEST = 40, 16, 40


@pytest.fixture
def pair(toy: Path) -> Pair:
    return load_pair(PairSpec.load(str(toy)))


def cell(
    *, site: Site = SITE, solver: str = "procrustes_scaled", k: int | None = None, alpha: str = "1"
) -> Cell:
    return Cell(site, solver, "update", Rank(k), Alpha.parse(alpha))


def patched(study: Study, *cells: Cell) -> list[PatchRecord]:
    return study.patch([fit.to_patch for fit in study.fit(cells)])


def forwards(pair: Pair) -> dict[str, int]:
    counts = {}
    for side in pair.sides:
        with side.engine() as engine:
            counts[side.role] = engine.n_forwards
    return counts


@pytest.mark.parametrize("permutations", [0, 3])
def test_a_run_records_each_model_once_a_split(pair: Pair, permutations: int) -> None:
    patched(Study(pair, Protocol(permutations=permutations)), cell(alpha="auto"))
    once = N_TRAIN + N_VAL + N_TEST
    assert forwards(pair) == {"base": once, "tuned": once}


def test_a_rank_sweep_records_each_model_once_a_split(pair: Pair) -> None:
    """RQ3: 2 sites × 4 ranks × 4 α."""
    cells = [
        cell(site=site, k=k, alpha=alpha)
        for site, k, alpha in itertools.product(
            (Site(2, Hook.ATTN_OUT), SITE), (1, 4, 8, None), ("0.3", "0.5", "0.7", "1")
        )
    ]
    records = patched(Study(pair, Protocol()), *cells)
    assert len({record.kl_mapped for record in records}) == len(cells) == 32
    once = N_TRAIN + N_VAL + N_TEST
    assert forwards(pair) == {"base": once, "tuned": once}


def test_reporting_val_records_it_once(pair: Pair) -> None:
    patched(Study(pair, Protocol(split="val")), cell(alpha="auto"))
    assert forwards(pair) == {"base": N_TRAIN + N_VAL, "tuned": N_TRAIN + N_VAL}


def test_statistics_are_those_of_the_per_prompt_table_and_the_activations(pair: Pair) -> None:
    study = Study(pair, Protocol())
    (record,) = patched(study, cell(k=3))
    table = record.per_prompt
    gain = (table["KL_raw"] - table["KL_mapped"]).to_numpy()
    found = record.cos_vs_kl
    assert found is not None
    assert found.pearson.estimate == pytest.approx(scipy_stats.pearsonr(table["cos"], gain)[0])
    assert found.spearman.estimate == pytest.approx(scipy_stats.spearmanr(table["cos"], gain)[0])
    assert found.pearson.low is not None
    assert found.pearson.low < found.pearson.estimate
    assert record.p_raw == stats.p_less_kl(table["KL_raw"], table["KL_mapped"])
    assert record.p_null == stats.p_less_kl(table[f"KL_{record.null}"], table["KL_mapped"])
    assert record.p_holm is None, "one test needs no correction"
    assert record.p_permutation is None
    x, y = (
        capture(pair, role, study.report_prompts, Position.DECISION, [SITE])[SITE].double()
        for role in ("base", "tuned")
    )
    assert record.cka == pytest.approx(similarity.debiased_cka(x, y))
    rest = ((y - record.map(x)) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert record.explained_variance == pytest.approx(1 - float(rest))


def test_patches_reported_together_are_corrected_together(pair: Pair) -> None:
    cells = [cell(k=1), cell(k=4), cell(site=Site(2, Hook.ATTN_OUT)), cell(site=Site(0, Hook.ATTN_OUT))]
    records = patched(Study(pair, Protocol()), *cells)
    assert [record.p_holm for record in records] == stats.holm([record.p_null for record in records])
    assert records[-1].p_raw is None, "nothing differs at layer 0, so nothing was tested there"
    for tested in records[:-1]:
        assert tested.p_holm is not None
        assert tested.p_null is not None
        assert tested.p_holm >= tested.p_null


@pytest.mark.parametrize("alpha_fit", ["after", "inside"])
def test_permutations_choose_as_the_map_does(pair: Pair, alpha_fit: str) -> None:
    """Against refits one by one: a study of its own for every shuffle, its rows shuffled beforehand."""
    times = 4
    protocol = Protocol(permutations=times, alpha_fit=alpha_fit, n_train=12)
    study = Study(pair, protocol)
    (record,) = patched(study, cell(alpha="0.5,1"))
    generator = torch.Generator().manual_seed(protocol.seed)
    means, per_prompt = [], []
    for _ in range(times):
        alone = Study(pair, Protocol(alpha_fit=alpha_fit, n_train=12))
        alone._fitter.record([cell()])
        order = torch.randperm(12, generator=generator)
        x, y = alone._fitter._train[SITE]
        alone._fitter._train[SITE] = x, {SITE: y[SITE][order]}
        (shuffled,) = patched(alone, cell(alpha="0.5,1"))
        means.append(shuffled.kl_mapped)
        per_prompt.append(shuffled.per_prompt["KL_mapped"])
    assert record.controls[SHUFFLED] == pytest.approx(np.mean(means), rel=1e-6)
    np.testing.assert_allclose(record.per_prompt["KL_shuffled"], np.mean(per_prompt, axis=0), rtol=1e-4)
    better = sum(mean <= record.kl_mapped for mean in means)
    assert record.p_permutation == (1 + better) / (times + 1)


def test_alpha_inside_a_fit_finds_the_scale_of_the_identity(pair: Pair) -> None:
    plain = patched(Study(pair, Protocol(alpha_fit="inside")), cell(solver="reduced_rank", k=16, alpha="0.5"))
    whole = patched(Study(pair, Protocol(alpha_fit="after")), cell(solver="ridge", alpha="1"))
    assert plain[0].map.mean_out.norm() == pytest.approx(2 * float(whole[0].map.mean_out.norm()), rel=1e-9)
    with pytest.raises(MechdiffError, match="α=0 cannot be taken inside a fit"):
        Study(pair, Protocol(alpha_fit="inside")).fit([cell(alpha="0,1")])
    study = Study(pair, Protocol(alpha_fit="inside"))
    study._fitter.record([cell()])
    scales = study._fitter.alphas(cell(alpha="auto"))
    assert set(ALPHA_GRID) <= set(scales)
    assert len(scales) <= len(ALPHA_GRID) + 1


def test_the_logit_subspace_is_the_top_of_the_unembedding(pair: Pair) -> None:
    protocol = Protocol(directions=3, ridge=0.1)
    (fit,) = Study(pair, protocol).fit([cell(solver="logit_subspace")])
    update = fit.map.weight.minus_identity().dense()
    assert int(torch.linalg.matrix_rank(update)) == 3
    head = pair.tuned.model.lm_head.weight.double()  # type: ignore[union-attr]
    top = torch.linalg.svd(head, full_matrices=False).Vh[:3]
    torch.testing.assert_close(update @ top.mT @ top, update, rtol=1e-6, atol=1e-9)
    (joint,) = Study(pair, Protocol(directions=3, unembedding="joint")).fit([cell(solver="logit_subspace")])
    assert joint.map.meta["unembedding"] == "joint"
    with pytest.raises(MechdiffError, match="q is 17"):
        Study(pair, Protocol(directions=17)).fit([cell(solver="logit_subspace")])


def test_every_output_metric_of_reduced_rank_can_be_asked_for(pair: Pair) -> None:
    found = {}
    for metric in ("identity", "tuned_covariance", "fisher"):
        (fit,) = Study(pair, Protocol(output_metric=metric)).fit([cell(solver="reduced_rank", k=2)])
        assert fit.map.meta["output_metric"] == metric
        found[metric] = fit.map.dense()
    for one, other in itertools.combinations(found.values(), 2):
        assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"split": "train"}, "cannot be reported"),
        ({"alpha_fit": "before"}, "use one of after, inside"),
        ({"unembedding": "base"}, "use one of tuned, joint"),
        ({"permutations": -1}, "give 0 to 100000"),
    ],
)
def test_bad_protocols(settings: dict[str, object], says: str) -> None:
    with pytest.raises(MechdiffError, match=says):
        Protocol(**settings)  # type: ignore[arg-type]


def test_the_mean_over_the_content_goes_through_the_whole_protocol(pair: Pair) -> None:
    (at_mean,) = patched(Study(pair, Protocol(position=Position.CONTENT_MEAN)), cell())
    (at_last,) = patched(Study(pair, Protocol(position=Position.DECISION)), cell())
    assert at_mean.map.meta["position"] == "content_mean"
    assert at_mean.noise_floor < 1e-10
    # What leaves the last block at other tokens is read by nobody.
    assert at_mean.kl_raw == pytest.approx(0, abs=1e-10)
    assert at_last.kl_raw is not None
    assert at_last.kl_raw > 0
    (below,) = patched(
        Study(pair, Protocol(position=Position.CONTENT_MEAN)), cell(site=Site(2, Hook.RESID_POST))
    )
    assert below.drop_pct is not None
    assert below.kl_raw is not None
    assert below.kl_raw > 0


def atlas_of(pair: Pair, best: int = 0, **protocol: Any) -> AtlasRecord:
    return atlas(
        Study(pair, Protocol(**protocol)),
        hooks=list(Hook),
        solver="ridge",
        family="update",
        alpha=1,
        best=best,
    )


@pytest.mark.parametrize("best", [0, 2])
@pytest.mark.parametrize("position", [Position.DECISION, Position.LAST_CONTENT, Position.CONTENT_MEAN])
def test_an_atlas_records_each_model_once_a_split(pair: Pair, position: Position, best: int) -> None:
    """Raw patches everywhere, then maps where they are worth it, then those on val: three scores of tuned."""
    found = atlas_of(pair, best, position=position)
    assert len(found.patches) >= 4
    assert len(found.best) == best
    once = N_TRAIN + N_VAL + N_TEST
    assert forwards(pair) == {"base": once, "tuned": once}


def test_an_atlas_runs_no_patch_twice(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither at a place with two names, nor the raw and the identity patch again, nor x itself as a map."""
    asked: list[tuple[str, Site, str]] = []
    score = LocalWorkers.score

    def counted(self: Any, prompts: Any, position: Any, replacements: Any, *more: Any) -> Any:
        found = score(self, prompts, position, replacements, *more)
        for site, rows in found.items():
            name = f"L{site.layer - 1}/resid_post" if site.hook is Hook.RESID_PRE else str(site)
            asked.extend((prompts.split, name, label) for label in rows.patched)
            assert len(rows.patched) == len(replacements[site]) + 2 * (more[1:] != (False,))
        return found

    monkeypatch.setattr(LocalWorkers, "score", counted)
    found = atlas_of(pair)
    assert len(set(asked)) == len(asked)
    on_test = [label for split, _, label in asked if split == "test"]
    assert {"raw", "identity"} <= set(on_test)
    x_itself = identity_map(16).digest
    assert x_itself not in on_test
    twins = [Site(3, Hook.RESID_PRE), Site(2, Hook.RESID_POST)]
    entered, left = (found.patches[site] for site in twins)
    assert entered.per_prompt is left.per_prompt
    assert [entered.map.meta["site"], left.map.meta["site"]] == list(map(str, twins))
    assert [patch.cell.site for patch in found.patches.values()] == list(found.patches)
    assert left.controls["alpha_only"] == left.kl_raw
    monkeypatch.setattr(Study, "engine_mode", "naive")
    both = atlas_of(pair).table
    same = [column for column in both.columns if column != "p_holm"]
    pd.testing.assert_frame_equal(both[same], found.table[same], rtol=1e-4, atol=1e-7)


def test_an_atlas_reported_on_val_records_it_once(pair: Pair) -> None:
    atlas_of(pair, 1, split="val")
    assert forwards(pair) == {"base": N_TRAIN + N_VAL, "tuned": N_TRAIN + N_VAL}


def test_what_is_kept_changes_no_number(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a budget that leaves no room for it every score runs the model, and the tables are equal."""
    tables, counts = [], []
    for budget in (None, 2**21):
        pair = load_pair(PairSpec.load(str(toy)), options=EngineOptions(memory_budget=budget, batch_size=4))
        if budget is not None:
            monkeypatch.setattr("mechdiff_mlflow.engine.memory.clean_runs._BUDGET_SHARE", 2**21)
        tables.append(atlas_of(pair, 1).table)
        counts.append(forwards(pair)["tuned"])
    pd.testing.assert_frame_equal(*tables)
    assert counts == [N_TRAIN + N_VAL + N_TEST, N_TRAIN + 2 * (N_VAL + N_TEST)]


def test_layers_and_heads_record_each_model_once(pair: Pair) -> None:
    study = Study(pair, Protocol())
    layer_profile(study)
    assert forwards(pair) == {"base": N_TEST, "tuned": N_TEST}
    heads_of(study, 3, n_random=2)
    # The heads' own outputs are read once more in both models; tuned is run on val, and at another site.
    assert forwards(pair) == {"base": N_TEST + N_VAL + N_TEST, "tuned": 3 * N_TEST + 2 * N_VAL}


def test_other_sites_of_the_same_prompts_are_recorded_beside_those_known(pair: Pair) -> None:
    prompts, others = pair.prompts_of("test"), [Site(1, Hook.MLP_OUT), Site(2, Hook.ATTN_OUT)]
    first = capture(pair, "base", prompts, Position.DECISION, [SITE])
    both = capture(pair, "base", prompts, Position.DECISION, [SITE, others[0]])
    assert forwards(pair)["base"] == 2 * N_TEST
    assert list(first) == [SITE]
    assert list(both) == [SITE, others[0]]
    assert torch.equal(both[SITE], first[SITE])
    assert capture(pair, "base", prompts, Position.DECISION, [others[0]])[others[0]] is not None
    for sites in ([SITE], [SITE, others[0]], others, [SITE, *others]):
        found = LocalWorkers(pair).score(prompts, Position.DECISION, {site: {} for site in sites})
        assert list(found) == sites
    assert forwards(pair) == {"base": 3 * N_TEST, "tuned": 3 * N_TEST}
    assert torch.equal(
        capture(pair, "tuned", prompts, Position.DECISION, others)[others[1]].double(), found[others[1]].tuned
    )
    assert forwards(pair)["tuned"] == 3 * N_TEST
    pair.recordings.forget()
    capture(pair, "tuned", prompts, Position.DECISION, others)
    assert forwards(pair)["tuned"] == 4 * N_TEST
