"""Edges of the methods: ties, constants, vectors of zeros, first gradients that are not finite, plateaus, a dozen tensors."""

import math

import numpy as np
import pytest
import torch
from test_search import ALPHAS, search
from torch import nn
from toys import Classifier, Points, train

from xsam_hf import XSAMArguments, XSAMState, xsam, xsam_gradient
from xsam_hf.checkpoint import load_tensors, save_tensors
from xsam_hf.micro_batch import MicroBatch, random_part
from xsam_hf.perturbation import RandomState, park, perturbed_and_excluded
from xsam_hf.reuse import turn_of
from xsam_hf.rounding import half_precision
from xsam_hf.schedule import search_at, sharp_at
from xsam_hf.search import _noise, _smooth, peak, search_alpha


H = torch.tensor([1.0, 10.0], dtype=torch.float64)


def one_update(state, factors=(), w=(1.0, 0.1), probe=None, unused=False, **changes):
    """One update on ½ wᵀ H w; the i-th pass's loss is multiplied by the i-th factor. Returns the gradient and the weights."""
    keywords = {k: changes.pop(k) for k in ("loss_scaling",) if k in changes}
    weight, left = nn.Parameter(torch.tensor(w, dtype=torch.float64)), list(factors)
    weights = [nn.Parameter(torch.ones(3, dtype=torch.float64)), weight] if unused else [weight]

    def gradient():
        loss = 0.5 * (H * weight**2).sum() * (left.pop(0) if left else 1.0)
        loss.backward()
        return loss.detach()

    xsam_gradient(weights, gradient, probe or (lambda: 0.5 * (H * weight**2).sum()), XSAMArguments(rho=0.3, **changes), state, **keywords)  # fmt: skip
    return weight.grad


# --- the search


def test_of_equal_losses_the_first_wins():
    for options in ({}, {"method": "golden"}):
        found, _ = search(lambda a: min(a, 0.95), **options)  # 1.0 ... 2.0 are one plateau
        assert found.alpha == 1.0
    assert peak(lambda i: min(i, 7), 21) == 7 == peak(lambda i: -abs(2 * i - 15), 21)


def test_golden_sees_a_second_peak_behind_the_first():
    golden, probes = search(lambda a: -0.5 if a > 1.95 else -((a - 0.4) ** 2), method="golden")
    assert golden.alpha == 0.4 and len(probes) == 21


def test_noise_is_not_told_from_a_few_points():
    rough = [0.0, 1.0] * 4 + [0.0]  # nine points
    assert _noise(rough) > 1 and _noise(rough[:8]) == 0
    # A golden search's points lie unevenly: their second differences say nothing.
    asked = []

    def loss_at(a, b):
        asked.append(a)
        return torch.tensor(-abs(b - 0.31), dtype=torch.float64)  # b rises with α here

    found = search_alpha(loss_at, torch.tensor(0.4, dtype=torch.float64), [i / 50 for i in range(101)], 1.0, "golden")
    assert 9 <= len(asked) < 20 and found.noise == 0 and found.alpha == pytest.approx(0.31, abs=0.03)


def test_smoothing_takes_the_whole_grid_also_from_golden():
    found, probes = search(lambda a: -((a - 1.3) ** 2), method="golden", smoothing=True)
    assert len(probes) == 21 and found.alpha == pytest.approx(1.3)


def test_smoothing_treats_both_ends_alike_and_fills_no_holes():
    y = np.random.default_rng(0).standard_normal(21)
    assert _smooth(y[::-1])[::-1] == pytest.approx(_smooth(y), abs=1e-12)
    first = np.polyval(np.polyfit(np.arange(11), y[:11], 2), 0)
    assert _smooth(y)[0] == pytest.approx(first, abs=1e-12)
    found, _ = search(lambda a: math.nan if round(10 * a) == 13 else -((a - 1.3) ** 2), smoothing=True)
    assert found.alpha in (1.2, 1.4)


def test_both_ends_of_the_grid_are_edges():
    assert search(lambda a: -a)[0].at_edge and search(lambda a: a)[0].at_edge
    assert not search(lambda a: -((a - 1) ** 2))[0].at_edge


def test_a_constant_curve_decides_nothing():
    for options in ({}, {"method": "golden"}, {"smoothing": True}):
        assert search(lambda a: 0.25, **options)[0].alpha is None


