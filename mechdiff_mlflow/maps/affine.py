"""The affine map from base to tuned activations: what solvers make, the engine applies and winners are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps import files as mapfiles
from mechdiff_mlflow.spec.choices import Choice
from mechdiff_mlflow.text import text_of

JSON: TypeAlias = "bool | int | float | str | list[JSON] | Mapping[str, JSON] | None"

_DIGESTS: MutableMapping[Tensor, tuple[int, str]] = WeakTensorKeyDictionary()
"""Of each tensor that lives, the version of its content and that content's digest."""


class Family(Choice):
    """What a rank counts."""

    UPDATE = "update"
    """rank(W − I): in how many directions the fine-tune changed what passes."""
    CONTENT = "content"
    """rank(W): how many directions carry the content."""


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """W = diag(diagonal) + left @ right, or diag(diagonal) + left when `right` is None.

    Raises:
        MechdiffError: The shapes do not fit, the dtypes differ or are not float64 or float32, or an entry
            is NaN or infinite.
    """

    diagonal: Tensor  # [] for a multiple of the identity, or [d]; not zero only when d_in = d_out
    left: Tensor  # [d_in, r], or [d_in, d_out] when there is no `right`
    right: Tensor | None = None  # [r, d_out]

    def __post_init__(self) -> None:
        parts = {"diagonal": self.diagonal, "left": self.left}
        if self.right is not None:
            parts["right"] = self.right
        for name, t in parts.items():
            object.__setattr__(self, name, mapfiles.plain_tensor(f"The weight's part {name}", t))
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in parts.items())
        left, right = self.left, self.right
        fits = left.ndim == 2 and (right is None or (right.ndim == 2 and left.shape[1] == right.shape[0]))
        if not fits or (self.diagonal.ndim and self.diagonal.shape != (self.d_in,)):
            raise MechdiffError(f"The parts of a weight do not fit together: {shapes}.")
        if self.d_in != self.d_out and bool(self.diagonal.any()):
            raise MechdiffError(f"A multiple of the identity needs d_in = d_out; the parts have {shapes}.")
        kinds = {t.dtype for t in parts.values()}
        if len(kinds) > 1 or not kinds <= {torch.float64, torch.float32}:
            dtypes = ", ".join(f"{name} {t.dtype}" for name, t in parts.items())
            raise MechdiffError(f"A weight is all float64 or all float32; the parts are {dtypes}.")
        for name, t in parts.items():
            if not bool(torch.isfinite(t).all()):
                raise MechdiffError(f"The weight's part {name} {list(t.shape)} has NaN or infinite entries.")

    @classmethod
    def from_dense(cls, weight: Tensor) -> Weight:
        """W itself, [d_in, d_out]."""
        weight = mapfiles.plain_tensor("The weight", weight)
        return cls(weight.new_zeros(()), weight)

    @classmethod
    def low_rank(cls, left: Tensor, right: Tensor, identity: float = 0.0) -> Weight:
        """W = identity·I + left @ right, with left [d_in, r] and right [r, d_out]."""
        return cls(left.new_tensor(identity), left, right)

    @property
    def d_in(self) -> int:
        """Width of what enters."""
        return self.left.shape[0]

    @property
    def d_out(self) -> int:
        """Width of what leaves."""
        return (self.left if self.right is None else self.right).shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """X @ W for rows x [..., d_in], in W's dtype, without forming a structured W."""
        product = x @ self.left if self.right is None else (x @ self.left) @ self.right
        return product + self.diagonal * x if self.d_in == self.d_out else product

    def dense(self) -> Tensor:
        """W as one matrix, [d_in, d_out]."""
        product = self.left.clone() if self.right is None else self.left @ self.right
        if self.d_in == self.d_out:
            product.diagonal().add_(self.diagonal)
        return product

    def minus_identity(self) -> Weight:
        """W − I, the update, which needs equal widths."""
        if self.d_in != self.d_out:
            raise MechdiffError(
                f"The update W − I of a map from {self.d_in} to {self.d_out} dimensions is undefined; "
                "use the content family."
            )
        return Weight(self.diagonal - 1.0, self.left, self.right)

    def rank(self) -> int:
        """The numerical rank of W: singular values above max(d_in, d_out)·eps times the largest count."""
        if self.right is None or self.diagonal.ndim == 1:
            return int(torch.linalg.matrix_rank(self.dense()))
        if bool(self.diagonal == 0):
            # left = Q₁R₁ and rightᵀ = Q₂R₂, so W has the singular values of R₁R₂ᵀ.
            core = torch.linalg.qr(self.left).R @ torch.linalg.qr(self.right.mT).R.mT
            return int(torch.linalg.matrix_rank(core, rtol=max(self.d_in, self.d_out) * _eps(core)))
        # Sylvester: the null spaces of cI + LR and cI + RL have the same dimension when c ≠ 0.
        core = self.right @ self.left
        size = core.norm() + self.diagonal.abs()
        core.diagonal().add_(self.diagonal)
        rank = int(torch.linalg.matrix_rank(core, atol=self.d_in * _eps(core) * size, rtol=0.0))
        return self.d_in - len(core) + rank

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Weight:
        """The same weight in another dtype, on another device; None leaves that as it is."""
        right = None if self.right is None else self.right.to(device, dtype)
        return Weight(self.diagonal.to(device, dtype), self.left.to(device, dtype), right)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Weight):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in ("diagonal", "left", "right"))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        form = "dense" if self.right is None else f"factors of {self.left.shape[1]}"
        return f"Weight({self.d_in} -> {self.d_out}, {form})"


