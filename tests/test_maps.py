import io
import json
import pickle
import random
import resource
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap, Weight, identity_map

SUFFIXES = pytest.mark.parametrize("suffix", [".pt", ".safetensors"])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


VALUES = st.none() | st.booleans() | st.floats(-1e9, 1e9) | st.text()


@st.composite
def maps(draw: st.DrawFn) -> AffineMap:
    d_in, d_out, rank, seed = (draw(st.integers(lo, hi)) for lo, hi in ((1, 6), (1, 6), (0, 7), (0, 999)))
    form = draw(st.sampled_from(["dense", "low_rank", "identity", "diagonal"]))
    if form in ("identity", "diagonal"):
        d_out = d_in
    left, right = normal(d_in, rank, seed=seed), normal(rank, d_out, seed=seed + 1)
    weight = {
        "dense": lambda: Weight.from_dense(normal(d_in, d_out, seed=seed)),
        "low_rank": lambda: Weight.low_rank(left, right),
        "identity": lambda: Weight.low_rank(left, right, identity=draw(st.floats(-2, 2))),
        "diagonal": lambda: Weight(normal(d_in, seed=seed), left, right),
    }[form]()
    meta = draw(
        st.dictionaries(
            st.text(max_size=5).map("_{}".format),
            st.none() | st.booleans() | st.floats(-1e9, 1e9) | st.text(),
        )
    )
    alpha = draw(st.floats(0, 10))
    made = AffineMap(normal(d_in, seed=seed + 2), normal(d_out, seed=seed + 3), weight, alpha, meta)
    return made.to(draw(st.sampled_from([torch.float64, torch.float32])))


@pytest.fixture
def edit() -> AffineMap:
    """A rank-2 update of the identity over 8 dimensions."""
    weight = Weight.low_rank(normal(8, 2), normal(2, 8, seed=1), identity=1.0)
    return AffineMap(normal(8, seed=2), normal(8, seed=3), weight, alpha=0.3, meta={"site": "L26/attn_out"})