# --- averages and sums


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("perturbation", ["vasso", "fsam"])
def test_an_average_survives_a_very_first_gradient_that_is_not_finite(perturbation, bad):
    state = XSAMState()
    one_update(state, [bad], perturbation=perturbation, alpha=1.0)
    g = one_update(state, perturbation=perturbation, alpha=1.0)
    assert torch.isfinite(state.tensors["average"][0]).all()
    assert g.tolist() == pytest.approx(one_update(XSAMState(), alpha=1.0).tolist())  # SAM's: nothing remembered


@pytest.mark.parametrize("perturbation", ["vasso", "fsam"])
def test_a_scaler_sees_an_overflow_of_the_first_pass_alone(perturbation):
    state = XSAMState()
    one_update(state, perturbation=perturbation, alpha=1.0)
    g = one_update(state, [math.inf], perturbation=perturbation, alpha=1.0, loss_scaling=True)
    assert not torch.isfinite(g).all()


@pytest.mark.parametrize("direction", ["lsam", "lsam+", "msam", "msam+"])
def test_a_sum_of_zero_gradients_is_zero(direction):
    assert one_update(XSAMState(), w=(0.0, 0.0), direction=direction).tolist() == [0, 0]


# --- reuse


def test_the_turn_is_a_unit_vector_and_zero_where_there_is_none():
    g, e = [torch.tensor([3.0, 4.0, 0.0])], [torch.tensor([2.0, 0.0, 0.0])]
    assert turn_of(g, e, torch.tensor(2.0))[0].tolist() == [0, 1, 0]
    assert turn_of(e, e, torch.tensor(2.0))[0].tolist() == [0, 0, 0]


def test_reuse_passes_over_weights_without_a_gradient():
    found = []
    for unused in (False, True):
        state, reuse = XSAMState(), {"alpha": 1.7, "sharpness_every": 2, "sharpness_between": "reuse"}
        found.append([one_update(state, unused=unused, **reuse).tolist() for _ in range(2)])
    assert found[0] == found[1] and found[0][1] != [1, 1]


@pytest.mark.parametrize("scale", ["last", "max", "first", "mean", "slope", "slope_max"])
def test_reuse_keeps_the_gradient_scale(scale):
    # At the same weights the turned gradient is the update that it was taken from.
    state, changes = XSAMState(), {"gradient_scale": scale, "alpha": 1.3, "sharpness_every": 2, "sharpness_between": "reuse"}  # fmt: skip
    sharp, reused = one_update(state, **changes), one_update(state, **changes)
    assert reused.tolist() == pytest.approx(sharp.tolist(), rel=1e-9)


# --- schedules, parts, exclusion


def test_a_share_of_updates_between_searches_is_rounded_up():
    assert [i for i in range(10) if search_at(XSAMArguments(alpha_search_steps=0.25), i, 10)] == [0, 3, 6, 9]


@pytest.mark.parametrize("share, whole, first", [(0.07, 100, 7), (0.14, 50, 7), (0.55, 100, 55), (0.25, 10, 3)])
def test_shares_are_rounded_up_but_not_by_floating_point(share, whole, first):
    arguments = XSAMArguments(sharpness_start=share)
    assert [sharp_at(arguments, i, whole) for i in (first - 1, first)] == [False, True]
    assert random_part({"x": torch.zeros(whole)}, share, [0])[1] == first / whole


def test_a_part_takes_its_share_of_the_items():
    def of(share, n):
        return MicroBatch({}, n, 1, RandomState.capture(), {"x": 1}, share, torch.empty(0)).of_part()

    assert of(0.25, 20) == ({"x": 1}, 5) and of(1.0, 20)[1] == 20 and of(0.25, None)[1] is None
    assert of(0.5, torch.tensor(7))[1].item() == 3.5


class Rows(Classifier):
    """Notes how many rows the probes see."""

    probed: list[int] = []

    def forward(self, x, labels=None):
        if self.training and not torch.is_grad_enabled():
            self.probed.append(len(x))
        return super().forward(x, labels)


def test_the_search_takes_the_whole_batch(tmp_path):
    Rows.probed = []
    train(tmp_path, Rows(), rho=0.5, ascent_fraction=0.5, max_steps=1)
    assert Rows.probed == [8] * 21


def test_passes_are_a_mean_over_updates_not_micro_batches(tmp_path):
    run = train(tmp_path, Classifier(), rho=0.5, alpha=1.0, sharpness_every=2, logging_steps=2, per_device_train_batch_size=4,
                gradient_accumulation_steps=2)  # fmt: skip
    assert [entry["xsam/passes"] for entry in run.state.log_history if "xsam/passes" in entry] == [1.5] * 4


def test_the_trainer_knows_the_whole_of_a_share(tmp_path):
    train(tmp_path, Classifier(), Points(32), rho=0.5, alpha_search_steps=0.25)
    assert len((tmp_path / "xsam_search.jsonl").read_text().splitlines()) == 4


