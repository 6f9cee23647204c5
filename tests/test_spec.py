import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.spec.pair_spec import ALPHA_GRID, MAX_SPEC_BYTES, Alpha, PairSpec, Rank, shipped_pairs

MINIMAL = """\
name: toy
base: {model: ./base}
tuned: {model: ./tuned}
prompts: {train: train.jsonl, val: val.jsonl}
"""


def parse(text: str, root: Path = Path()) -> PairSpec:
    return PairSpec.parse(text, root=root)


@given(st.one_of(st.none(), st.integers(1, 10**6)))
def test_rank_parses_its_own_text(k: int | None) -> None:
    assert Rank.parse(str(Rank(k))) == Rank(k)


def test_rank_zero_means_full_as_in_the_seed() -> None:
    assert Rank.parse("0") == Rank.parse("full") == Rank(None)


@pytest.mark.parametrize("text", ["-1", "1.5", "k", ""])
def test_bad_rank(text: str) -> None:
    with pytest.raises(MechdiffError, match="full"):
        Rank.parse(text)


@given(st.lists(st.sampled_from([0, 0.1, 0.3, 0.7, 1, 1.25, 2]), min_size=1, unique=True).map(sorted))
def test_alpha_parses_its_own_text(values: list[float]) -> None:
    assert Alpha.parse(str(Alpha(tuple(values)))) == Alpha(tuple(values))


def test_auto_alpha_is_the_grid_and_a_choice() -> None:
    assert Alpha.parse("auto").values == ALPHA_GRID
    assert str(Alpha.parse("auto")) == "auto"
    assert Alpha.parse("auto").is_choice
    assert not Alpha.parse("0.3").is_choice


@pytest.mark.parametrize("text", ["-0.1", "nan", "inf", "-inf", "1e999", "0.3,nan"])
def test_alpha_out_of_range(text: str) -> None:
    with pytest.raises(MechdiffError, match="not a finite number of at least 0"):
        Alpha.parse(text)


@pytest.mark.parametrize("text", ["", "x", "0.3;0.7", "0.3,,0.7"])
def test_alpha_that_is_no_number(text: str) -> None:
    with pytest.raises(MechdiffError, match="is not a number; pass"):
        Alpha.parse(text)


@pytest.mark.parametrize("text", ["0.7,0.3", "0.3,0.3"])
def test_alpha_grid_must_increase(text: str) -> None:
    with pytest.raises(MechdiffError, match="increasing order"):
        Alpha.parse(text)


def test_spec_survives_its_own_yaml() -> None:
    spec = parse(MINIMAL)
    assert parse(spec.to_yaml()) == spec


@pytest.mark.parametrize("name", sorted(shipped_pairs()))
def test_shipped_specs_load(name: str) -> None:
    spec = PairSpec.load(name)
    assert spec.name == name
    assert parse(spec.to_yaml(), spec.root) == spec


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "examples/pairs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_example_specs_are_valid(path: Path) -> None:
    assert PairSpec.load(str(path)).name == path.stem


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINIMAL + "layer: 26\n", "layer: unknown key"),
        (MINIMAL.replace("./base}", "./base, device: 0}"), "base.device: unknown key"),
        (MINIMAL.replace("name: toy\n", ""), "name: Field required"),
        (MINIMAL.replace("name: toy", "name: a/b"), "name: String should match pattern"),
        (
            MINIMAL.replace("tuned: {model: ./tuned}", "tuned: {model: a, adapter: b}"),
            "one of model, adapter or planted",
        ),
        (MINIMAL.replace("tuned: {model: ./tuned}", "tuned: {}"), "one of model, adapter or planted"),
        (MINIMAL + "dtype: int8\n", "dtype: Input should be 'float32'"),
        ("just words", "is not a mapping"),
        ("a: [1\nb: 2", "is not valid YAML at line 2"),
        ("a: &x 1\nb: *x", "uses aliases"),
        ("1: 2\n" + MINIMAL, "its keys must be plain words"),
        ("#" * (MAX_SPEC_BYTES + 1), f"over {MAX_SPEC_BYTES}"),
        ("a: !!python/object/apply:os.system ['true']", "is not valid YAML"),
    ],
)
def test_bad_specs_say_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(MechdiffError) as caught:
        parse(text)
    assert says in str(caught.value)


def test_unknown_pair_lists_the_shipped_ones() -> None:
    with pytest.raises(MechdiffError, match=r"cognitive-demo, cultural-demo"):
        PairSpec.load("cultural")


def test_spec_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "pair.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(MechdiffError, match="cannot be read"):
        PairSpec.load(str(tmp_path / "pair.yaml"))


def test_missing_weights_and_hub_ids(tmp_path: Path) -> None:
    spec = parse(MINIMAL, tmp_path)
    with pytest.raises(MechdiffError, match="does not exist; correct the path"):
        spec.locate("./base")
    assert spec.locate("org/model") == "org/model"
    (tmp_path / "base").mkdir()
    assert spec.locate("base") == str((tmp_path / "base").resolve())


def test_missing_prompts(tmp_path: Path) -> None:
    spec = parse(MINIMAL, tmp_path)
    with pytest.raises(MechdiffError, match=r"train\.jsonl does not exist"):
        spec.prompt_path("train")
    with pytest.raises(MechdiffError, match=r"has no test prompts; .* --split val"):
        spec.prompt_path("test")


def test_alpha_refuses_nan_when_built() -> None:
    with pytest.raises(MechdiffError):
        Alpha((math.nan,))