@given(maps(), st.sampled_from([(), (3,), (2, 0), (2, 3)]))
def test_apply_is_the_defining_formula(m: AffineMap, lead: tuple[int, ...]) -> None:
    x = normal(*lead, m.d_in, seed=9)
    m = m.to(torch.float64)
    expected = m.alpha * ((x - m.mean_in) @ m.dense() + m.mean_out)
    torch.testing.assert_close(m(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_is_the_maps_and_the_result_is_of_the_inputs_dtype(
    edit: AffineMap, dtype: torch.dtype
) -> None:
    x = normal(5, 8, seed=4).to(dtype)
    assert torch.equal(edit(x), edit(x.double()).to(dtype))


def test_alpha_is_replaced_and_scales_the_mean_too(edit: AffineMap) -> None:
    x = normal(5, 8, seed=4)
    assert edit.with_alpha(0.7).alpha == 0.7
    torch.testing.assert_close(edit.with_alpha(0.6)(x), 2 * edit(x))
    assert torch.equal(edit.with_alpha(0)(x), torch.zeros_like(x))


def test_meta_is_added_to_and_copied(edit: AffineMap) -> None:
    ranks = [1, 2]
    m = edit.with_meta(ranks=ranks)
    ranks.append(3)
    assert m.meta == {"site": "L26/attn_out", "ranks": [1, 2]}


@SUFFIXES
@given(m=maps())
def test_save_then_load_is_equal(tmp_path_factory: pytest.TempPathFactory, suffix: str, m: AffineMap) -> None:
    folder = tmp_path_factory.mktemp("maps")
    m.save(folder / f"a{suffix}")
    m.save(folder / f"another{suffix}")
    loaded = AffineMap.load(folder / f"a{suffix}")
    assert loaded == m
    written = (folder / f"a{suffix}").read_bytes()
    assert written == (folder / f"another{suffix}").read_bytes() == loaded.to_bytes(suffix)


def test_equality_sees_every_part(edit: AffineMap) -> None:
    dense = AffineMap(edit.mean_in, edit.mean_out, Weight.from_dense(edit.dense()), edit.alpha, edit.meta)
    others = [edit.with_alpha(0.4), edit.with_meta(k=1), dense, edit.to(torch.float32), "map"]
    others.append(AffineMap(edit.mean_out, edit.mean_out, edit.weight, edit.alpha, edit.meta))
    assert all(edit != other for other in others)
    assert len({m.sha256() for m in [edit, *others[:-2]]}) == 5  # type: ignore[union-attr]


def test_pt_is_plain_tensors_and_one_json_string(edit: AffineMap, tmp_path: Path) -> None:
    edit.save(tmp_path / "map.pt")
    content = torch.load(tmp_path / "map.pt", weights_only=True)
    header = json.loads(content.pop("metadata"))
    assert header == {
        "format": "mechdiff-map",
        "version": 1,
        "alpha": 0.3,
        "meta": {"site": "L26/attn_out"},
    }
    assert all(type(t) is torch.Tensor for t in content.values())


def test_a_slice_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    big = normal(200, 200)
    m = AffineMap(big[0, :4], big[1, :4], Weight.low_rank(big[:4, :1], big[:1, :4]))
    m.save(tmp_path / "map.pt")
    assert (tmp_path / "map.pt").stat().st_size < 10_000


# Ranks


@pytest.mark.parametrize("identity", [0.0, 1.0, 0.8])
@pytest.mark.parametrize("form", ["factors", "redundant factors", "dense"])
def test_rank_counts_w_or_its_update(identity: float, form: str) -> None:
    left, right = normal(9, 3), normal(3, 9, seed=1)
    if form == "redundant factors":
        left, right = torch.cat([left, left], 1), torch.cat([right, right])
    weight = Weight.low_rank(left, right, identity)
    m = AffineMap(normal(9), normal(9), Weight.from_dense(weight.dense()) if form == "dense" else weight)
    assert m.weight_rank("content") == (9 if identity else 3)
    assert m.weight_rank("update") == (3 if identity == 1 else 9)


def test_rank_sees_the_identity_cancelled() -> None:
    # I − u uᵀ is a projection: its rank is one less than its width.
    u = torch.nn.functional.normalize(normal(7, 1), dim=0)
    assert Weight.low_rank(-u, u.mT, identity=1.0).rank() == 6
    assert identity_map(7).weight.minus_identity().rank() == 0
    assert Weight(torch.tensor([1.0, 0.0, 2.0]), torch.zeros(3, 0), torch.zeros(0, 3)).rank() == 2


def test_a_false_claim_of_rank_is_refused(edit: AffineMap) -> None:
    edit.check_rank(2, "update")
    edit.check_rank(8, "content")
    with pytest.raises(MechdiffError, match="claims rank 1 in the update family and has rank 2; refit"):
        edit.check_rank(1, "update")
    with pytest.raises(MechdiffError, match="claims rank 2 in the content family and has rank 8"):
        edit.check_rank(2, "content")


def test_unknown_family_lists_both(edit: AffineMap) -> None:
    with pytest.raises(MechdiffError, match="use one of update, content"):
        edit.check_rank(1, "rank")


def test_update_of_a_change_of_width_is_refused() -> None:
    m = AffineMap(normal(3), normal(4), Weight.low_rank(normal(3, 1), normal(1, 4)))
    with pytest.raises(MechdiffError, match="from 3 to 4 dimensions is undefined; use the content family"):
        m.check_rank(1, "update")


# Refusals


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_alpha_must_be_finite_and_not_negative(edit: AffineMap, alpha: float) -> None:
    with pytest.raises(MechdiffError, match="give a finite number that is not negative"):
        edit.with_alpha(alpha)


@pytest.mark.parametrize("x", [normal(3, 7), normal(8).long(), torch.tensor(1.0)])
def test_rows_of_another_width_or_kind_are_refused(edit: AffineMap, x: torch.Tensor) -> None:
    with pytest.raises(MechdiffError, match="give floating-point rows of width 8"):
        edit(x)


@pytest.mark.parametrize("meta", [{"a": float("nan")}, {"a": object()}, {"a": torch.ones(1)}])
def test_meta_must_be_json(edit: AffineMap, meta: dict[str, object]) -> None:
    with pytest.raises(MechdiffError, match="not a JSON object"):
        edit.with_meta(**meta)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            (torch.zeros(()), normal(3, 2), normal(3, 3)),
            r"do not fit together.*left \[3, 2\], right \[3, 3\]",
        ),
        ((torch.zeros(2), normal(3, 3)), "do not fit together"),
        ((torch.ones(()), normal(3, 4)), "needs d_in = d_out"),
        ((torch.zeros(()), normal(3, 3)), "all float64 or all float32"),
        ((torch.zeros(()).double(), normal(3, 3) / 0), "left .* NaN or infinite"),
    ],
)
def test_weights_that_make_no_sense_are_refused(parts: tuple[torch.Tensor, ...], message: str) -> None:
    if "dtypes" not in message and "all float64" not in message:
        parts = tuple(t.double() for t in parts)
    with pytest.raises(MechdiffError, match=message):
        Weight(*parts)


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (normal(4), r"has the shape \[4\]; give \[8\]"),
        (normal(8).float(), "give one dtype"),
        (normal(8) / 0, "NaN or infinite"),
    ],
)
def test_means_that_make_no_sense_are_refused(edit: AffineMap, mean: torch.Tensor, message: str) -> None:
    with pytest.raises(MechdiffError, match=message):
        AffineMap(mean, edit.mean_out, edit.weight)


