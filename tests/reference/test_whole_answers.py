"""Whole answers against plain hooks: greedy tokens, the KL of each, and what is chosen by their sum."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.plain_study import PlainPair, PlainSite, bootstrap_drop, drop, hooked, kl
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.experiments import Protocol, Study
from mechdiff_mlflow.experiments.answer_tasks import _ended, _exact, task_records
from mechdiff_mlflow.models.pairs import load_pair
from mechdiff_mlflow.spec.pair_spec import Alpha, Cell, PairSpec, Rank
from mechdiff_mlflow.spec.prompts import Prompt, PromptSet
from mechdiff_mlflow.spec.sites import Hook, Site
from mechdiff_mlflow.spec.tokens import Answers

SITE, ALPHAS, END = Site(2, Hook.ATTN_OUT), (0.9, 1.2), 5
CELL = Cell(SITE, "procrustes_scaled", "update", Rank(None), Alpha(ALPHAS))
CLOSE = {"rtol": 1e-6, "atol": 1e-10}

Made = Callable[[Tensor], Tensor]


def raw_patch(rows: Tensor) -> Tensor:
    """Base's activations as they are."""
    return rows


def study_of(spec: Path, **more: object) -> Study:
    protocol = replace(Protocol(seed=5, n_resamples=300), **more)  # type: ignore[arg-type]
    return Study(load_pair(PairSpec.load(str(spec))), protocol)


class PlainAnswers:
    """Answers of the tuned model, and how probable it finds them; a patch of None leaves it as it is."""

    def __init__(self, site: PlainSite, n_tokens: int, *, each: bool) -> None:
        self.site, self.n_tokens, self.each = site, n_tokens, each

    def answer(self, ids: Tensor, made: Made | None = None) -> Tensor:
        """Greedy, without a cache, one token after another, up to the end of the turn."""
        said: list[int] = []
        while len(said) < self.n_tokens and END not in said:
            said.append(int(self.log_p(ids, torch.tensor([[*said, 0]]), made)[-1].argmax()))
        return torch.tensor([said])

    @torch.no_grad()
    def log_p(self, ids: Tensor, answer: Tensor, made: Made | None) -> Tensor:
        """Log-probabilities [steps, vocabulary] of the tokens of an answer."""
        whole, steps = torch.cat([ids, answer[:, :-1]], 1), answer.shape[1]
        if made is None:
            return self._run("tuned", whole, lambda x: None)[0][-steps:]
        replaced = slice(ids.shape[1] - 1, None if self.each else ids.shape[1])
        rows = made(self._run("base", whole, lambda x: None)[1][0, replaced])

        def put(x: Tensor) -> Tensor:
            x = x.clone()
            x[0, replaced] = rows
            return x

        return self._run("tuned", whole, put)[0][-steps:]

    def steps(self, split: str, made: Made) -> list[np.ndarray]:
        """KL(patched ‖ clean) of each token of each answer."""
        found = []
        for ids in self.site.pair.ids("tuned", split):
            answer = self.answer(ids)
            found.append(kl(*(self.log_p(ids, answer, patch) for patch in (made, None))))
        return found

    def _run(self, role: str, ids: Tensor, act: Callable[[Tensor], Tensor | None]) -> tuple[Tensor, Tensor]:
        """Log-probabilities [tokens, vocabulary] and the site's activations before `act`."""
        kept: list[Tensor] = []

        def both(x: Tensor) -> Tensor | None:
            kept.append(x)
            return act(x)

        model = self.site.pair.models[role]
        with hooked(model.model.layers[SITE.layer], str(SITE.hook), both):
            return model(ids).logits[0].log_softmax(-1), kept[0]


@pytest.mark.parametrize(("n_tokens", "patch_at"), [(4, "decision"), (4, "answer"), (16, "answer")])
def test_every_number_of_an_answer_is_the_reference(spec: Path, n_tokens: int, patch_at: str) -> None:
    study = study_of(spec, answer_tokens=n_tokens, patch_at=patch_at)
    (fit,) = study.fit([CELL])
    (record,) = study.patch([fit.to_patch])
    site = PlainSite(PlainPair(spec), SITE.layer, str(SITE.hook))
    plain = PlainAnswers(site, n_tokens, each=patch_at == "answer")
    # The tuned model's own words, tokens of the prompt before them.
    answers = study.answered(study.report_prompts).answers
    assert answers is not None
    assert list(answers.ids) == [
        tuple(plain.answer(ids)[0].tolist()) for ids in site.pair.ids("tuned", "test")
    ]
    # Val chooses α by the KL of whole answers.
    totals = {
        alpha: np.mean([kl.sum() for kl in plain.steps("val", made)])
        for (_, alpha), made in site.offers(None, ALPHAS).items()
    }
    assert record.map.alpha == min(totals, key=lambda alpha: totals[alpha])
    made = site.fitted(None, fit.off_span).scaled(record.map.alpha)
    raw, mapped = plain.steps("test", raw_patch), plain.steps("test", made)
    assert record.answer is not None
    for name, found in (("raw", raw), ("mapped", mapped)):
        sums = np.array([kl.sum() for kl in found])
        np.testing.assert_allclose(record.per_prompt[f"KL_answer_{name}"], sums, **CLOSE)
        np.testing.assert_allclose(record.per_prompt[f"KL_{name}"], [kl[0] for kl in found], **CLOSE)
        longest = max(map(len, found))
        curve = [np.mean([kl[t] for kl in found if len(kl) > t]) for t in range(longest)]
        np.testing.assert_allclose(record.answer.curve[f"KL_{name}"], curve, **CLOSE)
    sums_raw, sums_mapped = (np.array([kl.sum() for kl in found]) for found in (raw, mapped))
    interval = record.answer.drop_pct
    assert interval is not None
    ends = bootstrap_drop(sums_raw, sums_mapped, seed=5, n_resamples=300)
    assert (interval.estimate, interval.low, interval.high) == pytest.approx(
        (drop(sums_raw, sums_mapped), *ends), rel=1e-6
    )


