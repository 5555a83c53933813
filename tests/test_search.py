"""The search for α on curves that are known: the grid, golden-section search, smoothing, and curves of noise."""

import math

import numpy as np
import pytest
import torch

from xsam_hf.search import peak, search_alpha


ALPHAS = [i / 10 for i in range(21)]
PSI = torch.tensor(0.4, dtype=torch.float64)


def search(curve, **options):
    """Searches a curve given as a function of α, and counts the probes."""
    probes = []

    def loss_at(a, b):
        # The inverse of slerp: tan(αψ) = b sin ψ / (a + b cos ψ).
        psi = float(PSI)
        alpha = math.atan2(b * math.sin(psi), a + b * math.cos(psi)) / psi
        probes.append(round(alpha, 6))
        return torch.tensor(float(curve(alpha)), dtype=torch.float64)

    return search_alpha(loss_at, PSI, ALPHAS, 1.0, **options), probes


def single_peak(generator, n, at):
    """A sequence that rises to one maximum and falls after it, with steps of very different sizes."""
    steps = np.exp(3 * generator.standard_normal(n))
    values = np.concatenate([np.cumsum(steps[: at + 1]), np.cumsum(steps[: at + 1])[-1] - np.cumsum(steps[at + 1 :])])
    return values.tolist()


@pytest.mark.parametrize("n", [2, 3, 5, 8, 20, 21, 22, 50])
def test_peak_of_every_sequence_with_one_peak(n):
    generator, most = np.random.default_rng(0), 0
    for at in range(n):
        for _ in range(20):
            values, asked = single_peak(generator, n, at), []

            def height(i, values=values, asked=asked):
                asked.append(i)
                return values[i]

            assert peak(height, n) == at == int(np.argmax(values))
            assert len(asked) == len(set(asked))
            most = max(most, len(asked))
    assert most <= (9 if n <= 21 else math.ceil(math.log(n, (1 + 5**0.5) / 2)) + 2)


@pytest.mark.parametrize("top", np.linspace(-0.5, 2.5, 31))
def test_golden_finds_the_grids_alpha_with_nine_probes(top):
    for curve in (lambda a: -((a - top) ** 2), lambda a: math.cos(a - top), lambda a: -(abs(a - top) ** 1.5)):
        grid, all_probes = search(curve)
        golden, probes = search(curve, method="golden")
        assert golden.alpha == grid.alpha and len(all_probes) == 21 and len(probes) <= 9
        assert abs(golden.alpha - min(max(top, 0), 2)) <= 0.05 + 1e-9
        assert golden.alphas == sorted(golden.alphas) and len(golden.losses) == len(probes)
        assert golden.at_edge == grid.at_edge


def test_golden_falls_back_to_the_grid_where_the_curve_has_several_peaks():
    def curve(a):  # a low peak at 0.4, a high one at the far end
        return math.exp(-20 * (a - 0.4) ** 2) + 1.5 * math.exp(-20 * (a - 2) ** 2)

    golden, probes = search(curve, method="golden")
    assert golden.alpha == 2 == search(curve)[0].alpha and len(probes) == 21

    def holed(a):  # not finite on both ends and in most places
        return -((a - 1.6) ** 2) if 1.45 < a < 1.75 else math.nan

    golden, probes = search(holed, method="golden")
    assert golden.alpha == 1.6 and len(probes) == 21


@pytest.mark.parametrize("method", ["grid", "golden"])
def test_losses_that_are_not_finite_never_win(method):
    found, _ = search(lambda a: math.inf if a > 1.25 else a, method=method)
    assert found.alpha == 1.2
    nothing, _ = search(lambda a: math.nan, method=method)
    assert nothing.alpha is None and nothing.gain is None


def test_smoothing_takes_the_ridge_and_not_the_spike():
    def curve(a):
        return -((a - 1.5) ** 2) + (2.0 if round(10 * a) == 2 else 0.0)

    assert search(curve)[0].alpha == 0.2
    assert search(curve, smoothing=True)[0].alpha == pytest.approx(1.5)
    for rising in (math.exp, lambda a: -a, lambda a: -math.exp(a)):  # the ends stay within reach
        assert search(rising, smoothing=True)[0].alpha == search(rising)[0].alpha


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


def test_smoothing_helps_at_the_noise_of_bfloat16():
    """As trainer_internals.md measured it: a curve of range 6.4e-3 with a roughness of 1.7e-3 (float32: 9e-7)."""
    generator, errors, refused = np.random.default_rng(2), {True: [], False: []}, 0
    for _ in range(300):
        noise = generator.standard_normal(21) * 1.7e-3 / 6**0.5

        def curve(a, noise=noise):
            return -6.4e-3 / 1.69 * (a - 1.3) ** 2 + noise[round(10 * a)]

        for smoothing in errors:
            found, _ = search(curve, smoothing=smoothing)
            refused += found.alpha is None
            errors[smoothing].append(abs(found.alpha - 1.3))
    assert refused == 0
    assert np.mean(errors[True]) < 0.75 * np.mean(errors[False]) < 0.15
