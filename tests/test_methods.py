"""Every ascent, direction and scale against the oracle (flat float64), the identities between them, and where they differ."""

import itertools
import math

import numpy as np
import oracle
import pytest
import torch
from torch import nn
from toys import CLASSES, HIDDEN, INPUTS, Classifier, Points

from xsam_hf import XSAMArguments, XSAMState, xsam_gradient


RHO = 0.5


def flat(model, of=lambda p: p.detach()):
    return torch.cat([of(p).reshape(-1) for p in model.parameters()])


def updates(count=1, dtype=torch.float64, lr=0.3, state=None, **changes):
    """The gradients of some updates of plain SGD, each on its own batch, and what every update saw."""
    model, state = Classifier(dtype=dtype), XSAMState() if state is None else state
    gradients, seen = [], []
    for i in range(count):
        data = Points(8, dtype, seed=i)

        def gradient(data=data):
            loss = model(data.x, data.y)["loss"]
            loss.backward()
            return loss.detach()

        state.search_due = i == 0
        arguments = XSAMArguments(rho=RHO, **changes)
        seen.append(xsam_gradient(model, gradient, lambda d=data: model(d.x, d.y)["loss"], arguments, state))
        gradients.append(flat(model, lambda p: p.grad.clone()))
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(lr * p.grad)
        model.zero_grad()
    return gradients, seen


def expected(method, count=1, lr=0.3, **changes):
    network = oracle.TanhNetwork(INPUTS, HIDDEN, CLASSES)
    theta, found = flat(Classifier(dtype=torch.float64)).numpy(), []
    for i in range(count):
        data = Points(8, torch.float64, seed=i)
        x, y = data.x.numpy(), data.y.numpy()
        g = method.update(
            theta,
            lambda t, x=x, y=y: network.loss(t, x, y),
            lambda t, x=x, y=y: network.gradient(t, x, y),
            RHO,
            **changes,
        )
        found.append(g)
        theta = theta - lr * g
    return found


MATRIX = np.concatenate([np.full(p.numel(), p.ndim > 1) for p in Classifier().parameters()])
BIASES = ~MATRIX
SUMS = ["lsam", "lsam+", "msam", "msam+"]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("scale", ["last", "first", "mean", "max", "slope", "slope_max"])
@pytest.mark.parametrize("direction", ["arc", *SUMS])
def test_directions_and_scales_agree_with_the_oracle(direction, scale, k):
    alpha = {"alpha": 1.7} if direction == "arc" else {}
    (found,), _ = updates(direction=direction, gradient_scale=scale, ascent_steps=k, **alpha)
    (wanted,) = expected(oracle.Method(direction=direction, scale=scale), k=k, **alpha)
    assert np.abs(found.numpy() - wanted).max() <= 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("scope, matrix", [("weights", MATRIX), ("all", None)])
def test_asam_agrees_with_the_oracle(scope, matrix, alpha, k):
    method = oracle.Method("asam", eta=0.1, matrix=matrix)
    (found,), _ = updates(perturbation="asam", asam_eta=0.1, asam_scope=scope, alpha=alpha, ascent_steps=k)
    (wanted,) = expected(method, k=k, alpha=alpha)
    assert np.abs(found.numpy() - wanted).max() <= 1e-12


@pytest.mark.parametrize("direction", ["arc", *SUMS])
@pytest.mark.parametrize("perturbation, names", [("vasso", {"vasso_decay": 0.3}), ("fsam", {"fsam_sigma": 0.7, "fsam_lambda": 0.6})])  # fmt: skip
def test_running_averages_agree_with_the_oracle_over_updates(perturbation, names, direction):
    method = oracle.Method(perturbation, direction, phi=0.3, sigma=0.7, lam=0.6)
    alpha = {"alpha": 1.3} if direction == "arc" else {}
    found, _ = updates(4, perturbation=perturbation, direction=direction, **names, **alpha)
    for ours, wanted in zip(found, expected(method, 4, **alpha), strict=True):
        assert np.abs(ours.numpy() - wanted).max() <= 1e-12


