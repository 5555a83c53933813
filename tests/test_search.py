"""The search for α on curves that are known: maxima, ties, ends, and curves of noise."""

import math

import numpy as np
import pytest
import torch

from xsam_hf import XSAMArguments, XSAMState, xsam_gradient
from xsam_hf.search import search_alpha


ALPHAS = [i / 10 for i in range(21)]
PSI = torch.tensor(0.4, dtype=torch.float64)


def search(curve, alphas=ALPHAS, dtype=torch.float64):
    """Searches a curve given as a function of α, and counts the probes."""
    probes = []

    def loss_at(a, b):
        # The inverse of slerp: tan(αψ) = b sin ψ / (a + b cos ψ).
        psi = float(PSI)
        alpha = math.atan2(b * math.sin(psi), a + b * math.cos(psi)) / psi
        probes.append(round(alpha, 6))
        return torch.tensor(float(curve(alpha)), dtype=dtype)

    return search_alpha(loss_at, PSI, alphas, 1.0), probes


@pytest.mark.parametrize("top", np.linspace(-0.5, 2.5, 31))
def test_the_grids_nearest_point_wins_with_one_probe_each(top):
    for curve in (lambda a: -((a - top) ** 2), lambda a: math.cos(a - top), lambda a: -(abs(a - top) ** 1.5)):
        found, probes = search(curve)
        assert probes == pytest.approx(ALPHAS)
        assert abs(found.alpha - min(max(top, 0), 2)) <= 0.05 + 1e-9
        assert found.at_edge == (found.alpha in (0, 2))


def test_the_highest_of_several_peaks_wins():
    found, _ = search(lambda a: math.exp(-20 * (a - 0.4) ** 2) + 1.5 * math.exp(-20 * (a - 2) ** 2))
    assert found.alpha == 2


def test_of_equal_losses_the_first_wins():
    assert search(lambda a: min(a, 0.95))[0].alpha == 1.0  # 1.0 ... 2.0 are one plateau


@pytest.mark.parametrize("dtype, ulp", [(torch.float32, 2**-23), (torch.float64, 2**-52)])
def test_losses_that_differ_by_rounding_alone_are_equal(dtype, ulp):
    """On a flat top the order of a sum would decide otherwise: 8 × 1 and 4 × 2 micro-batches found other α."""

    def flat_top(a, steps):
        return 1 + min(a, 1.2) + steps * ulp * (round(10 * a) == 19)

    for steps, alpha in ((0, 1.2), (3, 1.2), (8, 1.2), (1000, 1.9)):
        assert search(lambda a, n=steps: flat_top(a, n), dtype=dtype)[0].alpha == alpha, steps
    for steps, alpha in ((0, None), (3, None), (1000, 1.9)):  # nothing but rounding decides nothing
        found, _ = search(
            lambda a, n=steps: 5 + n * ulp * (round(10 * a) == 19), [i / 2.5 for i in range(5)] + [1.9], dtype
        )
        assert found.alpha == alpha, steps


def test_both_ends_of_the_grid_are_edges():
    assert search(lambda a: -a)[0].at_edge and search(lambda a: a)[0].at_edge
    assert not search(lambda a: -((a - 1) ** 2))[0].at_edge


@pytest.mark.parametrize("value", [0.25, 0.0, -3.0])
def test_a_constant_curve_decides_nothing(value):
    assert search(lambda a: value)[0].alpha is None


def test_losses_that_are_not_finite_never_win():
    found, _ = search(lambda a: math.inf if a > 1.25 else a)
    assert found.alpha == 1.2
    nothing, _ = search(lambda a: math.nan)
    assert nothing.alpha is None and nothing.gain is None
    one, _ = search(lambda a: a if abs(a - 0.7) < 0.01 else math.nan)
    assert one.alpha == 0.7


def test_a_curve_of_noise_decides_nothing():
    generator = np.random.default_rng(1)
    refused = {"noise": 0, "signal": 0}
    for _ in range(300):
        noise = generator.standard_normal(21)
        found, _ = search(lambda a, noise=noise: noise[round(10 * a)])
        refused["noise"] += found.alpha is None
        assert (found.noise > 1) == (found.alpha is None)
        found, _ = search(lambda a, noise=noise: -10 * (a - 1.3) ** 2 + noise[round(10 * a)])
        refused["signal"] += found.alpha is None
    assert refused["noise"] >= 0.9 * 300 and refused["signal"] == 0
    smooth, _ = search(lambda a: 1e-6 * math.cos(a))  # however flat
    assert smooth.alpha == 0 and smooth.noise < 0.05


def test_noise_is_not_told_from_a_few_points():
    rough = [0.0, 1.0] * 4 + [0.0]

    def of(n):
        return search(lambda a: rough[round(10 * a)], ALPHAS[:n])[0]

    assert of(9).noise > 1 and of(9).alpha is None
    assert of(8).noise == 0 and of(8).alpha == 0.1


def test_noise_is_kept_with_the_state():
    state = XSAMState()
    state.remember(search(lambda a: math.sin(40 * a) + 0.1 * (round(10 * a) % 2))[0])
    assert state.search_noise > 1 and state.alpha == 1.0


@pytest.mark.parametrize("reduction", ["mean", "sum"])  # NaN and 0 without labels
@pytest.mark.parametrize("changes", [{}, {"perturbation": "stale"}], ids=["xsam", "stale"])
def test_a_batch_without_labels_leaves_the_search_to_the_next(reduction, changes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    arguments, state, searched = XSAMArguments(rho=0.5, **changes), XSAMState(), []
    for labels in (y, torch.full((8,), -100), y, y):

        def loss(labels=labels):
            total = torch.nn.functional.cross_entropy(model(x), labels, reduction=reduction)
            return total if reduction == "mean" else total / max(1, int((labels >= 0).sum()))

        def gradient(loss=loss):
            found = loss()
            found.backward()
            return found.detach()

        if len(searched) == 1:
            state.search_due = True
        searched.append(xsam_gradient(model, gradient, loss, arguments, state).search)
        model.zero_grad()
    first, without, after, last = searched
    assert (first is None) == bool(changes)  # stale ascent has nothing to climb along yet
    assert without.alpha is None and after.alpha is not None and last is None


@pytest.mark.parametrize("loss_scaling, again", [(True, True), (False, False)])
def test_an_overflow_before_a_scaler_leaves_the_search_to_the_next_update(loss_scaling, again):
    weight, state = torch.ones(3, requires_grad=True), XSAMState()

    def gradient():
        weight.grad = torch.full((3,), math.inf)
        return torch.tensor(1.0)

    xsam_gradient([weight], gradient, lambda: weight.sum(), XSAMArguments(), state, loss_scaling=loss_scaling)
    assert state.search_due is again


def test_a_loss_that_is_flat_along_a_gradient_is_searched_once():
    weight, state = torch.ones(3, requires_grad=True), XSAMState()

    def gradient():
        weight.grad = torch.arange(3.0)
        return torch.tensor(1.0)

    found = xsam_gradient([weight], gradient, lambda: torch.tensor(1.0), XSAMArguments(), state)
    assert found.search.alpha is None and not state.search_due
