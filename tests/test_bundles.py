"""The predecessor's bundles: the same outputs as its own formula, and nothing in them is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap, Weight
from mechdiff_mlflow.tracking.predecessor.bundles import (
    EPS,
    Manifest,
    bundle_file,
    key_of,
    read_bundle,
    write_manifest,
)

D = 7


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bundle(solver: str, **changes: Any) -> dict[str, Any]:
    """What the predecessor saved: float32, means and deviations [1, d], None for what a solver has not."""
    parts: dict[str, Any] = {
        "layer": 26,
        "solver": solver,
        "lam": None,
        "hook": "attn_out",
        "pca_q": 0,
        "logit_subspace": "0",
        "mu_b": rows(1, D, seed=1),
        "sd_b": rows(1, D, seed=2).abs() + 0.1,
        "mu_t": rows(1, D, seed=3),
        "sd_t": rows(1, D, seed=4).abs() + 0.1,
        "W": None if solver == "procrustes_scaled" else rows(D, D, seed=5),
        "Vb": None,
        "Vt": None,
        "Vq": None,
    }
    if solver == "procrustes":
        parts["W"] = torch.linalg.qr(rows(D, D, seed=5)).Q
    if solver == "procrustes_scaled":
        spread_b, spread_t = (rows(D, D, seed=s) for s in (6, 7))
        parts |= {
            "Cb_invh": spread_b @ spread_b.T,
            "Ct_h": spread_t @ spread_t.T,
            "Q": torch.linalg.qr(rows(D, D, seed=8)).Q,
            "s": 0.83,
            "alpha": 1.7,
        }
    return parts | changes


def seed_apply(parts: dict[str, Any], h_b: Tensor, alpha: float) -> Tensor:
    """The predecessor's own arithmetic, in float64: standardise or whiten, map, undo, then α on all of it."""
    p = {key: value.double() if isinstance(value, Tensor) else value for key, value in parts.items()}
    if p["solver"] == "procrustes_scaled":
        whitened = (h_b - p["mu_b"]) @ p["Cb_invh"]
        mapped = ((whitened @ p["Q"]) * p["s"]) @ p["Ct_h"] + p["mu_t"]
    else:
        z = (h_b - p["mu_b"]) / (p["sd_b"] + EPS)
        if p["Vq"] is not None:
            z_hat = ((z @ p["Vq"]) @ p["W"]) @ p["Vq"].T
        elif p["Vb"] is not None:
            z_hat = ((z @ p["Vb"]) @ p["W"]) @ p["Vt"].T
        else:
            z_hat = z @ p["W"]
        mapped = z_hat * p["sd_t"] + p["mu_t"]
    return mapped * alpha


def saved(folder: Path, content: object, name: str = "map.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


FORMS = {
    "ridge": bundle("ridge"),
    "procrustes": bundle("procrustes"),
    "procrustes_scaled": bundle("procrustes_scaled"),
    "procrustes_scaled of rank 2": bundle(
        "procrustes_scaled",
        Q=torch.linalg.qr(rows(D, D, seed=8)).Q[:, :2] @ torch.linalg.qr(rows(D, D, seed=9)).Q[:, :2].T,
        pca_q=2,
    ),
    "ridge in principal components": bundle(
        "ridge",
        W=rows(3, 3, seed=5),
        Vb=torch.linalg.qr(rows(D, D, seed=10)).Q[:, :3],
        Vt=torch.linalg.qr(rows(D, D, seed=11)).Q[:, :3],
        pca_q=3,
    ),
    "procrustes in a logit subspace": bundle(
        "procrustes",
        W=torch.linalg.qr(rows(3, 3, seed=5)).Q,
        Vq=torch.linalg.qr(rows(D, D, seed=10)).Q[:, :3],
        logit_subspace="3",
    ),
    "means without the first axis": bundle("ridge", mu_b=rows(D, seed=1), sd_t=rows(D, seed=4).abs() + 0.1),
    "in half precision": {
        key: value.half() if isinstance(value, Tensor) else value for key, value in bundle("ridge").items()
    },
}
RANKS = {
    "procrustes_scaled of rank 2": "2",
    "ridge in principal components": "3",
    "procrustes in a logit subspace": "3",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_bundle_becomes_a_map_with_the_same_outputs(tmp_path: Path, form: str) -> None:
    path = saved(tmp_path, FORMS[form])
    the_map = read_bundle(path, alpha=0.3, key="L26_attn_out")
    x = rows(50, D, seed=99).double() * 3
    torch.testing.assert_close(the_map(x), seed_apply(FORMS[form], x, 0.3), rtol=1e-6, atol=1e-6)
    meta = {"site": "L26/attn_out", "k": RANKS.get(form, "full"), "family": "content", "position": "decision"}
    assert meta.items() <= the_map.meta.items()
    if the_map.meta["k"] != "full":
        the_map.check_rank(int(str(the_map.meta["k"])), "content")


def test_the_manifests_alpha_counts_and_not_the_bundles(tmp_path: Path) -> None:
    the_map = read_bundle(saved(tmp_path, bundle("procrustes_scaled")), alpha=0.7)
    assert the_map.alpha == 0.7


def test_a_rank_that_was_asked_for_and_ignored_is_said(tmp_path: Path) -> None:
    the_map = read_bundle(saved(tmp_path, bundle("procrustes_scaled", pca_q=2)), alpha=1)
    assert (the_map.meta["k"], the_map.meta["pca_q_ignored"]) == ("full", "2")


def test_the_site_comes_from_the_bundle_or_the_name(tmp_path: Path) -> None:
    old = saved(tmp_path, bundle("ridge", hook=None))
    assert read_bundle(old, alpha=1, key="L24_resid_post").meta["site"] == "L24/resid_post"
    with pytest.raises(MechdiffError, match="does not say its layer and hook; call the winner"):
        read_bundle(old, alpha=1, key="mine")
    with pytest.raises(MechdiffError, match="L24_resid_post is a map of L26/attn_out by its bundle"):
        read_bundle(saved(tmp_path, bundle("ridge")), alpha=1, key="L24_resid_post")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bundle("lasso"), "is of solver 'lasso'; those known are ridge"),
        (bundle("ridge", W=None), "has no W"),
        (bundle("procrustes_scaled", Q=None), "has no Q"),
        (bundle("procrustes_scaled", s=float("nan")), "scale s is nan"),
        (bundle("ridge", W=rows(3, 3)), "do not fit together"),
        (bundle("ridge", sd_t=rows(1, 1)), "mu_t and sd_t differ in length"),
        (bundle("ridge", mu_t=rows(1, 3)), "do not fit together|differ in length"),
        (bundle("ridge", mu_b=rows(2, D)), r"mu_b of bundle .* has the shape \[2, 7\]"),
        (bundle("ridge", W=rows(D, D).long()), "W of bundle .* is a tensor of torch.int64"),
        (bundle("ridge", W=[1.0]), "W of bundle .* is a list"),
        (bundle("ridge", W=rows(D, D) / 0), "NaN or infinite"),
        (bundle("ridge", W=torch.zeros(1).expand(10**6, 10**6)), "claims the shape .* more than the file"),
        (bundle("ridge", hook="elsewhere"), "'elsewhere' is unknown"),
        ([1, 2], "it holds no dictionary"),
        ({1: 2}, "it holds no dictionary"),
    ],
)
def test_a_wrong_bundle_is_refused(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(MechdiffError, match=words):
        read_bundle(saved(tmp_path, content), alpha=1)


class Evil:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(folder: Path) -> dict[str, Path]:
    """Files that do harm when they are unpickled, by what they try."""
    trace = str(folder / "trace")
    content = {
        "a command": Evil(os.system, f"touch {trace}"),
        "code": Evil(eval, f"open({trace!r}, 'w')"),
        "a huge buffer": Evil(bytearray, 1 << 50),
        "a file": Evil(open, trace, "w"),
    }
    paths = {}
    for index, (name, evil) in enumerate(content.items()):
        paths[name] = saved(folder, bundle("ridge", W=evil), f"{index}.pt")
        paths[f"{name}, as a bare pickle"] = folder / f"{index}.pkl.pt"
        paths[f"{name}, as a bare pickle"].write_bytes(pickle.dumps(bundle("ridge", W=evil), protocol=4))
    return paths


HARM = ("a command", "code", "a huge buffer", "a file")


@pytest.mark.parametrize("what", [*HARM, *(f"{harm}, as a bare pickle" for harm in HARM)])
def test_nothing_in_a_bundle_is_run(tmp_path: Path, what: str) -> None:
    path = hostile(tmp_path)[what]
    words = "damaged, truncated or no bundle" if "bare" in what else "it names .*; nothing was run"
    with pytest.raises(MechdiffError, match=words):
        read_bundle(path, alpha=1)
    assert not (tmp_path / "trace").exists()


def repacked(path: Path, change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: change(entry.filename, old.read(entry)) for entry in old.infolist()}
    target = path.with_name("repacked.pt")
    with zipfile.ZipFile(target, "w", method) as new:
        for name, content in entries.items():
            new.writestr(name, content)
    return target


def test_a_bundle_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, bundle("ridge", W=torch.zeros(500, 500)))
    packed = repacked(path, lambda _, content: content, zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < 20_000
    with pytest.raises(MechdiffError, match="unpacks to more than its own size"):
        read_bundle(packed, alpha=1)


def test_a_shape_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, bundle("ridge"))
    n_elements, shape = b"K" + struct.pack("B", D * D), b"K\x07K\x07\x86"  # of W, as torch writes them

    def claim(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        assert n_elements in content
        assert shape in content
        content = content.replace(n_elements, b"J" + struct.pack("<i", 1 << 30))
        side = b"J" + struct.pack("<i", 1 << 15)
        return content.replace(shape, side + side + b"\x86")

    with pytest.raises(MechdiffError, match=r"damaged, truncated|claims the shape"):
        read_bundle(repacked(path, claim), alpha=1)


def test_a_damaged_or_truncated_bundle_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, bundle("ridge"))
    whole = path.read_bytes()
    at = whole.index(bundle("ridge")["W"].numpy().tobytes())
    changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for content in (whole[: len(whole) // 2], b"", b"not a zip", changed):
        path.write_bytes(content)
        with pytest.raises(MechdiffError, match=r"damaged, truncated or no bundle"):
            read_bundle(path, alpha=1)


@pytest.mark.parametrize(
    "written", ["/etc/passwd", "../map.pt", "a/../../map.pt", "C:\\map.pt", "\\\\host\\map.pt", "a\0b"]
)
def test_paths_that_may_leave_the_folder_are_refused(tmp_path: Path, written: str) -> None:
    (tmp_path / "map.pt").write_bytes(b"x")
    (tmp_path / "root").mkdir()
    with pytest.raises(MechdiffError, match=r"lies outside|There is no file"):
        bundle_file(tmp_path / "root", written)


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (tmp_path / "map.pt").write_bytes(b"x")
    (root / "in" / "own.pt").write_bytes(b"x")
    (root / "out.pt").symlink_to(tmp_path / "map.pt")
    (root / "up").symlink_to(tmp_path)
    (root / "alias.pt").symlink_to(root / "in" / "own.pt")
    for written in ("out.pt", "up/map.pt"):
        with pytest.raises(MechdiffError, match="lies outside"):
            bundle_file(root, written)
    assert bundle_file(root, "alias.pt") == (root / "in" / "own.pt").resolve()
    for written in ("in", "none.pt"):
        with pytest.raises(MechdiffError, match=r"There is no file .* with --root"):
            bundle_file(root, written)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a manifest: Input should be a valid dictionary"),
        ('{"pair": "p", "winners": {}}', "winners: Dictionary should have at least 1 item"),
        ('{"pair": "p", "winners": {"a": {"path": "x"}}}', "winners.a.alpha: Field required"),
        ('{"pair": "p", "winners": {"a": {"path": "x", "alpha": NaN}}}', "NaN is not a number"),
        ('{"pair": "p", "winners": {"a": {"path": "x", "alpha": -1}}}', "winners.a.alpha: Input should be"),
        (" " * (1 << 20) + "{}", "over 1048576"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(MechdiffError, match=words):
        Manifest.load(tmp_path / "manifest.json")
    with pytest.raises(MechdiffError, match=r"Manifest .* cannot be read"):
        Manifest.load(tmp_path / "none.json")


def test_the_pair_of_a_manifest_has_a_name() -> None:
    winners = {"L26_attn_out": {"path": "map.pt", "alpha": 1}}
    for pair, name in (("mechdiff/pairs/pair_cultural.py", "cultural"), ("cultural-demo", "cultural-demo")):
        assert Manifest.model_validate({"pair": pair, "winners": winners}).pair_name == name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_written_is_read_back_as_the_same_map(tmp_path: Path, dtype: torch.dtype) -> None:
    meta = {"site": "L24/resid_post", "solver": "reduced_rank", "family": "update", "k": "2"}
    weight = Weight.low_rank(rows(D, 2, seed=1).to(dtype), rows(2, D, seed=2).to(dtype), 1.0)
    the_map = AffineMap(rows(D, seed=3).to(dtype), rows(D, seed=4).to(dtype), weight, 0.7, meta)
    path = write_manifest(tmp_path / "out", "demo", {key_of(the_map): the_map})
    manifest = Manifest.load(path)
    assert json.loads(path.read_text())["winners"] == {
        "L24_resid_post": {"path": "best/best_L24_resid_post.pt", "alpha": 0.7}
    }
    winner = manifest.winners["L24_resid_post"]
    file = bundle_file(path.parent, winner.path)
    again = read_bundle(file, alpha=winner.alpha, key="L24_resid_post")
    x = rows(20, D, seed=9).double()
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(again(x), the_map(x), rtol=tolerance, atol=tolerance)
    assert meta.items() <= again.meta.items()
    # The predecessor's own reading of the file gives the same.
    parts = {"Vq": None, "Vb": None} | torch.load(io.BytesIO(file.read_bytes()), weights_only=True)
    torch.testing.assert_close(seed_apply(parts, x, 0.7), again(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(MechdiffError, match="is not empty; name a new one"):
        write_manifest(path.parent, "demo", {key_of(the_map): the_map})