@pytest.mark.parametrize("alpha, direction, k", [(None, "arc", 1), (1.7, "arc", 2), (None, "msam+", 2)])
def test_excluded_weights_are_trained_but_not_perturbed(alpha, direction, k):
    method = oracle.Method(direction=direction, frozen=BIASES)
    keyword = {"alpha": alpha} if direction == "arc" else {}
    found, seen = updates(2, rho_exclude=["bias$"], direction=direction, ascent_steps=k, **keyword)
    first = expected(method, 1, k=k, **keyword)[0]
    assert np.abs(found[0].numpy() - first).max() <= 1e-12
    everything, _ = updates(2, direction=direction, ascent_steps=k, **keyword)
    assert (found[0] - everything[0]).abs().max() > 1e-3


def equal(a, b, tolerance=1e-12):
    return all((x - y).abs().max() <= tolerance for x, y in zip(a, b, strict=True))


def test_identities_hold():
    sam, _ = updates(3, alpha=1.0)
    for same in (
        {"direction": "lsam"},
        {"direction": "msam"},
        {"alpha": 1.0, "perturbation": "vasso", "vasso_decay": 1.0},
        {"alpha": 1.0, "perturbation": "fsam", "fsam_sigma": 0.0},
        {"alpha": 1.0, "alpha_max": 3.0, "rho_max": 9.0},
    ):
        assert equal(updates(3, **same)[0], sam), same


def test_asam_without_a_scale_is_sam():
    # T = |θ| + η = 1 everywhere: all weights ±0.5, η = 0.5.
    found = {}
    for perturbation, eta in (("sam", 0.0), ("asam", 0.5), ("asam ", 0.4)):
        model, data = Classifier(dtype=torch.float64), Points(8, torch.float64)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.where(p > 0, 0.5, -0.5))

        def gradient(model=model, data=data):
            loss = model(data.x, data.y)["loss"]
            loss.backward()
            return loss.detach()

        arguments = XSAMArguments(
            rho=RHO, alpha=1.0, perturbation=perturbation.strip(), asam_eta=eta, asam_scope="all"
        )
        xsam_gradient(model, gradient, gradient, arguments, XSAMState())
        found[perturbation] = flat(model, lambda p: p.grad)
    assert torch.allclose(found["sam"], found["asam"], rtol=0, atol=1e-14)
    # A T that is a constant only changes the length: 0.9² / 0.9 of ρ.
    assert (found["sam"] - found["asam "]).abs().max() > 1e-3


def test_what_is_not_the_same_differs():
    k2 = {"ascent_steps": 2}
    methods = {
        "sam": {"alpha": 1.0, **k2},
        "arc 0": {"alpha": 0.0, **k2},
        "arc 1.7": {"alpha": 1.7, **k2},
        "lsam": {"direction": "lsam", **k2},
        "lsam+": {"direction": "lsam+", **k2},
        "msam": {"direction": "msam", **k2},
        "msam+": {"direction": "msam+", **k2},
        "asam": {"alpha": 1.0, "perturbation": "asam", **k2},
        "asam all": {"alpha": 1.0, "perturbation": "asam", "asam_scope": "all", **k2},
        "vasso": {"alpha": 1.0, "perturbation": "vasso"},
        "fsam": {"alpha": 1.0, "perturbation": "fsam"},
        "sam 1": {"alpha": 1.0},
        "first": {"alpha": 1.0, "gradient_scale": "first"},
        "mean": {"alpha": 1.0, "gradient_scale": "mean"},
        "slope": {"alpha": 1.0, "gradient_scale": "slope"},
        "slope_max": {"alpha": 1.0, "gradient_scale": "slope_max"},
    }
    found = {name: updates(2, **changes)[0][1] for name, changes in methods.items()}
    for one, other in itertools.combinations(found, 2):
        assert (found[one] - found[other]).abs().max() > 1e-5, (one, other)


def test_only_the_direction_differs_between_methods():
    for changes in (*({"direction": d} for d in SUMS), {"alpha": 0.3}, {"alpha": 1.7, "perturbation": "asam"}):
        (found,), (seen,) = updates(ascent_steps=2, **changes)
        assert found.norm().item() == pytest.approx(seen.grad_norm_last.item(), rel=1e-12)


