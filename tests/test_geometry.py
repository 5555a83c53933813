"""Norm, angle and slerp against flat float64 vectors and closed forms."""

import math

import pytest
import torch

from xsam_hf import geometry
from xsam_hf.arithmetic import zero_unless
from xsam_hf.geometry import angle, norm, slerp


def angle_of(x, y):
    return angle(x, y, norm(x), norm(y))


SHAPES = [(), (0,), (3,), (4, 5), (2, 3, 4)]


def vectors(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def flat(vector):
    return torch.cat([part.double().reshape(-1) for part in vector])


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]
)
def test_norm_and_angle_equal_those_of_the_flat_vector(dtype, tolerance):
    x, y = vectors(dtype, 0), vectors(dtype, 1)
    fx, fy = flat(x), flat(y)
    cosine = torch.dot(fx, fy) / fx.norm() / fy.norm()
    assert norm(x).item() == pytest.approx(fx.norm().item(), rel=tolerance)
    assert angle_of(x, y).item() == pytest.approx(math.acos(cosine), rel=tolerance)


@pytest.mark.parametrize("psi", [1e-3, 0.7, 2.5, math.pi - 1e-3])
def test_norm_and_angle_are_the_same_in_small_blocks(psi, monkeypatch):
    x, other = vectors(torch.float64, 0), vectors(torch.float64, 1)
    along = torch.dot(flat(x), flat(other)) / flat(x).square().sum()
    across = [b - along * a for a, b in zip(x, other, strict=True)]
    scale = math.tan(psi) * norm(x) / norm(across)  # so that the angle is known
    y = [math.copysign(1, math.cos(psi)) * (a + scale * b) for a, b in zip(x, across, strict=True)]
    assert angle_of(x, y).item() == pytest.approx(psi, rel=1e-9)
    whole = norm(x).item()
    monkeypatch.setattr(geometry, "_SMALL", 0)
    monkeypatch.setattr(geometry, "_BLOCK", 5)
    assert angle_of(x, y).item() == pytest.approx(psi, rel=1e-9)
    assert norm(x).item() == pytest.approx(whole, rel=1e-15)


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)]
)
def test_both_distances_that_another_device_takes(dtype, tolerance):
    x, y = vectors(dtype, 0), vectors(dtype, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pieces = zip(*geometry._both_distances(x, y, torch.tensor(0.75, dtype=wide), wide), strict=True)
    apart, together = (torch.stack(sizes).norm().item() for sizes in pieces)
    assert apart == pytest.approx((0.75 * flat(x) - flat(y)).norm().item(), rel=tolerance)
    assert together == pytest.approx((0.75 * flat(x) + flat(y)).norm().item(), rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_taken_in_float32_or_better(dtype):
    # 300² overflows float16 and 4096 ones stall at 256 in bfloat16.
    assert norm([torch.full((4,), 300.0, dtype=dtype)]).item() == 600
    assert norm([torch.ones(4096, dtype=dtype)]).item() == 64
    assert norm([torch.ones(2, dtype=dtype)]).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("psi", [1e-6, 1e-5, 1e-4, 1e-3, 0.1, 1.0, math.pi / 2, 3.0, math.pi - 1e-4])
def test_angle_keeps_its_digits_in_float32(psi):
    # In two dimensions the angle is known; arccos of the float32 cosine gives 0 for the first two.
    x = [torch.tensor([1.0]), torch.tensor([0.0])]
    y = [torch.tensor([3 * math.cos(psi)]), torch.tensor([3 * math.sin(psi)])]
    assert angle_of(x, y).item() == pytest.approx(psi, rel=1e-5)


def test_angle_of_equal_opposite_and_zero_vectors_is_finite():
    x = vectors(torch.float32)
    assert angle_of(x, x).item() == 0
    assert angle_of(x, [-part for part in x]).item() == pytest.approx(math.pi, abs=1e-6)
    assert math.isfinite(angle_of(x, [0 * part for part in x]))


@pytest.mark.parametrize("psi", [0.0, 1e-12, 1e-5, 1e-3, 0.3, 1.5, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 1.7, 2.0])
def test_slerp_is_the_rotation_of_v0_towards_v1(psi, alpha):
    a, b = slerp(alpha, torch.tensor(psi, dtype=torch.float64))
    # v_0 = (1, 0), v_1 = (cos ψ, sin ψ): v(α) must be (cos αψ, sin αψ), so of norm 1 as well.
    assert (a + b * math.cos(psi)).item() == pytest.approx(math.cos(alpha * psi), abs=1e-9)
    assert (b * math.sin(psi)).item() == pytest.approx(math.sin(alpha * psi), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("psi", [0.0, 1e-4, 0.5, 3.1])
def test_the_ends_of_the_arc_are_exact(dtype, psi):
    psi = torch.tensor(psi, dtype=dtype)
    assert [c.item() for c in slerp(0.0, psi)] == [1, 0]
    assert [c.item() for c in slerp(1.0, psi)] == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.6, 1.0, 2.0])
def test_opposite_vectors_have_no_plane_and_give_the_nearer_one(dtype, alpha):
    psi = angle_of([torch.ones(1, dtype=dtype)], [-torch.ones(1, dtype=dtype)])
    assert [c.item() for c in slerp(alpha, psi)] == ([1, 0] if alpha < 0.5 else [0, 1])


def test_zero_unless_removes_nan_and_keeps_the_rest():
    x = [torch.tensor([1.0, math.nan]), torch.tensor(math.inf)]
    zero_unless(torch.tensor(True), x)
    assert x[0][0] == 1 and x[0][1].isnan() and x[1].isinf()
    zero_unless(torch.tensor(False), x)
    assert all((part == 0).all() for part in x)
