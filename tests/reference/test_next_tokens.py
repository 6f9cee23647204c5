"""Most probable next tokens and accuracy, against plain hooks; and as the report shows them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from cli.conftest import client, empty_store, here, mechdiff  # noqa: F401
from reference.plain_study import PlainPair, PlainSite
from toy import write_pair, write_prompts

Invoke = Callable[..., Any]
WHO = ("base", "tuned", "raw", "mapped")
HOSTILE = "does <script>alert(1)</script> | `subject1` verb1"


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """The toy pair in float64 with answers: what tuned says, but to the last two prompts."""
    path = write_pair(tmp_path / "pair")
    path.write_text(path.read_text() + "dtype: float64\n")
    write_prompts(path.parent, n_train=40, n_val=8, n_test=8)
    file = path.parent / "test.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["text"] = HOSTILE
    file.write_text("\n".join(map(json.dumps, lines)))
    pair = PlainPair(path)
    for i, top in enumerate(pair.log_probs("test").argmax(-1).tolist()):
        lines[i]["answer"] = pair.tokenizers["tuned"].decode([top]) if i < 6 else "nonsense"
    file.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_per_prompt_and_in_the_report(
    answered: Path,
    here: Path,  # noqa: F811
    mechdiff: Invoke,  # noqa: F811
    client: mlflow.MlflowClient,  # noqa: F811
) -> None:
    words = ["--layer", "2", "--hook", "attn_out", "--alpha", "0.7"]
    mechdiff("run", "--pair", str(answered), *words)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    (patch,) = client.search_runs(ids, "tags.`mechdiff.kind` = 'patch'")
    (parent,) = client.search_runs(ids, "tags.`mechdiff.kind` = 'run'")
    file = client.download_artifacts(patch.info.run_id, "per_prompt.json", str(here))
    table = json.loads(Path(file).read_text())
    columns = dict(zip(table["columns"], zip(*table["data"], strict=True), strict=True))

    plain, site = PlainPair(answered), PlainSite(PlainPair(answered), 2, "attn_out")
    _, _, made = site.chosen(None, (0.7,))
    with torch.no_grad():
        base = [plain.models["base"](ids).logits[0, -1].log_softmax(-1) for ids in plain.ids("base", "test")]
    expected = {
        "base": torch.stack(base),
        "tuned": plain.log_probs("test"),
        "raw": site.patched_log_probs("test", lambda x: x),
        "mapped": site.patched_log_probs("test", made),
    }
    right = {}
    for name, log_probs in expected.items():
        top = [plain.tokenizers["tuned"].decode([token]) for token in log_probs.argmax(-1).tolist()]
        assert list(columns[f"top_{name}"]) == top
        assert columns[f"p_{name}"] == pytest.approx(log_probs.amax(-1).exp().tolist())
        answers = columns["answer"]
        right[name] = sum(word == answer for word, answer in zip(top, answers, strict=True)) / len(top)
        assert patch.data.metrics[f"accuracy/{name}"] == right[name]
    assert right["tuned"] == 6 / 8
    assert parent.data.metrics["accuracy/base"] == right["base"]

    mechdiff("report", "--pair", str(answered))
    report, page = ((here / f"mechdiff-report.{end}").read_text() for end in ("md", "html"))
    first = report.partition("## Where")[0]
    assert f"**{100 * right['base']:.1f} %** of prompts for base and in **75.0 %** for tuned (8 test" in first
    shown = report.partition("## Before and after")[2].partition("## Tables")[0]
    gain = [raw - mapped for raw, mapped in zip(columns["KL_raw"], columns["KL_mapped"], strict=True)]
    order = [columns["prompt"][i] for i in sorted(range(len(gain)), key=gain.__getitem__)]
    assert [order.index(t) for t in order if t in shown or t == HOSTILE] == list(range(len(order)))
    assert "<script>alert" not in report.partition("## Before")[2]
    assert "<script>alert" not in page
    assert "‹script" in page


def test_whole_answers_in_terminal_report_and_comparison(
    answered: Path,
    here: Path,  # noqa: F811
    mechdiff: Invoke,  # noqa: F811
    client: mlflow.MlflowClient,  # noqa: F811
) -> None:
    words = ["--layer", "2", "--hook", "attn_out", "--alpha", "0.7", "--answer-tokens", "3"]
    printed = " ".join(mechdiff("run", "--pair", str(answered), *words).output.split())
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    (patch,) = client.search_runs(ids, "tags.`mechdiff.kind` = 'patch'")
    file = client.download_artifacts(patch.info.run_id, "per_prompt.json", str(here))
    table = json.loads(Path(file).read_text())
    columns = dict(zip(table["columns"], zip(*table["data"], strict=True), strict=True))
    metrics = patch.data.metrics

    mechdiff("report", "--pair", str(answered))
    report = (here / "mechdiff-report.md").read_text()
    how = report.partition("## How\n")[2].partition("## How low-rank")[0]
    for key in ("drop_pct", "drop_answer_pct"):
        ends = [metrics[name] for name in (key, f"ci/{key}_low", f"ci/{key}_high")]
        for text in (printed, how):
            assert "{:.1f} [{:.1f}, {:.1f}]".format(*ends) in text
    shares = [f"{name} {100 * metrics[f'exact_match/{name}']:.1f} %" for name in WHO]
    assert f"Exact match: {', '.join(shares)}; " in how
    assert "exact_match 8 " in printed
    assert "![L2/attn_out: mean KL of each token of the answer]" in report

    shown = report.partition("## Before and after")[2].partition("## Tables")[0]
    assert "Greedy answers of up to 3 tokens: of base" in shown
    kls = zip(columns["KL_answer_raw"], columns["KL_answer_mapped"], strict=True)
    gain = [raw - mapped for raw, mapped in kls]
    rows = [row for row in shown.splitlines() if row.startswith("| ")][2:]
    for row, i in zip(rows, sorted(range(len(gain)), key=gain.__getitem__), strict=True):
        cells = [cell.strip("`") for cell in row.strip("| ").split(" | ")][2:6]
        assert cells == [columns[f"says_{name}"][i].replace(" ", "␣") or "∅" for name in WHO]

    twin = answered.with_name("twin.yaml")
    twin.write_text(answered.read_text().replace("name: toy", "name: twin"))
    for more in ([], words[-2:]):  # the first tokens alone, too: like is compared with like
        mechdiff("run", "--pair", str(twin), *words[:-2], *more)
    mechdiff("compare", str(answered), str(twin))
    (row,) = [
        line for line in (here / "mechdiff-compare.md").read_text().splitlines() if "L2/attn_out proc" in line
    ]
    assert row.count("{:.1f} [{:.1f}, {:.1f}]".format(*ends)) == 2