def test_one_token_is_the_run_without_the_option_and_the_first_of_many(spec: Path) -> None:
    alone, many = study_of(spec), study_of(spec, answer_tokens=8, patch_at="answer")
    one = Cell(SITE, CELL.solver, CELL.family, CELL.rank, Alpha((1.0,)))
    records = [study.patch([fit.to_patch for fit in study.fit([one])])[0] for study in (alone, many)]
    assert records[0].answer is None
    for name in ("KL_raw", "KL_mapped", "delta_logprob"):
        np.testing.assert_allclose(*(record.per_prompt[name] for record in records), rtol=0, atol=1e-6)
    assert alone.answered(alone.report_prompts) is alone.report_prompts


def test_given_answers_are_the_assistants_turn_and_end_with_it(spec: Path) -> None:
    study = study_of(spec, answer_tokens=3)
    pair, prompts = study.pair, study.report_prompts
    words = pair.tuned.tokenizer.get_vocab()
    answers = ("well verb1", "verb2", "well well well well")
    answered = [replace(p, answer=a) for p, a in zip(prompts.prompts, answers, strict=False)]
    some = PromptSet("test", (*answered, *prompts.prompts[3:5]))
    found = study.answered(some).answers
    assert found is not None
    assert found.ids[0] == (words["well"], words["verb1"], END)
    assert found.ids[1] == (words["verb2"], END)
    assert found.ids[2] == (words["well"],) * 3, "an answer is cut after T tokens"
    own = study.answered(prompts).answers
    assert own is not None
    assert found.ids[3:] == own.ids[3:5], "where there is no answer, it is the tuned model's"
    assert study.answered(some).digest != some.digest


def test_an_answer_cannot_be_patched_from_another_position() -> None:
    with pytest.raises(MechdiffError, match="use --patch-at decision, or --position decision"):
        Protocol(answer_tokens=4, patch_at="answer", position="last_content")  # type: ignore[arg-type]
    with pytest.raises(MechdiffError, match="give 1 to 1024"):
        Protocol(answer_tokens=0)


@pytest.mark.parametrize("patch_at", ["decision", "answer"])
def test_task_measures_are_the_reference(spec: Path, patch_at: str) -> None:
    study = study_of(spec, answer_tokens=4, patch_at=patch_at)
    made = study.fit([replace(CELL, alpha=Alpha((1.0,)))])[0].map
    site = PlainSite(PlainPair(spec), SITE.layer, str(SITE.hook))
    plain = PlainAnswers(site, 4, each=patch_at == "answer")
    own = site.fitted(None, "nearest_identity")
    # The right answers: what tuned says, and for every other prompt what it says under the patch.
    said = {
        name: [plain.answer(ids, a_map) for ids in site.pair.ids("tuned", "test")]
        for name, a_map in (("tuned", None), ("mapped", own))
    }
    right = [tuple(said["mapped" if i % 2 else "tuned"][i][0].tolist()) for i in range(8)]
    prompts = study.report_prompts
    answered = PromptSet(
        "test",
        tuple(replace(prompt, answer="given") for prompt in prompts.prompts),
        Answers(tuple(right), 4, patch_at == "answer"),
    )
    maps = {"mapped": made, "null": made.with_alpha(0.5)}
    where = (answered, SITE, maps, study.protocol, study.computing, study.bootstrap)
    records, texts = task_records(*where)
    found = {record.measure: record for record in records}
    tokenizer = study.pair.tuned.tokenizer

    def begin(ids: Sequence[int]) -> list[int]:
        return list(itertools.takewhile(lambda one: one not in tokenizer.all_special_ids, ids))

    for name, rows in said.items():
        assert texts[f"says_{name}"] == [tokenizer.decode(begin(row[0].tolist())) for row in rows]
        pairs = zip(rows, right, strict=True)
        exact = np.mean([begin(row[0].tolist()) == begin(answer) for row, answer in pairs])
        assert found["exact_match"].means[name] == pytest.approx(exact)
    for name, patch in (("tuned", None), ("raw", raw_patch), ("mapped", own)):
        sums = [
            float(plain.log_p(ids, torch.tensor([answer]), patch)[range(len(answer)), answer].sum())
            for ids, answer in zip(site.pair.ids("tuned", "test"), right, strict=True)
        ]
        assert found["answer_logprob"].means[name] == pytest.approx(np.mean(sums), rel=1e-6)


def test_an_answer_is_exact_whatever_special_token_ends_it() -> None:
    prompts = PromptSet(
        "test",
        tuple(Prompt(({"role": "user", "content": word},)) for word in "ab"),
        Answers(((5, 6, 2), (5, 6, 7, 8)), 4, False),
    )
    said = np.array([[[5, 6, 1, 9], [5, 6, 9, 1]], [[5, 6, 7, 8], [5, 6, 2, -1]]])
    assert _exact(prompts, _ended(said, [1, 2]), [1, 2]).tolist() == [[1, 0], [1, 0]]
