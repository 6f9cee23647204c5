"""What a map has to beat: simpler and wrong maps, applied on the same path as the fitted one.

A control has alpha 1 like every new map; compare it under the alpha of the map that it stands beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mechdiff_mlflow.maps.affine import AffineMap, Weight, identity_map
from mechdiff_mlflow.solvers.procrustes import ShrunkCovariance
from mechdiff_mlflow.solvers.spectrum import PairedSpectrum
from mechdiff_mlflow.solvers.table import SHRINK


def zero(p: PairedSpectrum) -> AffineMap:
    """Y = 0."""
    return mean_only(replace(p, mean_y=torch.zeros_like(p.mean_y)))


def mean_only(p: PairedSpectrum) -> AffineMap:
    """Y = μ_t, whatever the prompt."""
    return AffineMap(p.mean_x, p.mean_y, Weight.low_rank(p.vx[:, :0], p.vy.mT[:0]))


def mean_shift(p: PairedSpectrum) -> AffineMap:
    """Y = x − μ_b + μ_t."""
    return AffineMap(p.mean_x, p.mean_y, _diagonal(p, torch.ones_like(p.mean_x[0])))


def alpha_only(p: PairedSpectrum) -> AffineMap:
    """Y = x, so that alpha is all that acts; at alpha 1 this is the raw cross-patch."""
    return identity_map(p.d_in).to(device=p.mean_x.device)


def moment_matched(p: PairedSpectrum) -> AffineMap:
    """Mean and standard deviation of each dimension by itself: y = (x − μ_b)·σ_t/σ_b + μ_t.

    A base dimension that does not vary is sent to its tuned mean.
    """
    std_x, std_y = ((v**2 @ s**2 / (p.n - 1)).sqrt() for v, s in ((p.vx, p.sx), (p.vy, p.sy)))
    varies = std_x > 1e-12 * std_x.max()
    return AffineMap(p.mean_x, p.mean_y, _diagonal(p, torch.where(varies, std_y / std_x, 0.0)))


def coral(p: PairedSpectrum, *, shrink: float) -> AffineMap:
    """W = C_b^−½·C_t^½ of the shrunk covariances: the tuned covariance without the pairing.

    With `shrink` 0 the powers are those of the pseudo-inverse.

    Reference: Sun, Feng & Saenko (2016), Return of frustratingly easy domain adaptation.
    """
    whiten, off_x = _power(ShrunkCovariance.of(p.n, p.sx, p.vx, shrink), -0.5)
    colour, off_y = _power(ShrunkCovariance.of(p.n, p.sy, p.vy, shrink), 0.5)
    # (off_x·I + Vx·A·Vxᵀ)·(off_y·I + Vy·B·Vyᵀ), with A and B diagonal
    to_x, to_y = whiten[:, None] * p.vx.mT, colour[:, None] * p.vy.mT
    left = torch.cat([p.vx, p.vy], dim=1)
    right = torch.cat([to_x * off_y + (to_x @ p.vy) @ to_y, off_x * to_y])
    if left.shape[1] * 2 >= p.d_in:
        return AffineMap(p.mean_x, p.mean_y, Weight(left.new_tensor(off_x * off_y), left @ right))
    return AffineMap(p.mean_x, p.mean_y, Weight.low_rank(left, right, off_x * off_y))


def random_orthogonal(p: PairedSpectrum, *, seed: int) -> AffineMap:
    """A uniformly random rotation of the span of Xc, stretched so that ‖Xc·W‖ = ‖Yc‖; zero off the span.

    Reference: Mezzadri (2007), How to generate random matrices from the classical compact groups.
    """
    # On the CPU, so that the seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    shape = (max(p.d_out, p.vx.shape[1]), min(p.d_out, p.vx.shape[1]))
    q, r = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator))
    frame = (q * r.diagonal().sign()).to(p.vx)  # the signs make it uniform
    frame = frame.mT if p.d_out >= p.vx.shape[1] else frame  # [r_x, d_out]
    stretch = p.sy.norm() / (p.sx[:, None] * frame).norm()
    return AffineMap(p.mean_x, p.mean_y, Weight.low_rank(p.vx, stretch * frame))


def wrong_layer(p: PairedSpectrum, *, other: AffineMap) -> AffineMap:
    """The map of another site, of the same widths, as it is."""
    return other


CONTROLS: Mapping[str, Callable[..., AffineMap]] = {
    "zero": zero,
    "mean_only": mean_only,
    "mean_shift": mean_shift,
    "alpha_only": alpha_only,
    "moment_matched": moment_matched,
    "coral": coral,
    "random_orthogonal": random_orthogonal,
    "wrong_layer": wrong_layer,
}
_OF_EQUAL_WIDTHS = ("mean_shift", "alpha_only", "moment_matched", "coral")


def control_map(
    name: str, p: PairedSpectrum, *, shrink: float = 0.05, seed: int = 0, other: AffineMap | None = None
) -> AffineMap:
    """The control called `name`; `coral` takes `shrink`, `random_orthogonal` a seed, `wrong_layer` a map.

    It must be one of `applicable_controls`.
    """
    inputs: dict[str, Any] = {
        "coral": {"shrink": SHRINK.checked(shrink)},
        "random_orthogonal": {"seed": seed},
        "wrong_layer": {"other": other},
    }.get(name, {})
    notes = {key: value for key, value in inputs.items() if key != "other"}
    return CONTROLS[name](p, **inputs).with_meta(control=name, n_rows=p.n, **notes)


def applicable_controls(p: PairedSpectrum, *, other: AffineMap | None = None) -> tuple[str, ...]:
    """The names of `CONTROLS` that this site's widths allow; `wrong_layer` only when there is another map."""
    impossible: tuple[str, ...] = () if p.d_in == p.d_out else _OF_EQUAL_WIDTHS
    impossible += () if other is not None else ("wrong_layer",)
    return tuple(name for name in CONTROLS if name not in impossible)


def shuffled_pairs(
    p: PairedSpectrum, times: int, seed: int, groups: Sequence[int] = ()
) -> Iterator[PairedSpectrum]:
    """The site with its pairs shuffled at random, `times` times: what a fit finds where nothing is.

    Refit each, with every choice made inside, and compare with `stats.permutation_p`. Groups of rows, counted
    from 0, go to groups of as many rows, each as a whole.
    """
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor(groups) if len(groups) else torch.arange(p.n)
    rows = torch.split(torch.argsort(group, stable=True), torch.bincount(group).tolist())
    alike = [torch.stack([r for r in rows if len(r) == size]) for size in sorted({*map(len, rows)})]
    for _ in range(times):
        order = torch.empty(p.n, dtype=torch.long)
        for some in alike:  # [groups, rows of each]
            order[some] = some[torch.randperm(len(some), generator=generator)]
        yield p.permuted(order.to(p.sx.device))


def _diagonal(p: PairedSpectrum, scale: Tensor) -> Weight:
    return Weight(scale, p.vx[:, :0], p.vy.mT[:0])


def _power(cov: ShrunkCovariance, exponent: float) -> tuple[Tensor, float]:
    """C^exponent = off·I + V·diag(on)·Vᵀ as (on, off)."""
    off = float(cov.off_axes**exponent) if cov.off_axes > 0 else 0.0
    return cov.on_axes**exponent - off, off