def test_every_pattern_excludes_and_what_is_frozen_is_nobodys():
    model = Classifier()
    model.first.weight.requires_grad_(False)
    perturbed, excluded = perturbed_and_excluded(model, ["first", r"second\.b"])
    assert [w.shape for w in perturbed] == [(3, 7)] and [w.shape for w in excluded] == [(7,), (3,)]
    with pytest.raises(ValueError, match="'first.weight', which no name of a trainable weight contains"):
        perturbed_and_excluded(model, ["first.weight"])


def test_a_fixed_alpha_asks_for_no_search_schedule():
    one_update(XSAMState(), alpha=1.0, alpha_search_steps=0.5)


# --- precision and checkpoints


def probed_at_random():
    """θ_0, v_0, and what two probes of one point (α = 0 and next to it) see in each of two updates."""
    torch.manual_seed(0)
    seen, weight = [], nn.Parameter(torch.randn(4096, dtype=torch.bfloat16))
    before, state = weight.detach().clone(), XSAMState()
    target = torch.randn(4096, dtype=torch.bfloat16)

    places = []

    def gradient():
        places.append(weight.detach().double())
        loss = (weight * target).float().sum()
        loss.backward()
        return loss.detach()

    def probe():
        seen.append(weight.detach().clone())
        return weight.float().square().sum()

    for _ in range(2):
        state.search_due, weight.grad = True, None
        xsam_gradient([weight], gradient, probe, XSAMArguments(rho=0.01, alpha_max=1e-12, alpha_samples=2, perturbation_dtype="stochastic"), state)  # fmt: skip
    first = (places[1] - places[0]) / (places[1] - places[0]).norm()  # v_0
    return before, first, seen


def test_probes_of_equal_points_round_alike_at_random():
    before, _, seen = probed_at_random()
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3]) and not torch.equal(seen[0], seen[2])
    away = (seen[0].double() - before.double()).norm().item()
    assert away > 0.024  # to the nearest it would be ρ_max, 0.02, or less; at random it is more, but right on average


def test_probes_stand_at_their_radius_on_average():
    before, first, seen = probed_at_random()
    moved = (seen[0].double() - before.double()) @ first
    assert moved.item() == pytest.approx(0.02, rel=0.3)  # ρ_max; a seed shared with the ascent doubles it


def test_one_weight_in_half_precision_is_enough():
    assert half_precision([torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)]) and not half_precision(
        [torch.zeros(1)]
    )


def test_a_parked_copy_is_not_the_tensor_itself():
    parts = [torch.ones(2)]
    kept = parts[0]
    park(parts)
    assert parts[0] is not kept and torch.equal(parts[0], kept)


def test_a_dozen_tensors_come_back_in_their_order(tmp_path):
    parts = [torch.full((2,), float(i)) for i in range(12)]
    save_tensors({"average": parts}, tmp_path, write=True)
    assert [int(part[0]) for part in load_tensors(tmp_path, parts)["average"]] == list(range(12))


def test_noise_is_kept_with_the_state():
    state = XSAMState()
    state.remember(search(lambda a: math.sin(40 * a) + 0.1 * (round(10 * a) % 2))[0])
    assert state.search_noise > 1 and state.alpha == 1.0 and len(ALPHAS) == 21


@pytest.mark.parametrize("when", ["parking", "probe"])
def test_weights_come_back_from_a_copy_that_is_parked_or_half_parked(monkeypatch, when):
    weights = [nn.Parameter(torch.randn(50)) for _ in range(3)]
    before, seen = [weight.detach().clone() for weight in weights], []

    def loss():
        return sum((weight**3).sum() for weight in weights)

    def gradient():
        loss().backward()
        return loss().detach()

    def probe():
        seen.append([weight.detach().clone() for weight in weights])
        if when == "probe" and len(seen) == 3:
            raise KeyboardInterrupt
        return loss()

    def half_parked(origin):
        origin[0] = origin[0].to("cpu", copy=True)
        raise RuntimeError("out of memory")

    if when == "parking":
        monkeypatch.setattr(xsam, "park", half_parked)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        xsam_gradient(weights, gradient, probe, XSAMArguments(rho=0.3, search_offload=True), XSAMState())
    assert len(seen) == (3 if when == "probe" else 0)
    assert all(torch.equal(w, b) and w.grad is None for w, b in zip(weights, before, strict=True))
    assert not any(torch.equal(s, b) for places in seen for s, b in zip(places, before, strict=True))