@dataclass(frozen=True, slots=True, eq=False)
class AffineMap:
    """y = alpha · ((x − mean_in) @ W + mean_out); rows are tokens.

    Raises:
        MechdiffError: The shapes or dtypes do not fit, an entry is NaN or infinite, alpha is negative, NaN
            or infinite, or meta is not JSON.
    """

    mean_in: Tensor  # mean of the base activations, [d_in]
    mean_out: Tensor  # mean of the tuned activations, [d_out]
    weight: Weight  # W, [d_in, d_out]
    alpha: float = 1.0  # multiplies the whole mapped vector, the mean included; no unit
    meta: Mapping[str, JSON] = field(default_factory=dict)  # where it comes from (site, solver, …), as JSON
    _sha256: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        for name, given, d in (("mean_in", self.mean_in, self.d_in), ("mean_out", self.mean_out, self.d_out)):
            mean = mapfiles.plain_tensor(name, given)
            object.__setattr__(self, name, mean)
            if mean.shape != (d,):
                raise MechdiffError(
                    f"{name} of a map from {self.d_in} to {self.d_out} dimensions has the shape "
                    f"{list(mean.shape)}; give [{d}]."
                )
            if mean.dtype != self.dtype:
                raise MechdiffError(f"{name} is {mean.dtype} and the weight {self.dtype}; give one dtype.")
            if not bool(torch.isfinite(mean).all()):
                raise MechdiffError(f"{name} has NaN or infinite entries; check the activations it is of.")
        try:
            alpha = math.nan if isinstance(self.alpha, str | bool) else float(self.alpha)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            alpha = math.nan
        if not 0 <= alpha < math.inf:
            raise MechdiffError(f"alpha is {self.alpha!r:.80}; give a finite number that is not negative.")
        object.__setattr__(self, "alpha", alpha)
        object.__setattr__(self, "meta", mapfiles.own_json(self.meta))

    @property
    def d_in(self) -> int:
        """Width of the base activations."""
        return self.weight.d_in

    @property
    def d_out(self) -> int:
        """Width of the tuned activations."""
        return self.weight.d_out

    @property
    def dtype(self) -> torch.dtype:
        """What the arithmetic is done in: float64 or float32."""
        return self.weight.left.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows x [..., d_in] to [..., d_out], computed in the map's dtype and given in that of x.

        A map on another device than x is copied there for the call; move it once with `to`.

        Raises:
            MechdiffError: x is not floating point or not d_in wide.
        """
        if x.ndim == 0 or x.shape[-1] != self.d_in or not x.is_floating_point():
            raise MechdiffError(
                f"A map from {self.d_in} to {self.d_out} dimensions cannot take {x.dtype} rows of shape "
                f"{list(x.shape)}; give floating-point rows of width {self.d_in}."
            )
        here = self if x.device == self.mean_in.device else self.to(device=x.device)
        y = here.alpha * (here.weight(x.to(here.dtype) - here.mean_in) + here.mean_out)
        return y.to(x.dtype)

    def dense(self) -> Tensor:
        """W as one matrix, [d_in, d_out]."""
        return self.weight.dense()

    def with_alpha(self, alpha: float) -> AffineMap:
        """The same map with another alpha (not multiplied by the present one)."""
        return replace(self, alpha=alpha)

    def with_meta(self, **entries: JSON) -> AffineMap:
        """The same map with these entries added to `meta`, or replaced in it."""
        return replace(self, meta={**self.meta, **entries})

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> AffineMap:
        """The same map in another dtype (float64 or float32), on another device."""
        return replace(
            self,
            mean_in=self.mean_in.to(device, dtype),
            mean_out=self.mean_out.to(device, dtype),
            weight=self.weight.to(dtype, device),
        )

    def weight_rank(self, family: Family | str) -> int:
        """The numerical rank of W (content) or of W − I (update)."""
        update = Family.parse(family) is Family.UPDATE
        return (self.weight.minus_identity() if update else self.weight).rank()

    def check_rank(self, k: int, family: Family | str) -> None:
        """Refuse the map if rank(W) (content) or rank(W − I) (update) is above k."""
        if k >= min(self.d_in, self.d_out):
            return
        if (rank := self.weight_rank(family)) > k:
            raise MechdiffError(
                f"The map claims rank {k} in the {family} family and has rank {rank}; refit it."
            )

    def to_bytes(self, suffix: str = ".pt") -> bytes:
        """The content of the file that `save` writes; equal maps give equal bytes."""
        content = mapfiles.encode(self._tensors(), {"alpha": self.alpha, "meta": self.meta}, suffix)
        if suffix == ".pt":
            object.__setattr__(self, "_sha256", hashlib.sha256(content).hexdigest())
        return content

    def sha256(self) -> str:
        """Hex digest of the `.pt` form, the name of this very map."""
        if not self._sha256:
            self.to_bytes()
        return self._sha256

    @property
    def digest(self) -> str:
        """Hex digest of what the map computes, α included, and not of what its meta says."""
        tensors = sorted(self._tensors().items())
        parts = [repr(self.alpha), *(f"{name} {_digest_of(tensor)}" for name, tensor in tensors)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the map as `.pt` (loads with `torch.load(weights_only=True)`) or `.safetensors`.

        Raises:
            MechdiffError: The suffix is another, or the file cannot be written.
        """
        content = self.to_bytes(Path(path).suffix)
        try:
            Path(path).write_bytes(content)
        except OSError as error:
            raise MechdiffError(
                f"Cannot write the map {path} ({error.strerror}); choose another place."
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> AffineMap:
        """Read what `save` wrote, on the CPU.

        Raises:
            MechdiffError: The file is missing, damaged, not a map, of another version or inconsistent.
        """
        tensors, header = mapfiles.read(path)
        if type(header.get("alpha")) not in (int, float) or not isinstance(header.get("meta"), dict):
            raise MechdiffError(f"{path} is not a map: its alpha is no number or its meta no JSON object.")
        from mechdiff_mlflow.maps.meta import check_meta  # needs what a compute node need not have

        check_meta(header["meta"], path)
        try:
            weight = Weight(tensors["diagonal"], tensors["left"], tensors.get("right"))
            return cls(tensors["mean_in"], tensors["mean_out"], weight, header["alpha"], header["meta"])
        except (MechdiffError, TypeError, OverflowError) as error:
            reason = str(error).rstrip(".")
            raise MechdiffError(f"{path} is not a map: {reason}; fetch or fit it again.") from error

    def equals(self, other: AffineMap) -> bool:
        """Whether both give the same ŷ for every x up to rounding, however they are written down."""
        if (self.d_in, self.d_out) != (other.d_in, other.d_out):
            return False
        w, v = (m.alpha * m.dense().double() for m in (self, other))
        b, c = (m.alpha * m.mean_out.double() - m.mean_in.double() @ x for m, x in ((self, w), (other, v)))
        return all(float((x - y).norm()) <= 1e-9 * float(x.norm()) for x, y in ((w, v), (b, c)))

    def _tensors(self) -> dict[str, Tensor]:
        parts = (self.mean_in, self.mean_out, self.weight.diagonal, self.weight.left, self.weight.right)
        return {name: t for name, t in zip(mapfiles.PARTS, parts, strict=True) if t is not None}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AffineMap):
            return NotImplemented
        means = _same(self.mean_in, other.mean_in) and _same(self.mean_out, other.mean_out)
        return means and (self.weight, self.alpha, self.meta) == (other.weight, other.alpha, other.meta)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"AffineMap({self.weight!r}, alpha={text_of(self.alpha)}, meta={dict(self.meta)!r})"


def identity_map(d: int) -> AffineMap:
    """The map that changes nothing: with it, a patch is raw."""
    zero = torch.zeros(d, dtype=torch.float64)
    return AffineMap(zero, zero, Weight.low_rank(zero.new_zeros(d, 0), zero.new_zeros(0, d), identity=1.0))


def _digest_of(tensor: Tensor) -> str:
    """Hex digest of a tensor, kept for as long as it lives: maps that differ in α alone share tensors."""
    known = _DIGESTS.get(tensor)
    if known is None or known[0] != tensor._version:
        own = tensor.detach().resolve_neg().cpu().contiguous()
        found = hashlib.sha256(f"{own.dtype} {tuple(own.shape)}".encode())
        found.update(own.flatten().view(torch.uint8).numpy().data)
        known = _DIGESTS[tensor] = tensor._version, found.hexdigest()
    return known[1]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps
