"""The algorithm against the oracle, closed forms and its own degenerate cases; no framework."""

import math

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from toys import CLASSES, HIDDEN, INPUTS, Classifier, Points

from xsam_hf import XSAMArguments, XSAMState, xsam_gradient
from xsam_hf.pass_state import RandomState


class Quadratic:
    """L(w) = ½ wᵀ H w with H = diag(1, 10), whose maximum on every circle is known."""

    H = np.array([1.0, 10.0])

    def __init__(self, w):
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.gradients = self.probes = 0
        self.fail_at = None  # (pass, value): this pass's loss is multiplied by the value

    def loss(self):
        return 0.5 * (torch.tensor(self.H) * self.w**2).sum()

    def gradient(self):
        loss = self.loss()
        if self.fail_at is not None and self.gradients == self.fail_at:
            loss = loss * math.nan
        self.gradients += 1
        loss.backward()
        return loss.detach()

    def probe(self):
        self.probes += 1
        assert not torch.is_grad_enabled()
        return self.loss()

    def run(self, state=None, **arguments):
        state = XSAMState() if state is None else state
        keywords = {k: arguments.pop(k) for k in ("loss_scaling",) if k in arguments}
        update = xsam_gradient([self.w], self.gradient, self.probe, XSAMArguments(**arguments), state, **keywords)
        return update, state


def flat_gradient(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def closures(model, x, y):
    def gradient():
        loss = model(x, y)["loss"]
        loss.backward()
        return loss.detach()

    return gradient, lambda: model(x, y)["loss"]


@pytest.mark.parametrize("alpha", [None, 0.0, 1.0, 1.7])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_direction_and_search_agree_with_the_oracle(dtype, tolerance, k, alpha):
    data, model = Points(8, dtype), Classifier(dtype=dtype)
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().numpy()
    x, y = data.x.double().numpy(), data.y.numpy()
    network = oracle.TanhNetwork(INPUTS, HIDDEN, CLASSES)
    expected, best, losses = oracle.xsam_direction(
        theta, lambda t: network.loss(t, x, y), lambda t: network.gradient(t, x, y), rho=0.5, k=k, alpha=alpha
    )
    arguments = XSAMArguments(rho=0.5, ascent_steps=k, alpha=alpha)
    update = xsam_gradient(model, *closures(model, data.x, data.y), arguments, XSAMState())
    assert np.abs(flat_gradient(model).double().numpy() - expected).max() <= tolerance
    assert update.alpha == pytest.approx(best)
    if alpha is None:
        assert 0 < best < 2  # interior, or the argmax would say little
        assert np.abs(np.array(update.search.losses) - losses).max() <= tolerance
    else:
        assert update.search is None


def test_one_search_is_worth_its_name():
    """α* differs from SAM's direction, and the loss along it is higher: the search changes the update."""
    data = Points(8)
    found = {}
    for alpha in (None, 1.0):
        model = Classifier()
        arguments = XSAMArguments(rho=0.5, alpha=alpha)
        found[alpha] = (
            xsam_gradient(model, *closures(model, data.x, data.y), arguments, XSAMState()),
            flat_gradient(model),
        )
    search = found[None][0].search
    assert (
        search.alpha != 1
        and search.gain > 0
        and max(search.losses) == search.losses[search.alphas.index(search.alpha)]
    )
    assert search.gain == pytest.approx(max(search.losses) - search.losses[10])
    assert (found[None][1] - found[1.0][1]).abs().max() > 1e-3
    assert found[None][1].norm().item() == pytest.approx(found[1.0][1].norm().item(), rel=1e-6)  # only turned


@pytest.mark.parametrize("rho, k", [(0.2, 1), (0.3, 1), (0.5, 1), (1.0, 1), (0.3, 3)])
def test_grid_search_finds_the_maximum_on_the_circle_of_a_quadratic(rho, k):
    # Two weights: the arc is the whole circle of radius ρ_max around w, and its true maximum can be computed.
    w = np.array([1.0, 0.1])
    update, state = Quadratic(w).run(rho=rho, ascent_steps=k)
    turns = np.linspace(-np.pi, np.pi, 2_000_001)
    point = w + 2 * rho * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    best = turns[np.argmax((0.5 * Quadratic.H * point**2).sum(1))]
    step = w.copy()
    for _ in range(k):
        step = step + rho / k * Quadratic.H * step / np.linalg.norm(Quadratic.H * step)
    start = np.arctan2(*(step - w)[::-1])
    true_alpha = (best - start) / float(update.angle)
    assert 0 < true_alpha < 2 and not state.alpha_at_edge
    assert abs(state.alpha - true_alpha) <= 0.05 + 1e-6  # half a grid step


def test_a_maximum_beyond_the_grid_is_reported_as_an_edge():
    _, state = Quadratic([1.0, 0.1]).run(rho=0.1, rho_max=0.3)  # wants 2.29
    assert state.alpha == 2 and state.alpha_at_edge


def test_ascent_is_second_order_accurate():
    # g_1 − g_0 − ρ H g_0/‖g_0‖ vanishes for a quadratic and falls as ρ² for a smooth loss.
    data, errors = Points(8, torch.float64), []
    reference = Classifier(dtype=torch.float64)
    weights = list(reference.parameters())
    g0 = torch.autograd.grad(reference(data.x, data.y)["loss"], weights, create_graph=True)
    unit = [g.detach() / torch.cat([h.reshape(-1) for h in g0]).norm().detach() for g in g0]
    hessian_unit = torch.autograd.grad(sum((g * u).sum() for g, u in zip(g0, unit, strict=True)), weights)
    linear = [torch.cat([t.detach().reshape(-1) for t in part]) for part in (g0, hessian_unit)]
    for rho in (1e-2, 5e-3):
        model = Classifier(dtype=torch.float64)
        xsam_gradient(model, *closures(model, data.x, data.y), XSAMArguments(rho=rho, alpha=1.0), XSAMState())
        errors.append((flat_gradient(model) - linear[0] - rho * linear[1]).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("k", [1, 3])
def test_passes_and_probes_are_counted(k):
    for arguments, gradients, probes in [
        ({"rho": 0.0}, 1, 0),
        ({"rho": 0.1, "alpha": 1.0}, k + 1, 0),
        ({"rho": 0.1}, k + 1, 21),
        ({"rho": 0.1, "alpha_samples": 5}, k + 1, 5),
    ]:
        toy = Quadratic([1.0, 0.1])
        toy.run(ascent_steps=k, **arguments)
        assert (toy.gradients, toy.probes) == (gradients, probes)


def test_total_ascent_length_is_rho_for_every_number_of_steps():
    # For L = ½‖w‖² every gradient points outwards: k steps of ρ/k end at ‖w‖ + ρ whatever k is.
    for k in (1, 2, 5):
        w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))

        def gradient(w=w):
            loss = 0.5 * (w**2).sum()
            loss.backward()
            return loss.detach()

        update = xsam_gradient([w], gradient, gradient, XSAMArguments(rho=0.5, ascent_steps=k, alpha=1.0), XSAMState())
        assert update.last_loss.item() == pytest.approx(0.5 * 5.5**2, rel=1e-12)
        assert update.grad_norm_first.item() == pytest.approx(5) and update.grad_norm_last.item() == pytest.approx(5.5)
        assert w.grad.tolist() == pytest.approx([3.3, 4.4]) and w.tolist() == [3, 4]


def test_searches_follow_the_schedule_and_alpha_is_kept_between():
    toy, state = Quadratic([1.0, 0.1]), XSAMState()
    searched = []
    for i in range(7):
        toy.w.grad = None
        update, _ = toy.run(state, rho=0.3, alpha_search_steps=3)
        searched.append(update.search is not None)
        assert update.alpha == state.alpha == 1.5, i
    assert searched == [True, False, False, True, False, False, True]
    state = XSAMState(search_due=False)
    update, _ = toy.run(state, rho=0.3)
    assert update.search is None and update.alpha == 1
    state.search_due = True
    assert toy.run(state, rho=0.3)[0].search is not None and state.search_due is False
    with pytest.raises(ValueError, match="alpha_search_steps.*whole number"):
        toy.run(rho=0.3, alpha_search_steps=0.5)


class TestNonFinite:
    W = (1.0, 0.1)

    @pytest.mark.parametrize("k", [1, 2])
    def test_first_later_pass_falls_back_to_g0(self, k):
        toy = Quadratic(self.W)
        toy.fail_at = 1
        update, _ = toy.run(rho=0.3, ascent_steps=k, alpha=1.7)
        assert toy.w.grad.tolist() == pytest.approx([1.0, 1.0], rel=1e-12)  # H w
        assert update.fell_back and toy.w.tolist() == list(self.W)

    def test_last_of_several_falls_back_to_the_ascent_so_far_with_norm_g0(self):
        toy = Quadratic(self.W)
        toy.fail_at = 2
        update, _ = toy.run(rho=0.3, ascent_steps=2, alpha=1.7)
        step = np.array(self.W)
        for _ in range(2):
            step = step + 0.15 * Quadratic.H * step / np.linalg.norm(Quadratic.H * step)
        along = step - np.array(self.W)
        assert toy.w.grad.tolist() == pytest.approx(list(math.sqrt(2) * along / np.linalg.norm(along)), rel=1e-12)
        assert update.fell_back

    @pytest.mark.parametrize("failing", [0, 1, 2])
    def test_under_loss_scaling_the_scaler_sees_it(self, failing):
        toy = Quadratic(self.W)
        toy.fail_at = failing
        update, state = toy.run(rho=0.3, ascent_steps=2, loss_scaling=True)
        assert not torch.isfinite(toy.w.grad).all() and toy.w.tolist() == list(self.W)
        assert state.alpha == 1 and not update.fell_back

    @pytest.mark.parametrize(
        "changes", [{}, {"gradient_scale": "slope"}, {"alpha": None, "gradient_scale": "slope_max"}]
    )
    def test_a_loss_that_only_moved_weights_leave_undefined_falls_back_though_its_gradient_is_finite(self, changes):
        """−log p: from p = 0.1 the climb ends at p − ρ, where the loss of a negative p is NaN and its gradient −1/p."""

        def run(p, **arguments):
            w = nn.Parameter(torch.tensor([p], dtype=torch.float64))

            def gradient():
                loss = -w.log().sum()
                loss.backward()
                return loss.detach()

            return w, xsam_gradient([w], gradient, lambda: -w.log().sum(), XSAMArguments(**arguments), XSAMState())

        w, update = run(0.1, rho=0.5, **{"alpha": 1.0, **changes})
        assert update.fell_back and w.grad.item() == pytest.approx(-10, rel=1e-12) and w.item() == 0.1
        w, update = run(0.1, rho=0.05, alpha=1.0)
        assert not update.fell_back and w.grad.item() == pytest.approx(-20, rel=1e-12)

    @pytest.mark.parametrize("scale", ["last", "slope"])
    def test_a_loss_that_is_undefined_from_the_first_pass_on_is_left_as_in_plain_training(self, scale):
        """A mean over no labels is one: NaN, with a gradient that is finite. It has no slope either."""
        toy, honest = Quadratic(self.W), Quadratic(self.W)
        of_toy = toy.gradient
        toy.gradient = lambda: of_toy() * math.nan
        update, _ = toy.run(rho=0.3, alpha=1.7, gradient_scale=scale)
        honest.run(rho=0.3, alpha=1.7)
        assert not update.fell_back and toy.w.grad.tolist() == pytest.approx(honest.w.grad.tolist(), rel=1e-12)

    def test_a_slope_that_is_not_finite_scales_nothing(self):
        toy, honest, defined = Quadratic(self.W), Quadratic(self.W), Quadratic(self.W)
        toy.probe = lambda: torch.tensor(math.inf, dtype=torch.float64)
        toy.run(rho=0.3, alpha=1.7, gradient_scale="slope_max")
        honest.run(rho=0.3, alpha=1.7)
        defined.run(rho=0.3, alpha=1.7, gradient_scale="slope_max")
        assert toy.w.grad.tolist() == pytest.approx(honest.w.grad.tolist(), rel=1e-12)
        assert toy.w.grad.tolist() != pytest.approx(defined.w.grad.tolist(), rel=1e-3)

    def test_first_pass_is_left_as_in_plain_training(self):
        toy = Quadratic(self.W)
        toy.fail_at = 0
        update, state = toy.run(rho=0.3)
        assert not torch.isfinite(toy.w.grad).any() and toy.w.tolist() == list(self.W)
        assert state.alpha == 1 and not update.fell_back

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_probe_that_is_not_finite_never_wins(self, bad):
        toy = Quadratic(self.W)
        honest, state = toy.loss, XSAMState()
        best = Quadratic(self.W).run(rho=0.3)[1].alpha
        seen = []

        def probe():
            seen.append(None)
            return torch.tensor(bad, dtype=torch.float64) if len(seen) - 1 == round(best * 10) else honest()

        toy.probe = probe
        toy.run(state, rho=0.3)
        assert abs(state.alpha - best) == pytest.approx(0.1)  # the runner-up
        toy.probe = lambda: torch.tensor(bad, dtype=torch.float64)
        kept = state.alpha
        update, _ = toy.run(state, rho=0.3)
        state.search_due = True
        update, _ = toy.run(state, rho=0.3)
        assert update.search.alpha is None and state.alpha == kept

    def test_a_zero_gradient_stays_zero(self):
        toy = Quadratic([0.0, 0.0])
        _, state = toy.run(rho=0.3)
        assert toy.w.grad.tolist() == [0, 0] and toy.w.tolist() == [0, 0] and state.alpha == 1

    def test_negative_losses_are_searched_too(self):
        # The authors' script starts from a best loss of 0 and returns α = 0 for every negative loss.
        toy, shifted = Quadratic(self.W), Quadratic(self.W)
        honest = shifted.loss
        shifted.loss = lambda: honest() - 1000
        assert toy.run(rho=0.3)[1].alpha == shifted.run(rho=0.3)[1].alpha == 1.5


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["first", "second", "third", "probe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exception_leaves_the_weights_whole(dtype, where, error):
    data, model = Points(8, dtype), Classifier(dtype=dtype, batch_norm=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradient, probe = closures(model, data.x, data.y)
    calls = {"gradient": 0, "moved": False}

    def failing_gradient():
        calls["gradient"] += 1
        calls["moved"] = not torch.equal(model.first.weight, before["first.weight"])
        if calls["gradient"] == {"first": 1, "second": 2, "third": 3}.get(where):
            raise error
        return gradient()

    def failing_probe():
        calls["moved"] = not torch.equal(model.first.weight, before["first.weight"])
        if where == "probe":
            raise error
        return probe()

    model.train()
    with pytest.raises(type(error)):
        xsam_gradient(model, failing_gradient, failing_probe, XSAMArguments(rho=0.5, ascent_steps=2), XSAMState())
    assert calls["moved"] == (where != "first")  # it did happen at moved weights
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_all_passes_draw_the_same_masks_and_the_stream_moves_on_once():
    data, model = Points(8), Classifier(dropout=0.5)
    gradient, probe = closures(model, data.x, data.y)
    masks = []
    model.dropout.register_forward_hook(lambda module, args, output: masks.append(output == 0))
    model.train()
    torch.manual_seed(3)
    gradient()
    stream = torch.rand(3)
    model.zero_grad()
    masks.clear()
    torch.manual_seed(3)

    def greedy_probe():
        loss = probe()
        torch.rand(5)  # a forward pass without a gradient may draw more
        return loss

    xsam_gradient(model, gradient, greedy_probe, XSAMArguments(rho=0.5, ascent_steps=2), XSAMState())
    assert torch.equal(torch.rand(3), stream)
    assert len(masks) == 24 and all(torch.equal(mask, masks[0]) for mask in masks)
    gradient()
    assert not torch.equal(masks[-1], masks[0])  # without replay they differ


def test_without_common_random_numbers_the_search_would_be_noise():
    data = Points(32)

    def roughness(replayed):
        model = Classifier(dropout=0.3)
        gradient, probe = closures(model, data.x, data.y)
        loose = RandomState.capture()

        def own_masks():
            nonlocal loose
            loose.restore()
            loss = probe()
            loose = RandomState.capture()
            return loss

        chosen = probe if replayed else own_masks
        update = xsam_gradient(model, gradient, chosen, XSAMArguments(rho=0.5), XSAMState())
        return float(np.diff(update.search.losses, 2).std())

    assert roughness(False) > 100 * roughness(True)


def test_batch_norm_statistics_move_once_with_a_module_and_in_every_pass_with_bare_weights():
    data = Points(8)
    plain, ours, bare = (Classifier(batch_norm=True).train() for _ in range(3))
    closures(plain, data.x, data.y)[0]()
    arguments = XSAMArguments(rho=0.5, ascent_steps=2)
    xsam_gradient(ours, *closures(ours, data.x, data.y), arguments, XSAMState())
    xsam_gradient(bare.parameters(), *closures(bare, data.x, data.y), arguments, XSAMState())
    for (name, a), b, c in zip(plain.named_buffers(), ours.buffers(), bare.buffers(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


def test_frozen_weights_do_not_move_and_unused_ones_get_no_gradient():
    data, model = Points(8), Classifier()
    model.first.weight.requires_grad_(False)
    unused = model.unused = nn.Parameter(torch.ones(3))
    frozen = model.first.weight.clone()
    seen = []
    gradient, probe = closures(model, data.x, data.y)

    def watching():
        seen.append(model.first.weight.clone())
        return gradient()

    xsam_gradient(model, watching, probe, XSAMArguments(rho=0.5), XSAMState())
    assert all(torch.equal(value, frozen) for value in seen) and model.first.weight.grad is None
    assert unused.grad is None
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Unfreeze"):
        xsam_gradient(model, gradient, probe, XSAMArguments(), XSAMState())


def test_a_weight_with_a_gradient_in_the_first_pass_only_moves_and_takes_part():
    # A mixture of experts: the second weight is used at θ_0 only. Then g_1 = (·, 0) and v_0 has both parts.
    w = [nn.Parameter(torch.tensor([float(i + 1)], dtype=torch.float64)) for i in range(2)]
    calls = []

    def gradient():
        calls.append([p.item() for p in w])
        loss = (w[0] ** 2).sum() + ((w[1] ** 2).sum() if len(calls) == 1 else 0)
        loss.backward()
        return loss.detach()

    xsam_gradient(w, gradient, gradient, XSAMArguments(rho=0.1, alpha=0.5), XSAMState())
    g0, g1 = np.array([2.0, 4.0]), np.array([2 * calls[1][0], 0.0])
    v0, v1 = g0 / np.linalg.norm(g0), g1 / np.linalg.norm(g1)
    expected = np.linalg.norm(g1) * oracle.rotate(v0, v1, 0.5)
    assert calls[1][1] == pytest.approx(2 + 0.1 * v0[1])
    assert [p.grad.item() for p in w] == pytest.approx(list(expected), rel=1e-12)


def test_half_precision_weights_move_and_come_back():
    data, model = Points(8, torch.bfloat16), Classifier(dtype=torch.bfloat16)
    before = [p.clone() for p in model.parameters()]
    update = xsam_gradient(model, *closures(model, data.x, data.y), XSAMArguments(rho=0.5), XSAMState())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    norm = torch.cat([p.grad.double().reshape(-1) for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(update.grad_norm_last.item(), rel=2e-2)
    assert update.last_loss > update.loss


def test_rho_zero_is_one_plain_pass_and_still_reports_the_loss():
    toy, plain = Quadratic([1.0, 0.1]), Quadratic([1.0, 0.1])
    loss = plain.gradient()
    update, _ = toy.run(rho=0.0)
    assert torch.equal(toy.w.grad, plain.w.grad) and update.loss == loss
    assert update.grad_norm_first.item() == pytest.approx(math.sqrt(2))


def test_a_weight_that_is_listed_twice_counts_once():
    found = []
    for twice in (False, True):
        model, data = Classifier(), Points(8)
        weights = [*model.parameters(), *([model.second.weight] if twice else [])]
        update = xsam_gradient(weights, *closures(model, data.x, data.y), XSAMArguments(rho=2.0), XSAMState())
        found.append((flat_gradient(model), update.angle, update.search.losses))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


def test_an_enclosing_autocast_region_does_not_hide_the_moves():
    found = []
    for enclosing in (False, True):
        model, data = Classifier(), Points(8)

        def loss(model=model, data=data, enclosing=enclosing):
            if enclosing:
                return model(data.x, data.y)["loss"]
            with torch.autocast("cpu", torch.bfloat16):
                return model(data.x, data.y)["loss"]

        def gradient(loss=loss):
            value = loss()
            value.backward()
            return value.detach()

        with torch.autocast("cpu", torch.bfloat16, enabled=enclosing):
            seen = xsam_gradient(model, gradient, loss, XSAMArguments(rho=2.0), XSAMState())
            assert loss() == seen.loss
        assert seen.last_loss > seen.loss + 0.1
        found.append((seen.last_loss, seen.search.losses, flat_gradient(model)))
    assert found[0][:2] == found[1][:2] and torch.equal(found[0][2], found[1][2])


@pytest.mark.parametrize("kind", ["instance norm", "spectral norm"])
def test_other_running_statistics_move_once_too(kind):
    def build():
        torch.manual_seed(0)
        if kind == "instance norm":
            return nn.Sequential(
                nn.Conv1d(1, 3, 2), nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten(), nn.Linear(12, 1)
            )
        return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Linear(4, 1))

    x, buffers = Points(8).x[:, None], []
    for rho in (0.0, 0.5):
        model = build()

        def gradient(model=model):
            loss = model(x).square().mean()
            loss.backward()
            return loss.detach()

        xsam_gradient(model, gradient, lambda m=model: m(x).square().mean(), XSAMArguments(rho=rho), XSAMState())
        buffers.append(list(model.buffers()))
    assert buffers[0] and all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


@pytest.mark.parametrize("alpha", [None, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("perturbation", ["sam", "vasso", "asam"])
def test_a_step_that_is_too_short_for_the_dtype_leaves_the_plain_gradient(alpha, perturbation):
    model, state = Classifier(), XSAMState(alpha=2.0)
    data = Points(8)
    gradient, loss = closures(model, data.x, data.y)
    gradient()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    arguments = XSAMArguments(rho=1e-30, alpha=alpha, perturbation=perturbation)
    seen = xsam_gradient(model, gradient, loss, arguments, state)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    assert seen.grad_norm_last == seen.grad_norm_first and not seen.fell_back
