"""Models that differ at some tokens of an answer alone: the curve of KL says at which."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy

from mechdiff_mlflow.experiments import PatchRecord, Protocol, Study
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Rank
from mechdiff_mlflow.spec.sites import Hook, Site

ANSWER = "verb0 verb1 subject1 subject2 subject3"
FIRST, LATE = ["<assistant>", "verb0", "verb1"], ["subject1", "subject2", "subject3"]
SITE = Site(toy.N_LAYERS - 1, Hook.MLP_OUT)
GATE, NEURON = 3, 5
"""A dimension of the residual stream that the gated tokens' embeddings alone have, and what reads it."""


def write_gated_pair(folder: Path, gated: list[str]) -> Path:
    """A pair whose last MLP adds a vector in tuned, where the token at hand is one of some."""
    folder.mkdir()
    net, words = toy.model(0), toy.tokenizer().get_vocab()
    with torch.no_grad():
        net.model.embed_tokens.weight[:, GATE] = 0
        net.model.embed_tokens.weight[[words[word] for word in gated], GATE] = 1
        for layer in net.model.layers:  # nobody else writes there
            layer.self_attn.o_proj.weight[GATE] = 0
            layer.mlp.down_proj.weight[GATE] = 0
        mlp = net.model.layers[SITE.layer].mlp
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight[NEURON] = 0
            weight[NEURON, GATE] = 2
        toy.write_model(folder / "base", net)
        mlp.down_proj.weight[:, NEURON] += torch.randn(toy.WIDTH, generator=torch.Generator().manual_seed(1))
    toy.write_model(folder / "tuned", net)
    toy.write_prompts(folder)
    for split in ("train", "val", "test"):
        path = folder / f"{split}.jsonl"
        lines = [{**json.loads(line), "answer": ANSWER} for line in path.read_text().splitlines()]
        path.write_text("\n".join(map(json.dumps, lines)))
    (folder / "toy.yaml").write_text(toy.SPEC)
    return folder / "toy.yaml"


def measured(spec: Path, patch_at: str) -> PatchRecord:
    study = Study(load_pair(PairSpec.load(str(spec))), Protocol(answer_tokens=6, patch_at=patch_at))
    cell = Cell(SITE, "procrustes_scaled", "update", Rank(None), Alpha((1.0,)))
    (record,) = study.patch([fit.to_patch for fit in study.fit([cell])])
    return record


@pytest.mark.parametrize("patch_at", ["decision", "answer"])
def test_a_change_of_the_first_three_tokens_stands_in_the_first_three(tmp_path: Path, patch_at: str) -> None:
    record = measured(write_gated_pair(tmp_path / "pair", FIRST), patch_at)
    assert record.answer is not None
    curve, floor = np.asarray(record.answer.curve["KL_raw"]), 10 * record.answer.noise_floor
    assert len(curve) == 6, "five words and the end of the turn"
    assert (curve[: 3 if patch_at == "answer" else 1] > 1e-3).all()
    assert (curve[3:] <= floor).all()
    assert record.answer.drop_pct is not None
    low = record.answer.drop_pct.low
    assert low is not None
    # Fitted at the decision token, the map also changes later tokens that are the same in both models.
    assert (low > 0) == (patch_at == "decision")
    (logprob,) = (task for task in record.answer.tasks if task.measure == "answer_logprob")
    if patch_at == "answer":  # put back wherever they differ, base's activations make tuned base
        assert logprob.means["raw"] == pytest.approx(logprob.means["base"], abs=1e-4)
    assert logprob.means["raw"] != pytest.approx(logprob.means["tuned"], abs=1e-4)


def test_a_change_of_late_tokens_is_nothing_to_the_first_and_something_to_the_answer(tmp_path: Path) -> None:
    record = measured(write_gated_pair(tmp_path / "pair", LATE), "answer")
    assert record.kl_raw == 0
    assert record.drop_pct is None
    assert record.answer is not None
    curve = np.asarray(record.answer.curve["KL_raw"])
    assert (curve[:3] == 0).all()
    assert (curve[3:] > 1e-3).all()