def test_passes_of_every_method():
    for changes, gradients, probes in [
        ({"direction": "msam+", "ascent_steps": 3}, 4, 0),
        ({"perturbation": "asam"}, 2, 21),
        ({"perturbation": "vasso"}, 2, 21),
        ({"alpha": 1.0, "gradient_scale": "slope"}, 2, 0),
        ({"alpha": 1.0, "gradient_scale": "slope_max"}, 2, 1),
    ]:
        w, calls = nn.Parameter(torch.tensor([1.0, 0.1], dtype=torch.float64)), {"gradient": 0, "probe": 0}

        def loss(w=w):
            return 0.5 * (w**2 * torch.tensor([1.0, 10.0])).sum()

        def gradient(calls=calls, loss=loss):
            calls["gradient"] += 1
            value = loss()
            value.backward()
            return value.detach()

        def probe(calls=calls, loss=loss):
            calls["probe"] += 1
            return loss()

        before = w.detach().clone()
        xsam_gradient([w], gradient, probe, XSAMArguments(rho=0.1, **changes), XSAMState())
        assert calls == {"gradient": gradients, "probe": probes}
        assert torch.equal(w, before)


@pytest.mark.parametrize("direction", ["arc", *SUMS])
@pytest.mark.parametrize("perturbation", ["sam", "asam", "vasso", "fsam"])
def test_a_later_pass_that_is_not_finite_falls_back_for_every_method(perturbation, direction):
    w = nn.Parameter(torch.tensor([1.0, 0.1], dtype=torch.float64))
    passes = []

    def gradient():
        loss = 0.5 * (w**2 * torch.tensor([1.0, 10.0])).sum() * (float("nan") if len(passes) == 1 else 1.0)
        passes.append(loss)
        loss.backward()
        return loss.detach()

    alpha = {"alpha": 1.7} if direction == "arc" else {}
    arguments = XSAMArguments(rho=0.3, perturbation=perturbation, direction=direction, asam_scope="all", **alpha)
    update = xsam_gradient([w], gradient, gradient, arguments, XSAMState())
    assert update.fell_back and w.grad.norm().item() == pytest.approx(2**0.5, rel=1e-12)  # ‖H w‖
    if perturbation != "asam":
        assert w.grad.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("scale", ["last", "first", "mean", "slope", "slope_max"])
def test_the_fallback_has_the_norm_of_g0_whatever_the_scale(scale):
    w, factors = nn.Parameter(torch.tensor([1.0, 0.1], dtype=torch.float64)), [1.0, float("nan"), 1.0]

    def gradient():
        loss = 0.5 * (w**2 * torch.tensor([1.0, 10.0])).sum() * factors.pop(0)
        loss.backward()
        return loss.detach()

    arguments = XSAMArguments(rho=0.3, alpha=1.7, gradient_scale=scale)
    update = xsam_gradient([w], gradient, lambda: (w**2).sum(), arguments, XSAMState())
    assert update.fell_back
    assert w.grad.tolist() == pytest.approx([1.0, 1.0])


def test_where_the_loss_falls_the_slope_is_zero():
    w, signs = nn.Parameter(torch.tensor([1.0], dtype=torch.float64)), [1.0, -5.0]

    def gradient():
        loss = w.sum() * signs.pop(0)  # up the first pass's slope, and the second pass finds −5
        loss.backward()
        return loss.detach()

    arguments = XSAMArguments(rho=0.3, alpha=1.0, gradient_scale="slope")
    xsam_gradient([w], gradient, gradient, arguments, XSAMState())
    assert w.grad.tolist() == [0.0]


def test_an_excluded_gradient_that_is_not_finite_is_a_fallback_too():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.moved = nn.Parameter(torch.tensor([1.0, 0.1], dtype=torch.float64))
            self.still = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    model, passes = Two(), []

    def gradient():
        passes.append(1)
        factor = float("nan") if len(passes) == 2 else 1.0
        loss = 0.5 * (model.moved**2 * torch.tensor([1.0, 10.0])).sum()
        loss.backward()
        (model.still * factor).sum().backward()
        return loss.detach()

    arguments = XSAMArguments(rho=0.3, alpha=1.7, rho_exclude=["still"])
    update = xsam_gradient(model, gradient, gradient, arguments, XSAMState())
    assert update.fell_back and model.moved.grad.tolist() == pytest.approx([1.0, 1.0])
    assert model.still.grad.tolist() == [0.0]


