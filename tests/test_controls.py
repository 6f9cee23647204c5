from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.dense_reference import power, shrunk_covariance
from mechdiff_mlflow.errors import MechdiffError
from mechdiff_mlflow.maps.affine import AffineMap
from mechdiff_mlflow.solvers import PairedSpectrum, fit_spectrum
from mechdiff_mlflow.solvers.controls import CONTROLS, applicable_controls, control_map, shuffled_pairs


def rows(n: int, d_in: int = 12, d_out: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d_in, dtype=torch.float64, generator=g) * torch.arange(1, d_in + 1) + 3
    return x, x @ torch.randn(d_in, d_out, dtype=torch.float64, generator=g) + 1


def control(name: str, x: Tensor, y: Tensor, **inputs: object) -> AffineMap:
    return control_map(name, PairedSpectrum.from_rows(x, y), **inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [7, 15, 60])
def test_each_is_its_definition(n: int) -> None:
    x, y = rows(n)
    xc, yc, mean = x - x.mean(0), y - y.mean(0), y.mean(0)
    coral = power(shrunk_covariance(xc, 0.05), -0.5) @ power(shrunk_covariance(yc, 0.05), 0.5)
    other = control("mean_only", x, 2 * y)
    expected = {
        "zero": torch.zeros_like(y),
        "mean_only": mean.expand_as(y),
        "mean_shift": xc + mean,
        "alpha_only": x,
        "moment_matched": xc * (y.std(0) / x.std(0)) + mean,
        "coral": xc @ coral + mean,
        "wrong_layer": 2 * mean.expand_as(y),
    }
    for name in CONTROLS.keys() - {"random_orthogonal"}:  # tested by its properties
        found = control(name, x, y, other=other)
        torch.testing.assert_close(found(x), expected[name], rtol=1e-10, atol=1e-9)
        assert found.meta["control"] == name
    torch.testing.assert_close(control("coral", x, y).dense(), coral, rtol=1e-9, atol=1e-9)


def test_coral_gives_the_tuned_covariance() -> None:
    x, y = rows(60)
    mapped = control("coral", x, y, shrink=0.0)(x)
    torch.testing.assert_close(torch.cov(mapped.mT), torch.cov(y.mT))
    # With fewer rows than dimensions the powers are of the pseudo-inverse, and finite.
    x, y = rows(7)
    assert control("coral", x, y, shrink=0.0).weight_rank("content") <= 6


@pytest.mark.parametrize(("n", "d_in", "d_out"), [(7, 12, 12), (60, 12, 12), (60, 8, 12), (60, 12, 8)])
def test_random_orthogonal_is_seeded_and_matches_the_norm(n: int, d_in: int, d_out: int) -> None:
    x, y = rows(n, d_in, d_out)
    one, same, other = (control("random_orthogonal", x, y, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert not torch.allclose(one.dense(), other.dense())
    assert one.meta["seed"] == 1
    xc, mapped = x - x.mean(0), one(x) - y.mean(0)
    torch.testing.assert_close(mapped.norm(), (y - y.mean(0)).norm())
    if d_out >= d_in:  # angles are kept
        gram = xc @ xc.mT
        torch.testing.assert_close(mapped @ mapped.mT / mapped.norm() ** 2, gram / gram.trace())


def test_random_orthogonal_is_uniform() -> None:
    """Without the signs of R the diagonal of Q would be of one sign."""
    x, y = rows(60, 3, 3)
    spans = [control_map("random_orthogonal", PairedSpectrum.from_rows(x, y), seed=s) for s in range(200)]
    axes = PairedSpectrum.from_rows(x, y).vx
    frames = torch.stack([axes.mT @ m.dense() for m in spans])
    means = (frames / frames.norm(dim=(1, 2), keepdim=True)).mean(0)
    assert float(means.abs().max()) < 4 * (1 / 3) / 200**0.5


def test_a_constant_base_dimension_goes_to_the_tuned_mean() -> None:
    x, y = rows(30)
    x[:, 3] = 5.0
    mapped = control("moment_matched", x, y)(x)
    torch.testing.assert_close(mapped[:, 3], y[:, 3].mean().expand(30))


def test_unequal_widths_leave_those_that_have_a_meaning() -> None:
    p = PairedSpectrum.from_rows(*rows(15, 8, 12))
    names = applicable_controls(p)
    assert names == ("zero", "mean_only", "random_orthogonal")
    assert all(control_map(name, p).d_out == 12 for name in names)


def test_applicable_controls_are_all_of_them_when_there_is_another_layer() -> None:
    p = PairedSpectrum.from_rows(*rows(15))
    assert applicable_controls(p, other=control_map("zero", p)) == tuple(CONTROLS)
    assert set(CONTROLS) - set(applicable_controls(p)) == {"wrong_layer"}


def test_mistakes_say_what_is_needed() -> None:
    p = PairedSpectrum.from_rows(*rows(15))
    with pytest.raises(MechdiffError, match="shrink is -1; give a number from 0 to 1"):
        control_map("coral", p, shrink=-1)


@pytest.mark.parametrize("n", [9, 40])
def test_a_fit_of_shuffled_pairs_explains_less(n: int) -> None:
    x, y = rows(n)
    p = PairedSpectrum.from_rows(x, y)

    def left(spectrum: PairedSpectrum) -> float:
        m = fit_spectrum("reduced_rank", spectrum, "content").map(2)
        rows_y = spectrum.mean_y + spectrum.uy * spectrum.sy @ spectrum.vy.mT
        return float((m(x) - rows_y).norm())

    shuffled = list(shuffled_pairs(p, 5, seed=3))
    assert all(left(s) > left(p) for s in shuffled)
    again = [s.cross for s in shuffled_pairs(p, 5, seed=3)]
    assert all(torch.equal(a, b.cross) for a, b in zip(again, shuffled, strict=True))
    assert not torch.equal(again[0], again[1])


def test_groups_are_shuffled_as_wholes_among_groups_of_their_size() -> None:
    x, y = rows(11)
    groups = [0, 0, 1, 2, 2, 3, 4, 4, 1, 5, 6]
    p = PairedSpectrum.from_rows(x, y)
    moved = 0
    for mixed in shuffled_pairs(p, 20, 1, groups):
        same = (mixed.uy[:, None] == p.uy[None]).all(-1)  # type: ignore[index]
        order = [groups[int(row.nonzero()[0, 0])] for row in same]
        to = dict(zip(groups, order, strict=True))
        assert [to[g] for g in groups] == order
        assert sorted(order) == sorted(groups)
        moved += order != groups
    assert moved > 10
    plain = [s.cross for s in shuffled_pairs(p, 3, 7)]
    alone = [s.cross for s in shuffled_pairs(p, 3, 7, range(11))]
    assert all(torch.equal(a, b) for a, b in zip(plain, alone, strict=True))
