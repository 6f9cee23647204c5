"""The hand-run predecessor's winners: a manifest of `.pt` bundles, read without unpickling, and written.

A bundle is a dictionary that `torch.save` wrote. With x a base activation and ε = 1e-6, it maps

    solver ridge, procrustes    ŷ = α·(((x − mu_b)/(sd_b + ε))·[Vb]·W·[Vtᵀ] ∘ sd_t + mu_t)
    solver procrustes_scaled    ŷ = α·(s·(x − mu_b)·Cb_invh·Q·Ct_h + mu_t)

Vb and Vt (or Vq, which is both) are the principal or logit subspaces that the first two may have been fitted
in. The α of the manifest counts, not the one in the bundle: it is what the numbers were measured with.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps import torch_zip
from mechdiff_mlflow.maps.affine import JSON, AffineMap, Weight
from mechdiff_mlflow.maps.files import MAX_BYTES
from mechdiff_mlflow.maps.meta import check_meta
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.digests import file_sha256
from mechdiff_mlflow.spec.pair_spec import Position
from mechdiff_mlflow.spec.sites import Hook, Site

MANIFEST = "manifest.json"
EPS = 1e-6
"""What the predecessor added to a standard deviation before dividing by it."""

_MAX_MANIFEST_BYTES = 1 << 20
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)  # in fields that a map does not need
_VECTORS = ("mu_b", "sd_b", "mu_t", "sd_t")
_MATRICES = ("W", "Q", "Cb_invh", "Ct_h", "Vb", "Vt", "Vq")
_OWN = "mechdiff"  # in bundles that we wrote: the map's meta, as JSON
_SITE = re.compile(rf"L(\d{{1,6}})_({'|'.join(map(str, Hook))})")

_Text = Annotated[str, Field(min_length=1, max_length=1000)]


class Winner(BaseModel):
    """A row of a manifest: the path of its bundle, as written, and α to patch with."""

    path: _Text
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Manifest(BaseModel):
    """Winners of a pair, by keys such as `L26_attn_out`.

    `pair` is a name, or the path of the predecessor's Python file, which is never run.
    """

    pair: _Text
    winners: Annotated[dict[str, Winner], Field(min_length=1, max_length=1000)]

    @property
    def pair_name(self) -> str:
        """`cultural` for `mechdiff/pairs/pair_cultural.py`."""
        return PurePosixPath(self.pair).stem.removeprefix("pair_") if "/" in self.pair else self.pair

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            MechdiffError: The file cannot be read or is not a manifest.
        """
        try:
            return cls.model_validate(
                untrusted.parse_json(untrusted.read_text(path, _MAX_MANIFEST_BYTES, "Manifest"))
            )
        except ValidationError as error:
            raise MechdiffError(f"{path} is not a manifest: {untrusted.explain(error)}.") from error
        except (ValueError, RecursionError) as error:
            raise MechdiffError(f"{path} is not JSON ({str(error)[:100]}); check the file.") from error


def bundle_file(root: Path, written: str) -> Path:
    """The file that the path `written` in a manifest names below `root`.

    Raises:
        MechdiffError: It would lie outside, by an absolute path, `..` or a link, or is no file.
    """
    path = untrusted.inside(root, written, "The manifest's path")
    if not untrusted.is_there(path) or not path.is_file():
        raise MechdiffError(
            f"There is no file {root / written}; correct the manifest, or name the folder that its paths "
            "start from with --root (the original experiment's start from where its commands ran: --root .)."
        )
    return path


def read_bundle(
    path: Path, *, alpha: float, key: str = "", position: Position = Position.DECISION
) -> AffineMap:
    """The map that a bundle stands for, in float64.

    Args:
        path: The bundle.
        alpha: To give the map.
        key: The winner's name, e.g. `L26_attn_out`: the site of a bundle that does not say its own.
        position: Which token the predecessor read; its `--k1_decision` is the decision token.

    Raises:
        MechdiffError: The file is no bundle, asks for code to be run, or its parts do not fit together.
    """
    bundle = _load(path)
    for name in filter(bundle.__contains__, (*_VECTORS, *_MATRICES)):
        bundle[name] = _tensor(path, name, bundle[name])
    solver = str(bundle.get("solver", ""))
    if solver not in _NEEDED:
        raise MechdiffError(f"Bundle {path} is of solver {solver!r}; those known are {', '.join(_NEEDED)}.")
    if missing := [name for name in ("mu_b", "mu_t", *_NEEDED[solver]) if name not in bundle]:
        raise MechdiffError(
            f"Bundle {path} of solver {solver} has no {', '.join(missing)} (it has {', '.join(bundle)}); "
            "export the map again."
        )
    meta = _meta(path, bundle, key, position)
    check_meta(meta, path)
    try:
        weight = _whitened(bundle) if solver == "procrustes_scaled" else _standardised(bundle)
        return AffineMap(bundle["mu_b"], bundle["mu_t"], weight, alpha, meta)
    except (RuntimeError, MechdiffError) as error:
        shapes = {name: list(t.shape) for name, t in bundle.items() if isinstance(t, Tensor)}
        raise MechdiffError(
            f"The parts of bundle {path} do not fit together ({shapes}): {str(error)[:200]}"
        ) from error


