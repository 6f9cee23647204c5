"""Prompts of a pair from one file, a table or a data set, split by a seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.pair_spec import PairSpec
from mechdiff_mlflow.spec.prompt_files import SHARES, PromptFiles, read_file, split_prompts, split_remark
from mechdiff_mlflow.spec.prompts import Prompt, PromptSet, check_disjoint

WORDS = ["tea", "horse", "steppe", "river", "song", "bread", "silver", "felt", "eagle", "apple", "snow"]


def prompts(n: int, groups: int | None = None) -> PromptSet:
    texts = [f"what is {WORDS[i % 11]} {WORDS[i // 11 % 11]} number {i}" for i in range(n)]
    group = (lambda i: None) if groups is None else (lambda i: f"g{i % groups}")
    return PromptSet(
        "all", tuple(Prompt(({"role": "user", "content": t},), group(i)) for i, t in enumerate(texts))
    )


@pytest.mark.parametrize("n", [40, 200])
def test_a_seed_shares_prompts_out_and_says_so(n: int) -> None:
    found = split_prompts(prompts(n), 0, "p.jsonl")
    for split, share in SHARES.items():
        assert abs(len(found[split]) - share * n) <= 1
    assert sorted(p.text for one in found.values() for p in one.prompts) == sorted(
        p.text for p in prompts(n).prompts
    )
    check_disjoint(found.values())
    remark = split_remark(found, 0)
    assert f"{n} prompts were split by seed 0: {len(found['train'])} train" in remark
    few = found["test"].few
    assert ("times as wide as with 100" in few) is (found["test"].n_groups < 100)
    assert few == "" or few.startswith(f"{len(found['test'])} test prompts, {found['test'].n_groups} of them")


def test_other_seeds_split_otherwise_and_the_order_of_the_file_does_not_matter() -> None:
    def places(every: PromptSet, seed: int) -> dict[str, str]:
        return {p.text: split for split, one in split_prompts(every, seed, "p").items() for p in one.prompts}

    every = prompts(80)
    assert places(every, 0) == places(PromptSet("all", every.prompts[::-1]), 0)
    assert places(every, 0) != places(every, 1)


@given(st.integers(9, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_groups_and_near_duplicates_stay_together(groups: int, seed: int) -> None:
    every = prompts(90, groups)
    twin = "which of the old songs of the steppe do shepherds sing at night"
    twins = [Prompt(({"role": "user", "content": f"{twin}{end}"},), end or None) for end in ("", " ?", "!")]
    found = split_prompts(PromptSet("all", (*every.prompts, *twins)), seed, "p.jsonl")
    check_disjoint(found.values())
    for i in range(groups):
        assert sum(f"g{i}" in [p.group for p in one.prompts] for one in found.values()) == 1
    assert sum(any(p.text.startswith(twin) for p in one.prompts) for one in found.values()) == 1


def test_too_few_are_refused() -> None:
    with pytest.raises(MechdiffError, match=r"p.jsonl has 7 independent prompts, too few .* at least 8"):
        split_prompts(prompts(30, 7), 0, "p.jsonl")
    assert len(split_prompts(prompts(30, 8), 0, "p.jsonl")) == 3


ROWS = [{"text": "a cup of tea", "answer": "chai", "group": "drinks"}, {"text": "a bow", "group": "music"}]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".jsonl": jsonl,
    ".csv": lambda path, rows: pd.DataFrame(rows).to_csv(path, index=False),
    ".parquet": lambda path, rows: pd.DataFrame(rows).to_parquet(path),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("column", ["text", "prompt", "question"])
def test_files_of_every_kind_say_the_same(tmp_path: Path, suffix: str, column: str) -> None:
    path = tmp_path / f"p{suffix}"
    WRITERS[suffix](
        path, [{column: row["text"], **{k: v for k, v in row.items() if k != "text"}} for row in ROWS]
    )
    found = read_file(path, "val", system="be brief", column="question" if column == "question" else None)
    assert [(p.text, p.answer, p.group) for p in found.prompts] == [
        ("a cup of tea", "chai", "drinks"),
        ("a bow", None, "music"),
    ]
    assert [m["role"] for m in found.prompts[0].messages] == ["system", "user"]


def test_messages_of_a_parquet_file_are_conversations(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "x"},
    ]
    pd.DataFrame({"chat": [turns, turns[:1]]}).to_parquet(tmp_path / "p.parquet")
    found = read_file(tmp_path / "p.parquet", "val", column="chat")
    assert [len(p.messages) for p in found.prompts] == [3, 1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.csv", "question,answer\nwhat,tea\n", "has no column text or prompt or messages among q"),
        ("p.csv", "text\n\n\n", "has no rows"),
        ("p.csv", 'text\n"open', "cannot be read"),
        ("p.csv", "text\ntea\ntea\n", "stand there before"),
        ("p.parquet", "PAR1", "cannot be read"),
        ("p.csv", "text,group\n,g\n", "row 2 is no prompt"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_read_end_in_one_sentence(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(MechdiffError, match=says):
        read_file(tmp_path / name, "val")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("p.jsonl", {"file": "p.jsonl"}),
        ("p.csv:question", {"file": "p.csv", "column": "question"}),
        ("a.jsonl, b.jsonl", {"train": "a.jsonl", "val": "b.jsonl"}),
        ("a,b,c", {"train": "a", "val": "b", "test": "c"}),
    ],
)
def test_prompts_as_they_are_typed(text: str, fields: dict[str, str]) -> None:
    assert PromptFiles.parse(text).model_dump(exclude_defaults=True) == fields


@pytest.mark.parametrize("text", ["", "a,,b", "a,b,c,d"])
def test_prompts_that_are_typed_wrongly(text: str) -> None:
    with pytest.raises(MechdiffError, match="neither one file nor train, val and test"):
        PromptFiles.parse(text)


def test_a_data_set_is_named_with_its_column_and_part() -> None:
    found = PromptFiles.parse_dataset("org/name:question:test")
    assert found.model_dump(exclude_defaults=True) == {
        "dataset": "org/name",
        "column": "question",
        "part": "test",
    }
    with pytest.raises(MechdiffError, match="is not NAME, NAME:COLUMN"):
        PromptFiles.parse_dataset("a:b:c:d")


def test_a_spec_may_name_one_file_and_a_base_in_a_word(tmp_path: Path) -> None:
    jsonl(tmp_path / "p.jsonl", [{"text": p.text} for p in prompts(40).prompts])
    text = "name: x\nbase: org/b\ntuned: {model: org/t}\nprompts: p.jsonl\n"
    spec = PairSpec.parse(text, root=tmp_path)
    assert spec.base.model == "org/b"
    assert {split: len(one) for split, one in spec.read_prompts().items()} == {
        "train": 24,
        "val": 6,
        "test": 10,
    }
    again = PairSpec.parse(spec.to_yaml(), root=tmp_path)
    assert again.read_prompts() == spec.read_prompts()
    for wrong in ("{file: p.jsonl, val: p.jsonl}", "{train: p.jsonl}", "{file: a, dataset: b}"):
        with pytest.raises(MechdiffError, match="give train and val"):
            PairSpec.parse(text.replace("p.jsonl", wrong), root=tmp_path)