# Hostile files


def contents_of(m: AffineMap, **changes: object) -> dict[str, object]:
    content: dict[str, object] = torch.load(io.BytesIO(m.to_bytes()), weights_only=True)
    return {**content, **changes}


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load(folder: Path, content: bytes, suffix: str) -> AffineMap:
    (folder / f"map{suffix}").write_bytes(content)
    return AffineMap.load(folder / f"map{suffix}")


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never be printed",)


def test_a_pickle_payload_is_refused_unrun(
    edit: AffineMap, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (saved(contents_of(edit, left=Payload())), pickle.dumps(Payload())):
        with pytest.raises(MechdiffError, match=r"map\.pt is damaged, truncated or not a map"):
            load(tmp_path, content, ".pt")
    assert capsys.readouterr().out == ""


def test_a_shape_that_the_file_does_not_hold_is_refused(edit: AffineMap, tmp_path: Path) -> None:
    huge = torch.zeros((), dtype=torch.float64).expand(2**30, 2**30)
    # torch.save writes the one element there is; loading gives the 2^60 that are claimed.
    with pytest.raises(MechdiffError, match="left claims the shape"):
        load(tmp_path, saved(contents_of(edit, left=huge)), ".pt")


def test_a_zip_bomb_is_refused(edit: AffineMap, tmp_path: Path) -> None:
    deflated = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(contents_of(edit, left=torch.zeros(1000, 1000))))) as archive,
        zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    with pytest.raises(MechdiffError, match="unpacks to more than its own size"):
        load(tmp_path, deflated.getvalue(), ".pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": torch.full((8, 2), torch.nan).double()}, "left has NaN or infinite entries"),
        ({"left": torch.ones(8, 2).long()}, "it names torch.LongStorage"),
        ({"left": torch.ones(8, 2).double().to_sparse()}, "it names torch._utils._rebuild_sparse_tensor"),
        ({"left": "text"}, "left is not a plain tensor"),
        ({"left": normal(8, 3)}, r"is not a map: The parts .* left \[8, 3\]"),
        ({"mean_in": normal(7)}, "its parts do not fit together"),
        ({"extra": normal(7)}, "it holds diagonal, extra, left"),
        ({"metadata": "{"}, "damaged, truncated or not a map"),
        ({"metadata": "[]"}, "damaged, truncated or not a map"),
        ({"metadata": '{"format": "tuned-lens"}'}, "its format is 'tuned-lens'"),
        (
            {"metadata": '{"format": "mechdiff-map", "version": 2}'},
            "format version 2, and this mechdiff reads",
        ),
        ({"metadata": '{"format": "mechdiff-map", "version": 1}'}, "its alpha is no number"),
        *(
            (
                {"metadata": json.dumps({"format": "mechdiff-map", "version": 1, "alpha": a, "meta": m})},
                "not a map",
            )
            for a, m in [("x", {}), (-1, {}), (10**400, {}), (1, [1]), (float("nan"), {})]
        ),
    ],
)
def test_wrong_contents_say_what_is_wrong(
    edit: AffineMap, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(MechdiffError, match=message):
        load(tmp_path, saved(contents_of(edit, **changes)), ".pt")


@SUFFIXES
@given(st.binary(max_size=300))
def test_random_bytes_are_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
) -> None:
    with pytest.raises(MechdiffError, match="damaged, truncated or not a map"):
        load(tmp_path_factory.getbasetemp(), content, suffix)


