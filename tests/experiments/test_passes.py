"""However many cells, each model reads each split once."""

from __future__ import annotations

from pathlib import Path

from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.sweep import SweepSite, cells_of
from mechdiff_mlflow.pairs import load_pair
from mechdiff_mlflow.spec import PairSpec, Rank


def test_a_sweep_of_two_sites_four_ranks_and_four_scales_reads_each_split_once(toy: Path) -> None:
    pair = load_pair(PairSpec.load(str(toy)))
    study = Study(pair, Protocol(n_resamples=10))
    sites = [SweepSite.parse("L2/attn_out"), SweepSite.parse("L3/resid_post")]
    ranks = [Rank(1), Rank(2), Rank(4), Rank(None)]
    cells = cells_of(sites, ranks, (0.3, 0.5, 0.7, 1.0), "procrustes_scaled", "update")
    fits = study.fit(cells)
    patches = study.patch([fit.to_patch for fit in fits])
    assert len(patches) == 2 * 4 * 4
    everything = sum(len(prompts) for prompts in study.prompt_sets)
    for side in (pair.base, pair.tuned):
        with side.engine() as engine:
            assert engine.n_forwards == everything == 40 + 16 + 16