def test_a_first_gradient_that_is_not_finite_leaves_the_averages_alone():
    for perturbation in ("vasso", "fsam"):
        state = XSAMState()
        w = nn.Parameter(torch.tensor([1.0, 0.1], dtype=torch.float64))
        factor = [1.0]

        def gradient(w=w, factor=factor):
            loss = 0.5 * (w**2 * torch.tensor([1.0, 10.0])).sum() * factor[0]
            loss.backward()
            return loss.detach()

        for value in (1.0, float("inf"), float("nan")):
            factor[0] = value
            w.grad = None
            arguments = XSAMArguments(rho=0.3, alpha=1.0, perturbation=perturbation)
            xsam_gradient([w], gradient, gradient, arguments, state, loss_scaling=True)
            assert state.average["0"].tolist() == pytest.approx([1.0, 1.0])
            # What the GradScaler looks for is there.
            assert torch.isfinite(w.grad).all().item() == (value == 1.0)


# --- averages and sums at their edges


H = torch.tensor([1.0, 10.0], dtype=torch.float64)


def one_update(state, factors=(), w=(1.0, 0.1), loss_scaling=False, **changes):
    """One update on ½ wᵀ H w; the i-th pass's loss is multiplied by the i-th factor. Returns the gradient."""
    weight, left = nn.Parameter(torch.tensor(w, dtype=torch.float64)), list(factors)

    def gradient():
        loss = 0.5 * (H * weight**2).sum() * (left.pop(0) if left else 1.0)
        loss.backward()
        return loss.detach()

    arguments = XSAMArguments(rho=0.3, **changes)
    xsam_gradient([weight], gradient, lambda: 0.5 * (H * weight**2).sum(), arguments, state, loss_scaling=loss_scaling)
    return weight.grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("perturbation", ["vasso", "fsam"])
def test_an_average_survives_a_very_first_gradient_that_is_not_finite(perturbation, bad):
    state = XSAMState()
    one_update(state, [bad], perturbation=perturbation, alpha=1.0)
    g = one_update(state, perturbation=perturbation, alpha=1.0)
    assert torch.isfinite(state.average["0"]).all()
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


def test_a_fixed_alpha_asks_for_no_search_schedule():
    one_update(XSAMState(), alpha=1.0, alpha_search_steps=0.5)


@pytest.mark.parametrize("perturbation", ["vasso", "fsam"])
def test_averages_belong_to_weights_and_not_to_their_places(perturbation):
    """Layers that are trained in turn: each has the average of its own gradients, and a new one begins anew."""
    a, b = (nn.Parameter(torch.tensor(w, dtype=torch.float64)) for w in ([1.0, 0.1], [2.0, 0.3]))
    names = {"a": a, "b": b}
    state, arguments = XSAMState(), XSAMArguments(rho=0.3, alpha=1.0, perturbation=perturbation)

    def update(*trained):
        for name, weight in names.items():
            weight.requires_grad_(name in trained)
            weight.grad = None

        def gradient():
            loss = sum(0.5 * (H * weight**2).sum() for weight in names.values())
            loss.backward()
            return loss.detach()

        xsam_gradient(names, gradient, gradient, arguments, state)
        return {name: names[name].grad.clone() for name in trained}

    update("a")
    first = state.average["a"].clone()
    assert first.tolist() == pytest.approx((H * a.detach()).tolist()) and "b" not in state.average
    alone = update("b")
    assert torch.equal(state.average["a"], first)
    assert alone["b"].tolist() == pytest.approx(one_update(XSAMState(), w=(2.0, 0.3), alpha=1.0).tolist())  # SAM's
    with torch.no_grad():
        a.mul_(3)  # another gradient than the average's
    update("a", "b")
    weight = {"vasso": 0.4, "fsam": 0.1}[perturbation]
    assert state.average["a"].tolist() == pytest.approx(((1 - weight) * first + weight * 3 * first).tolist())