@SUFFIXES
def test_every_truncation_is_refused(edit: AffineMap, tmp_path: Path, suffix: str) -> None:
    content = edit.to_bytes(suffix)
    for n in range(0, len(content), 7):
        with pytest.raises(MechdiffError, match="damaged, truncated or not a map"):
            load(tmp_path, content[:n], suffix)


@SUFFIXES
def test_flipped_bits_never_pass_as_another_kind_of_failure(
    edit: AffineMap, tmp_path: Path, suffix: str
) -> None:
    rng, content, n_refused = random.Random(0), edit.to_bytes(suffix), 0
    for _ in range(400):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        try:
            loaded = load(tmp_path, bytes(flipped), suffix)
            assert (loaded.d_in, loaded.d_out) == (8, 8)
        except MechdiffError:
            n_refused += 1
    assert n_refused > 0


def test_missing_file_and_unknown_suffix(edit: AffineMap, tmp_path: Path) -> None:
    with pytest.raises(MechdiffError, match=r"Cannot read the map .*none\.pt"):
        AffineMap.load(tmp_path / "none.pt")
    with pytest.raises(MechdiffError, match="Cannot write the map"):
        edit.save(tmp_path / "none" / "map.pt")
    for act in (AffineMap.load, edit.save):
        with pytest.raises(MechdiffError, match=r"as '\.npz'; name the file \.pt or \.safetensors"):
            act(tmp_path / "map.npz")


@pytest.mark.parametrize(
    "field", ["pair", "fingerprint", "solver", "dtype", "off_span", "site", "position", "k", "family"]
)
@pytest.mark.parametrize("value", [None, 3.5, True, [], {}, "", "\x1b[31m", "[/red]x", "x" * 5_000, "\ud800"])
@SUFFIXES
def test_what_a_map_says_of_itself_is_checked_field_by_field(
    tmp_path: Path, field: str, value: object, suffix: str
) -> None:
    made = AffineMap(normal(2), normal(2), Weight.from_dense(normal(2, 2)), meta={field: value})
    made.save(tmp_path / f"map{suffix}")
    with pytest.raises(MechdiffError, match=rf"is not valid: {field}") as caught:
        AffineMap.load(tmp_path / f"map{suffix}")
    assert len(str(caught.value)) < 1_000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "meta",
    [
        {"position": "everywhere"},
        {"site": "L1/nowhere"},
        {"k": "-1"},
        {"k": 0.5},
        {"family": "none"},
        {"rank": -1},
        {"n_rows": 10**30},
        {"shrink": float(10**300) * 10},
        {"ridge": "[/b]"},
        {"span_rank": "many"},
        {"directions": -4},
    ],
)
def test_unknown_values_of_meta_are_refused(tmp_path: Path, meta: dict[str, Any]) -> None:
    AffineMap(normal(2), normal(2), Weight.from_dense(normal(2, 2)), meta=meta).save(tmp_path / "map.pt")
    with pytest.raises(MechdiffError, match=rf"is not valid: {next(iter(meta))}.*fit it again"):
        AffineMap.load(tmp_path / "map.pt")


def test_good_and_foreign_fields_of_meta_are_kept(tmp_path: Path) -> None:
    meta = {
        "site": "L1/attn_out",
        "position": "decision",
        "k": 2,
        "family": "update",
        "mine": [1, {"a": None}],
    }
    made = AffineMap(normal(2), normal(2), Weight.from_dense(normal(2, 2)), meta=meta)
    made.save(tmp_path / "map.pt")
    assert AffineMap.load(tmp_path / "map.pt") == made


