"""Every hostile input is refused in one sentence; none runs anything, writes elsewhere or fills memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hostile.corpus import CASES, MARKER, READERS, Case, a_map

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap

TESTS = Path(__file__).parents[1]


def test_there_are_at_least_200_and_each_is_another() -> None:
    assert len(CASES) >= 200
    assert [str(c) for c, n in Counter(map(str, CASES)).items() if n > 1] == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_refused_in_one_sentence(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input").mkdir()
    given = case.write(tmp_path / "input")
    with pytest.raises(MechdiffError) as caught:
        READERS[case.reader](given)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert sentence.isprintable(), ascii(sentence)
    assert not re.search(r"Traceback|object at 0x", sentence)
    assert len(sentence) < 1500 or len(str(given)) > 1000
    assert not (tmp_path / MARKER).exists()


def test_what_the_corpus_starts_from_is_accepted(tmp_path: Path) -> None:
    for suffix in (".pt", ".safetensors"):
        a_map().save(tmp_path / f"map{suffix}")
        assert AffineMap.load(tmp_path / f"map{suffix}") == a_map()


def test_the_whole_corpus_runs_nothing_writes_nowhere_else_and_stays_small(tmp_path: Path) -> None:
    """In a process of its own, under an audit hook of the interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, "-B", "-m", "hostile.audit", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = dict(re.findall(r"^([\w ]+): (\d+)$", done.stdout, re.MULTILINE))
    assert int(counts["refused"]) == len(CASES)
    assert (
        counts["accepted"] == counts["executed"] == counts["writes outside"] == counts["connections"] == "0"
    )
    assert int(counts["peak MiB"]) < 1024
