"""How a map lies in a file: plain tensors and one JSON string, in torch's zip or in safetensors.

The bytes depend on the content alone, and are read without running anything that is in them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps import torch_zip
from mechdiff_mlflow.spec import untrusted

FORMAT = "mechdiff-map"
VERSION = 1
MAX_BYTES = 4 << 30
"""Of a map's file: one dense float64 map of width 16384 takes half of it."""

PARTS = ("mean_in", "mean_out", "diagonal", "left", "right")
"""The tensors of a map; `right` may be missing."""
_MAX_HEADER = 4 << 20
_MAX_TENSORS = 100


def encode(tensors: Mapping[str, Tensor], header: Mapping[str, Any], suffix: str) -> bytes:
    """The bytes of a file holding `tensors` and the JSON-able `header`, as `.pt` or `.safetensors`."""
    # A clone owns just its own elements: torch.save would write the whole storage behind a view.
    own = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = json.dumps({"format": FORMAT, "version": VERSION, **header}, sort_keys=True, allow_nan=False)
    if suffix == ".safetensors":
        return bytes(safetensors.torch.save(own, {"metadata": text}))
    if suffix == ".pt":
        # In memory, because torch names the zip's folder after the file it writes to.
        buffer = io.BytesIO()
        torch.save({**own, "metadata": text}, buffer)
        return buffer.getvalue()
    raise _unknown_suffix(suffix)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a file that `write` made, checked as far as this module knows them.

    Raises:
        MechdiffError: The file is missing, truncated, damaged, not a map, or of another version.
    """
    path = Path(path)
    if path.suffix not in _DECODERS:
        raise _unknown_suffix(path.suffix)
    try:
        tensors, text = _DECODERS[path.suffix](path)
        header = untrusted.parse_json(text)
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is {header.get('format')!r:.80}, not {FORMAT!r}")
    except OSError as error:
        raise MechdiffError(f"Cannot read the map {path} ({error.strerror}); check the path.") from error
    except Exception as error:  # the libraries' readers raise many kinds on hostile bytes
        raise _not_a_map(path, error) from error
    if header.get("version") != VERSION:
        raise MechdiffError(
            f"{path} is a map of format version {header.get('version')!r:.80}, and this mechdiff reads "
            f"version {VERSION}; use the version of mechdiff that wrote it, or fit the map again."
        )
    return tensors, header


def read_plain_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a small safetensors file, finite float64 or float32; refuses others."""
    try:
        return _decode_safetensors(path, is_map=False)[0]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise MechdiffError(f"{path} holds no plain tensors ({reason}); fetch it again.") from error


def plain_tensor(what: str, t: object) -> Tensor:
    """A dense tensor of credible size as numbers in memory: without gradients and lazy views."""
    if (
        not isinstance(t, Tensor)
        or t.layout != torch.strided
        or t.device.type == "meta"
        or t.is_quantized
        or t.is_nested
    ):
        kind = f"{t.layout} on {t.device}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
        raise MechdiffError(f"{what} is {kind}; give a dense tensor that has data.")
    if t.numel() * t.element_size() > max(MAX_BYTES, t.untyped_storage().nbytes()):
        raise MechdiffError(f"{what} has the shape {list(t.shape)}, over {MAX_BYTES} bytes; map less.")
    return t.detach().resolve_conj().resolve_neg() if t.requires_grad or t.is_neg() or t.is_conj() else t


def own_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `meta` that is what a file would give back."""
    try:
        copy = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise MechdiffError(f"The map's meta is not a JSON object ({error}); give plain values.") from error
    assert isinstance(copy, dict)
    return copy


def _decode_pt(path: Path) -> tuple[dict[str, Tensor], Any]:
    loaded = torch_zip.load(path, MAX_BYTES)
    text = loaded.pop("metadata", None)
    _check_tensors(loaded)
    _check_shapes({name: list(t.shape) for name, t in loaded.items()})
    return loaded, text


def _decode_safetensors(path: Path, is_map: bool = True) -> tuple[dict[str, Tensor], Any]:
    size = untrusted.size_of(path, MAX_BYTES)
    with path.open("rb") as file:
        header = untrusted.safetensors_header(file, size, _MAX_HEADER)
        metadata = header.pop("__metadata__", {})
        dtypes = {entry["dtype"] for entry in header.values()}
        if len(header) > _MAX_TENSORS or not dtypes <= {"F64", "F32"}:
            raise ValueError(f"it holds over {_MAX_TENSORS} tensors, or others than F64 and F32")
        if is_map:  # what the header claims is then worth reading
            _check_shapes({name: entry["shape"] for name, entry in header.items()})
        file.seek(0)
        loaded = safetensors.torch.load(file.read(size))
    _check_tensors(loaded)
    return loaded, metadata.get("metadata")


def _check_shapes(shapes: Mapping[str, list[int]]) -> None:
    """Raise ValueError unless these are the shapes of a map's parts."""
    if not {*PARTS[:4]} <= shapes.keys() <= {*PARTS}:
        raise ValueError(f"it holds {', '.join(sorted(shapes))[:100]}")
    left = shapes["left"]
    ends = [left[:1], shapes.get("right", left)[1:]]
    if [shapes["mean_in"], shapes["mean_out"]] != ends or shapes["diagonal"] not in ([], ends[0]):
        raise ValueError(f"its parts do not fit together: {shapes}")


_DECODERS = {".pt": _decode_pt, ".safetensors": _decode_safetensors}


def _check_tensors(loaded: Mapping[str, object]) -> None:
    """Raise ValueError unless every value is a dense, finite tensor in memory."""
    for name, t in loaded.items():
        if type(t) is not Tensor or t.layout != torch.strided or t.device.type != "cpu":
            raise ValueError(f"{name} is not a plain tensor")
        if t.dtype not in torch_zip.BOTH_FLOATS:
            raise ValueError(f"{name} is {t.dtype}, not float64 or float32")
        if not t.is_contiguous():  # a stride of 0 lets a few bytes claim any shape
            raise ValueError(f"{name} claims the shape {list(t.shape)}, more than the file holds")
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"{name} has NaN or infinite entries")


def _not_a_map(path: Path, error: Exception) -> MechdiffError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return MechdiffError(f"{path} is damaged, truncated or not a map ({reason}); fetch or fit it again.")


def _unknown_suffix(suffix: str) -> MechdiffError:
    return MechdiffError(f"A map cannot be stored as {suffix!r}; name the file .pt or .safetensors.")