LAZY = {
    "negative bit": lambda x: torch._neg_view(-x),
    "conjugate": lambda x: torch.complex(0 * x, -x).conj().imag,
    "gradient": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "of a graph": lambda x: x.clone().requires_grad_() * 1,
    "transposed": lambda x: x.T.contiguous().T,
    "part of another": lambda x: torch.nn.functional.pad(x, (3, 3))[:, 3:-3],
}


@pytest.mark.parametrize("kind", LAZY)
@SUFFIXES
def test_tensors_of_lazy_kinds_are_their_numbers(tmp_path: Path, kind: str, suffix: str) -> None:
    x, mean = normal(4, 4), normal(4, seed=1)
    plain = AffineMap(mean, mean, Weight.from_dense(x))
    lazy = AffineMap(mean, mean, Weight.from_dense(LAZY[kind](x)))
    assert lazy == plain
    assert lazy.sha256() == plain.sha256()
    assert not lazy(normal(2, 4)).requires_grad
    lazy.save(tmp_path / f"map{suffix}")
    assert AffineMap.load(tmp_path / f"map{suffix}") == plain


def test_a_file_of_lazy_tensors_is_read_as_its_numbers_or_refused(tmp_path: Path) -> None:
    made = AffineMap(normal(4), normal(4, seed=1), Weight.from_dense(normal(4, 4, seed=2)))
    content = torch.load(io.BytesIO(made.to_bytes()), weights_only=True)
    for lazy in (LAZY["negative bit"], LAZY["gradient"]):
        torch.save({**content, "left": lazy(content["left"])}, tmp_path / "map.pt")
        with suppress(MechdiffError):
            assert AffineMap.load(tmp_path / "map.pt") == made


@pytest.mark.parametrize(
    "bad",
    [
        torch.empty(4, 4, dtype=torch.float64, device="meta"),
        normal(4, 4).to_sparse(),
        normal(4, 4).to_sparse_csr(),
        torch.ones(1, 1, dtype=torch.float64).expand(1 << 20, 1 << 20),
        torch.ones(4, 4, dtype=torch.int64),
        torch.ones(4, 4, dtype=torch.complex64),
        torch.full((4, 4), float("nan"), dtype=torch.float64),
        [[1.0]],
    ],
    ids=["meta", "sparse", "csr", "a terabyte by stride 0", "int", "complex", "NaN", "list"],
)
def test_tensors_that_are_no_numbers_in_memory_are_refused(bad: Any) -> None:
    with pytest.raises(MechdiffError):
        AffineMap(normal(4), normal(4), Weight.from_dense(bad))
    with pytest.raises(MechdiffError):
        AffineMap(bad, normal(4), Weight.from_dense(normal(4, 4)))


@pytest.mark.parametrize("alpha", ["1", True, 10**400, None, [], float("nan"), -1])
def test_an_alpha_that_is_no_number_is_refused(alpha: Any) -> None:
    with pytest.raises(MechdiffError, match="give a finite number that is not negative"):
        AffineMap(normal(2), normal(2), Weight.from_dense(normal(2, 2)), alpha)


@pytest.mark.parametrize("claim", ["one tensor", "bytes", "parts", "no metadata", "shapes"])
def test_a_sparse_file_of_gigabytes_is_refused_by_its_header(tmp_path: Path, claim: str) -> None:
    d, size = 20_000, 8 * 20_000 * 20_000
    text = json.dumps({"format": "mechdiff-map", "version": 1, "alpha": 1.0, "meta": {}})
    header: dict[str, Any] = {"__metadata__": {"metadata": text}}
    header["left"] = {"dtype": "F64", "shape": [d, d], "data_offsets": [0, size]}
    if claim in ("shapes", "no metadata"):
        header |= {
            n: {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]} for n in ("mean_in", "mean_out")
        }
        header["diagonal"] = {"dtype": "F64", "shape": [], "data_offsets": [0, 8]}
    if claim == "bytes":
        header["left"] = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    if claim == "parts":
        header["other"] = header.pop("left")
    if claim == "no metadata":
        del header["__metadata__"]
    content = json.dumps(header).encode()
    path = tmp_path / "map.safetensors"
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MechdiffError, match="not a map"):
        AffineMap.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
