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
import pickletools
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps import files as mapfiles
from mechdiff_mlflow.maps.affine import JSON, AffineMap, Weight
from mechdiff_mlflow.maps.meta import check_meta
from mechdiff_mlflow.spec import untrusted
from mechdiff_mlflow.spec.digests import file_sha256
from mechdiff_mlflow.spec.pair_spec import Position, explain
from mechdiff_mlflow.spec.sites import Hook, Site

MANIFEST = "manifest.json"
EPS = 1e-6
"""What the predecessor added to a standard deviation before dividing by it."""

_MAX_MANIFEST_BYTES = 1 << 20
_MAX_PICKLE_BYTES = 1 << 20
_MAX_ENTRIES = 100
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_VECTORS = ("mu_b", "sd_b", "mu_t", "sd_t")
_MATRICES = ("W", "Q", "Cb_invh", "Ct_h", "Vb", "Vt", "Vq")
_OWN = "mechdiff"  # in bundles that we wrote: the map's meta, as JSON
# What torch.save needs to write a dictionary of plain tensors.
_GLOBALS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | {
    f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int")
}
_CALLING = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "STACK_GLOBAL", "BUILD"}
_SITE = re.compile(r"L(\d{1,6})_(\w+)")


@dataclass(frozen=True, slots=True)
class Winner:
    """A row of a manifest.

    Args:
        key: What it is called there, e.g. `L26_attn_out`.
        path: Of its bundle, as written.
        alpha: To patch with.
    """

    key: str
    path: str
    alpha: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """Winners of a pair.

    Args:
        pair: As written: a name, or the path of the predecessor's Python file, which is never run.
        winners: In the order of the file.
    """

    pair: str
    winners: tuple[Winner, ...]

    @property
    def pair_name(self) -> str:
        """`cultural` for `mechdiff/pairs/pair_cultural.py`."""
        return PurePosixPath(self.pair).stem.removeprefix("pair_") if "/" in self.pair else self.pair

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest.

        Raises:
            MechdiffError: The file cannot be read or is not a manifest.
        """
        try:
            untrusted.size_of(Path(path), sys.maxsize)
            with Path(path).open("rb") as file:
                content = file.read(_MAX_MANIFEST_BYTES + 1)
            if len(content) > _MAX_MANIFEST_BYTES:
                raise MechdiffError(f"{path} is over {_MAX_MANIFEST_BYTES} bytes; a manifest is a page.")
            form = _ManifestForm.model_validate(untrusted.parse_json(content))
        except OSError as error:
            raise MechdiffError(
                f"Cannot read the manifest {path} ({error.strerror}); check the path."
            ) from error
        except ValidationError as error:
            raise MechdiffError(f"{path} is not a manifest: {explain(error)}.") from error
        except (ValueError, RecursionError) as error:
            raise MechdiffError(f"{path} is not JSON ({str(error)[:100]}); check the file.") from error
        return cls(form.pair, tuple(Winner(key, w.path, w.alpha) for key, w in form.winners.items()))


class _WinnerForm(BaseModel):
    model_config = ConfigDict(extra="ignore")

    path: Annotated[str, Field(min_length=1, max_length=1000)]
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _ManifestForm(BaseModel):
    model_config = ConfigDict(extra="ignore")

    pair: Annotated[str, Field(min_length=1, max_length=1000)]
    winners: Annotated[dict[str, _WinnerForm], Field(min_length=1, max_length=1000)]


def bundle_file(root: Path, written: str) -> Path:
    """The file that the path `written` in a manifest names below `root`.

    Raises:
        MechdiffError: It would lie outside, by an absolute path, `..` or a link, or is no file.
    """
    root = root.resolve()
    parts = PurePosixPath(written).parts
    windows = PureWindowsPath(written)
    if "\0" in written or windows.drive or windows.root or "\\" in written or ".." in parts:
        raise MechdiffError(
            f"Path {written!r} of the manifest may leave {root}; write it relative to that folder, or name "
            "the folder that paths start from with --root."
        )
    try:
        path = (root / written).resolve()
        there = path.is_file()
    except (OSError, RuntimeError):  # a loop of links, too long a name
        path, there = root, False
    if not path.is_relative_to(root):
        raise MechdiffError(f"Path {written!r} of the manifest is a link that leaves {root}; copy the file.")
    if not there:
        raise MechdiffError(
            f"There is no file {root / written}; correct the manifest, or name the folder that its paths "
            "start from with --root (the seed's start from where its commands were run: --root .)."
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
    for name in _VECTORS:
        if name in bundle:
            bundle[name] = _vector(path, name, bundle[name])
    for name in _MATRICES:
        if name in bundle:
            bundle[name] = _matrix(path, name, bundle[name])
    solver = str(bundle.get("solver", ""))
    if solver not in _WEIGHTS:
        raise MechdiffError(f"Bundle {path} is of solver {solver!r}; those known are {', '.join(_WEIGHTS)}.")
    needed = ("mu_b", "mu_t", *_NEEDED[solver])
    missing = [name for name in needed if not isinstance(bundle.get(name), Tensor)]
    if missing:
        raise MechdiffError(
            f"Bundle {path} of solver {solver} has no {', '.join(missing)} (it has {', '.join(bundle)}); "
            "export the map again."
        )
    meta = _meta(path, bundle, key, position)
    meta |= {name: value for name, value in _own_meta(path, bundle).items() if name != "site"}
    check_meta(meta, path)
    try:
        weight = _WEIGHTS[solver](bundle)
        the_map = AffineMap(bundle["mu_b"], bundle["mu_t"], weight, alpha, meta)
    except (RuntimeError, MechdiffError) as error:
        shapes = {name: list(t.shape) for name, t in bundle.items() if isinstance(t, Tensor)}
        raise MechdiffError(
            f"The parts of bundle {path} do not fit together ({shapes}): {str(error)[:200]}"
        ) from error
    return the_map


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
    """Write maps as bundles below `folder`, and the manifest that lists them; its path.

    Args:
        folder: New or empty.
        pair: Their pair.
        maps: By key, e.g. `L26_attn_out`.

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
    """The dictionary in a bundle, its tensors still in the file."""
    try:
        _check_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
            raise ValueError("it holds no dictionary")
    except MechdiffError:
        raise
    except Exception as error:  # the libraries' readers raise many kinds on hostile bytes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MechdiffError(
            f"{path} is damaged, truncated or no bundle ({reason}); save it again with torch.save."
        ) from error
    return {name: value for name, value in loaded.items() if value is not None}


