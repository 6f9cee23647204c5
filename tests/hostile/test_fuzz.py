"""Any bytes give a value or a MechdiffError, never another exception (the targets of benchmarks/fuzz.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz

TARGETS = sorted(fuzz.TARGETS)
SLOW = {"words": 80, "spec": 80, "mlmodel": 80}


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    fuzz._FOLDER = tmp_path_factory.mktemp("fuzz")


@st.composite
def mutated(draw: st.DrawFn, good: list[bytes]) -> bytes:
    """A good input with a few places overwritten, cut out, doubled or grown."""
    content = draw(st.sampled_from(good))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        span = draw(st.integers(0, 8))
        new = draw(st.binary(max_size=8) | st.sampled_from([b"\0", b"\xff" * 8, content[at : at + span] * 2]))
        content = content[:at] + new + content[at + span :]
    return content


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("target", TARGETS)
def test_good_bytes_are_read(target: str) -> None:
    fuzz._written("fuzz.jsonl", b'{"text": "tea"}\n')
    assert any(fuzz.refuses_or_reads(target, seed) for seed in fuzz.seeds(target))


@pytest.mark.parametrize("target", TARGETS)
def test_random_bytes(target: str) -> None:
    @settings(max_examples=50, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=400))
    def run(data: bytes) -> None:
        fuzz.refuses_or_reads(target, data)

    run()


@pytest.mark.parametrize("target", TARGETS)
def test_mutations_of_good_bytes(target: str) -> None:
    @settings(max_examples=SLOW.get(target, 150), suppress_health_check=list(HealthCheck))
    @given(mutated(fuzz.seeds(target)))
    def run(data: bytes) -> None:
        fuzz.refuses_or_reads(target, data)

    run()


@settings(max_examples=120)
@given(json_values, st.sampled_from(["map-header", "prompts", "spec", "mlmodel"]))
def test_json_of_any_shape(value: object, target: str) -> None:
    fuzz.refuses_or_reads(target, json.dumps(value).encode())


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(
            ["name", "base", "tuned", "prompts", "dtype", "system", "modules", "description", "root"]
        ),
        json_values | st.fixed_dictionaries({"model": st.text(max_size=8)}),
    )
)
def test_specs_with_the_right_keys_and_any_values(fields: dict[str, object]) -> None:
    fields = {"name": "toy", "base": {"model": "a"}, "tuned": {"model": "b"}, **fields}
    fuzz.refuses_or_reads("spec", json.dumps(fields).encode())


def test_the_script_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "atheris":
            raise ImportError(name)
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("sys.argv", ["fuzz", "spec"])
    with pytest.raises(SystemExit, match="pip install atheris"):
        fuzz.main()
