"""The paper's function of two parameters: its minima, and paths on it."""

import numpy as np
import pytest
import torch

from scripts import two_minima
from scripts.two_minima import FLAT, METHODS, SHARP, end, loss, path


def at(point):
    return torch.tensor(point, dtype=torch.float64)


def test_the_minima_are_where_the_paper_has_them():
    for point, value, eigenvalues in ((SHARP, 0.2752, (2.4e-3, 4.9e-3)), (FLAT, 0.3564, (3.3e-4, 6.8e-4))):
        assert loss(*at(point)).item() == pytest.approx(value, abs=1e-4)
        hessian = torch.autograd.functional.hessian(lambda x: loss(*x), at(point))
        assert torch.linalg.eigvalsh(hessian).tolist() == pytest.approx(eigenvalues, rel=0.03)
        found = path(METHODS["SGD"], (point[0] + 0.5, point[1] - 0.5), 150)[-1]
        assert np.abs(found - point).max() < 0.1
    assert not loss(*at((0.0, -1.0))).isfinite()


def test_paths_are_the_methods():
    ends = {name: path(arguments, (-20.0, 20.0), 2) for name, arguments in METHODS.items()}
    assert all(points.shape == (3, 2) and (points[0] == (-20, 20)).all() for points in ends.values())
    weights = at((-20.0, 20.0)).requires_grad_()
    first = torch.autograd.grad(loss(*weights), weights)[0]
    climbed = (weights + 12 * first / first.norm()).detach().requires_grad_()
    last = torch.autograd.grad(loss(*climbed), climbed)[0]
    for name, gradient in (("SGD", first), ("SAM", last)):
        assert np.abs(ends[name][1] - (weights.detach() - two_minima.RATE * gradient).numpy()).max() < 1e-12
    assert np.abs(ends["XSAM"][1] - ends["SAM"][1]).max() > 1e-3


def test_the_end_is_the_basin():
    assert end(np.array([[15.0, 28.0]])) == "flat" and end(np.array([[-15.0, 14.0]])) == "sharp"
    assert end(np.array([[np.nan, 1.0]])) == "none"