def _check_file(path: Path) -> None:
    """Look at a file before anything in it is believed: sizes, checksums, and what its pickle asks for."""
    untrusted.size_of(path, mapfiles.MAX_BYTES)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > _MAX_ENTRIES or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise ValueError("it is no archive that torch.save writes")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("it unpacks to more than its own size")
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise ValueError("it has no plain table of contents")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} does not match")
        contents = archive.read(pickles[0])
    for opcode, argument, _ in pickletools.genops(contents):
        asked = str(argument) if opcode.name == "GLOBAL" else opcode.name
        if opcode.name in _CALLING or (opcode.name == "GLOBAL" and asked not in _GLOBALS):
            raise MechdiffError(
                f"{path} asks to run {asked.replace(' ', '.')}, which a map has no use for; nothing was run. "
                "Do not trust where it comes from."
            )


def _plain(path: Path, name: str, value: object) -> Tensor:
    if type(value) is not Tensor or value.layout != torch.strided or value.dtype not in _FLOATS:
        kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise MechdiffError(f"{name} of bundle {path} is {kind}, not a plain floating-point tensor.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise MechdiffError(
            f"{name} of bundle {path} claims the shape {list(value.shape)}, more than the file holds."
        )
    return value


def _vector(path: Path, name: str, value: object) -> Tensor:
    vector = _plain(path, name, value)
    if vector.ndim == 2 and vector.shape[0] == 1:
        vector = vector[0]
    if vector.ndim != 1:
        raise MechdiffError(f"{name} of bundle {path} has the shape {list(vector.shape)}, not [d] or [1, d].")
    return vector.to(torch.float64, copy=True)


def _matrix(path: Path, name: str, value: object) -> Tensor:
    matrix = _plain(path, name, value)
    if matrix.ndim != 2:
        raise MechdiffError(f"{name} of bundle {path} has the shape {list(matrix.shape)}, not two axes.")
    return matrix.to(torch.float64, copy=True)


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


_WEIGHTS = {"ridge": _standardised, "procrustes": _standardised, "procrustes_scaled": _whitened}
_NEEDED = {
    "ridge": ("sd_b", "sd_t", "W"),
    "procrustes": ("sd_b", "sd_t", "W"),
    "procrustes_scaled": ("Q", "Cb_invh", "Ct_h"),
}


def _meta(path: Path, bundle: Mapping[str, Any], key: str, position: Position) -> dict[str, JSON]:
    meta: dict[str, JSON] = {
        "site": str(_bundle_site(path, bundle, key)),
        "solver": str(bundle["solver"]),
        "family": "content",
        "k": _rank(bundle),
        "position": str(position),
        "bundle_sha256": file_sha256(path),
    }
    asked = bundle.get("pca_q") or 0
    if str(asked) not in ("0", meta["k"]):
        meta["pca_q_ignored"] = str(asked)
    return meta


def _bundle_site(path: Path, bundle: Mapping[str, Any], key: str) -> Site:
    match = _SITE.fullmatch(key)
    named = Site(int(match[1]), Hook.parse(match[2])) if match and match[2] in set(map(str, Hook)) else None
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


def _own_meta(path: Path, bundle: Mapping[str, Any]) -> dict[str, JSON]:
    """What we wrote of the map into a bundle of ours."""
    try:
        own = json.loads(bundle.get(_OWN, "{}"))
        return dict(own)
    except (TypeError, ValueError, RecursionError) as error:
        raise MechdiffError(f"{_OWN!r} of bundle {path} is not JSON; export the map again.") from error