def bundle_bytes(the_map: AffineMap) -> bytes:
    """A bundle that maps like `the_map`, in the form that the predecessor applies as `ridge`.

    Raises:
        MechdiffError: The map does not say its site.
    """
    site = _site_of(the_map)
    ones = torch.ones(1, 1, dtype=torch.float64)
    bundle = {
        "layer": site.layer,
        "hook": str(site.hook),
        "solver": "ridge",
        "lam": None,
        "pca_q": 0,
        "logit_subspace": "0",
        "mu_b": the_map.mean_in.double()[None].clone(),
        "sd_b": (ones - EPS).expand(1, the_map.d_in).clone(),
        "mu_t": the_map.mean_out.double()[None].clone(),
        "sd_t": ones.expand(1, the_map.d_out).clone(),
        "W": the_map.dense().double().clone(),
        "alpha": the_map.alpha,
        _OWN: json.dumps(dict(the_map.meta), sort_keys=True),
    }
    buffer = io.BytesIO()
    torch.save(bundle, buffer)
    return buffer.getvalue()


def write_manifest(folder: Path, pair: str, maps: Mapping[str, AffineMap]) -> Path:
    """Write a pair's maps, by keys such as `L26_attn_out`, as bundles and a manifest; the manifest's path.

    Raises:
        MechdiffError: The folder is not empty or cannot be written.
    """
    winners = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise MechdiffError(f"The folder {folder} is not empty; name a new one.")
        (folder / "best").mkdir()
        for key, the_map in maps.items():
            file = folder / "best" / f"best_{key}.pt"
            file.write_bytes(bundle_bytes(the_map))
            winners[key] = {"path": f"best/{file.name}", "alpha": the_map.alpha}
        manifest = folder / MANIFEST
        manifest.write_text(json.dumps({"pair": pair, "winners": winners}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise MechdiffError(f"Cannot write {folder} ({error.strerror}); choose another place.") from error
    return manifest


def key_of(the_map: AffineMap) -> str:
    """What a map is called in a manifest: `L26_attn_out`."""
    site = _site_of(the_map)
    return f"L{site.layer}_{site.hook}"


def _site_of(the_map: AffineMap) -> Site:
    if "site" not in the_map.meta:
        raise MechdiffError("The map does not say its site; fit it again with mechdiff fit.")
    return Site.parse(str(the_map.meta["site"]))


def _load(path: Path) -> dict[str, Any]:
    """The dictionary in a bundle, without the entries that are None."""
    try:
        loaded = torch_zip.load(path, MAX_BYTES, (*_FLOATS, *_INTEGERS))
    except Exception as error:  # the libraries' readers raise many kinds on hostile bytes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MechdiffError(
            f"{path} is damaged, truncated or no bundle ({reason}); if you trust where it comes from, save "
            "it again with torch.save."
        ) from error
    return {name: value for name, value in loaded.items() if value is not None}


def _tensor(path: Path, name: str, value: object) -> Tensor:
    """A vector or matrix of a bundle in float64; vectors may be saved as [1, d]."""
    if type(value) is not Tensor or value.layout != torch.strided or value.dtype not in _FLOATS:
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise MechdiffError(f"{name} of bundle {path} is {kind}, not a plain floating-point tensor.")
    if name in _VECTORS and value.ndim == 2 and value.shape[0] == 1:
        value = value[0]
    if value.ndim != (1 if name in _VECTORS else 2):
        wanted = "[d] or [1, d]" if name in _VECTORS else "two axes"
        raise MechdiffError(f"{name} of bundle {path} has the shape {list(value.shape)}, not {wanted}.")
    return value.to(torch.float64, copy=True)


def _standardised(bundle: Mapping[str, Any]) -> Weight:
    """W between z-scores as W between activations."""
    weight: Tensor = bundle["W"]
    for mean, deviation in (("mu_b", "sd_b"), ("mu_t", "sd_t")):
        if bundle[mean].shape != bundle[deviation].shape:
            raise MechdiffError(f"{mean} and {deviation} differ in length.")
    if "Vq" in bundle and weight.shape[0] == bundle["Vq"].shape[1]:
        weight = bundle["Vq"] @ weight @ bundle["Vq"].mT
    elif "Vb" in bundle and "Vt" in bundle:
        weight = bundle["Vb"] @ weight @ bundle["Vt"].mT
    return Weight.from_dense(weight * bundle["sd_t"] / (bundle["sd_b"] + EPS)[:, None])


def _whitened(bundle: Mapping[str, Any]) -> Weight:
    """Whiten, turn and scale, colour."""
    scale, turn = _scale(bundle), bundle["Q"]
    if (k := _rank_of_turn(turn)) is None:
        return Weight.from_dense(scale * (bundle["Cb_invh"] @ turn @ bundle["Ct_h"]))
    # Rounded to float32 a truncated Q has full rank; its range is that of Q times any k directions.
    probe = torch.randn(turn.shape[1], k, dtype=turn.dtype, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(turn @ probe).Q
    return Weight.low_rank(scale * (bundle["Cb_invh"] @ basis), basis.mT @ turn @ bundle["Ct_h"])


def _rank_of_turn(turn: Tensor) -> int | None:
    """The rank of a truncated Q, None for a full one: its singular values are 1 and 0, so it is ‖Q‖²."""
    size = float(turn.square().sum())
    k = round(size)
    return k if abs(size - k) < 0.01 and 0 < k < min(turn.shape) else None


def _scale(bundle: Mapping[str, Any]) -> float:
    scale = bundle.get("s", 1.0)
    if isinstance(scale, Tensor) and scale.numel() == 1:
        scale = scale.item()
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise MechdiffError(f"The scale s is {str(scale)[:50]}, not a finite number.")
    return float(scale)


_NEEDED = {
    "ridge": ("sd_b", "sd_t", "W"),
    "procrustes": ("sd_b", "sd_t", "W"),
    "procrustes_scaled": ("Q", "Cb_invh", "Ct_h"),
}


def _meta(path: Path, bundle: Mapping[str, Any], key: str, position: Position) -> dict[str, JSON]:
    meta: dict[str, JSON] = {
        "solver": str(bundle["solver"]),
        "family": "content",
        "k": _rank(bundle),
        "position": str(position),
        "bundle_sha256": file_sha256(path),
    }
    asked = bundle.get("pca_q") or 0
    if str(asked) not in ("0", meta["k"]):
        meta["pca_q_ignored"] = str(asked)
    try:
        meta |= dict(json.loads(bundle.get(_OWN, "{}")))  # what we wrote into a bundle of ours
    except (TypeError, ValueError, RecursionError) as error:
        raise MechdiffError(f"{_OWN!r} of bundle {path} is not JSON; export the map again.") from error
    return meta | {"site": str(_bundle_site(path, bundle, key))}


def _bundle_site(path: Path, bundle: Mapping[str, Any], key: str) -> Site:
    match = _SITE.fullmatch(key)
    named = Site(int(match[1]), Hook.parse(match[2])) if match else None
    layer, hook = bundle.get("layer"), bundle.get("hook")
    if not isinstance(layer, int) or not isinstance(hook, str):
        if named is None:
            raise MechdiffError(
                f"Bundle {path} does not say its layer and hook; call the winner e.g. L26_attn_out."
            )
        return named
    site = Site(layer, Hook.parse(hook))
    if named is not None and named != site:
        raise MechdiffError(
            f"Winner {key} is a map of {site} by its bundle {path}; correct the manifest's name or path."
        )
    return site


def _rank(bundle: Mapping[str, Any]) -> str:
    """rank(W) as text."""
    if bundle["solver"] == "procrustes_scaled":
        return str(_rank_of_turn(bundle["Q"]) or "full")
    width = min(bundle["mu_b"].shape[0], bundle["mu_t"].shape[0])
    return str(min(bundle["W"].shape)) if min(bundle["W"].shape) < width else "full"
