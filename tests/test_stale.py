"""Stale ascent against a hand loop (flat float64): one pass an update, at moved weights that nobody else sees."""

import json
import signal

import numpy as np
import oracle
import pytest
import torch
from test_methods import BIASES, RHO, flat, updates
from torch import nn
from toys import CLASSES, HIDDEN, INPUTS, Classifier, Points, build, train, weights_of
from transformers import TrainerCallback

from xsam_hf import XSAMArguments, XSAMState, XSAMTrainer, xsam_gradient


NETWORK = oracle.TanhNetwork(INPUTS, HIDDEN, CLASSES)
RHO_MAX = 4.0  # so large that the top of the arc is not at 1
STALE = {"perturbation": "stale", "rho": RHO, "rho_max": RHO_MAX}


def by_hand(batches, theta, step, decay=0.5, frozen=None, **changes):
    """The weights after an update on each batch, the losses L(θ + ε), and every α."""
    method, losses, alphas = oracle.Stale(decay, frozen), [], []
    for i, (x, y) in enumerate(batches):
        g, loss, alpha = method.update(
            theta,
            lambda t, x=x, y=y: NETWORK.loss(t, x, y),
            lambda t, x=x, y=y: NETWORK.gradient(t, x, y),
            RHO,
            rho_max=RHO_MAX,
            search=i == 1,
            **changes,
        )
        theta = step(theta, g)
        losses.append(loss)
        alphas.append(alpha)
    return theta, losses, alphas


def batches(n=8, size=8):
    data = Points(32, torch.float64)
    return [(data.x[i : i + size].numpy(), data.y[i : i + size].numpy()) for i in range(0, 32, size)] * (
        n * size // 32
    )


# --- the bare loop ---------------------------------------------------------------------------------------------------


def bare(count=5, lr=0.3, **changes):
    model, state, seen = Classifier(dtype=torch.float64), XSAMState(), []
    for i in range(count):
        data = Points(8, torch.float64, seed=i)
        model.zero_grad()

        def gradient(data=data):
            loss = model(data.x, data.y)["loss"]
            loss.backward()
            return loss.detach()

        arguments = XSAMArguments(**STALE, **changes)
        start = flat(model).clone()
        seen.append(xsam_gradient(model, gradient, lambda d=data: model(d.x, d.y)["loss"], arguments, state))
        assert torch.equal(flat(model), start)
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(lr * p.grad)
    return flat(model).numpy(), seen, state, model


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 1.0, 1.3])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("excluded", [None, ["bias$"]])
def test_it_agrees_with_the_hand_loop(alpha, decay, excluded):
    found, seen, state, model = bare(alpha=alpha, stale_decay=decay, rho_exclude=excluded)
    data = [Points(8, torch.float64, seed=i) for i in range(5)]
    theta = flat(Classifier(dtype=torch.float64)).numpy()
    wanted, losses, alphas = by_hand(
        [(d.x.numpy(), d.y.numpy()) for d in data],
        theta,
        lambda t, g: t - 0.3 * g,
        decay,
        BIASES if excluded else None,
        alpha=alpha,
    )
    assert np.abs(found - wanted).max() <= 1e-10
    assert [float(update.loss) for update in seen] == pytest.approx(losses, abs=1e-10)
    assert state.alpha == pytest.approx(alphas[-1] if alpha is None else 1.0) and (state.alpha != 1) == (alpha is None)
    # The only search, with an average to span the arc, is the second update's.
    assert [update.search is not None for update in seen] == [False, alpha is None, False, False, False]
    # A pass an update; a search is of forward passes alone.
    assert model.backwards == 5 and model.forwards == 5 + 21 * (alpha is None)
    for update in seen:
        assert torch.isnan(update.last_loss) and torch.isnan(update.grad_norm_first) and not update.fell_back
    assert torch.isnan(seen[0].angle) and all(0 < update.angle < np.pi for update in seen[1:])


def test_what_differs():
    found = {
        name: bare(**changes)[0]
        for name, changes in {
            "β .5": {"alpha": 1.0},
            "β 0": {"alpha": 1.0, "stale_decay": 0.0},
            "α 1.3": {"alpha": 1.3},
            "searched": {},
            "no biases": {"alpha": 1.0, "rho_exclude": ["bias$"]},
        }.items()
    }
    found["sam"] = flat(Classifier(dtype=torch.float64)).numpy() - 0.3 * sum(
        g.numpy() for g in updates(5, alpha=1.0)[0]
    )
    for name, weights in found.items():
        assert all(np.abs(weights - other).max() > 1e-3 for n, other in found.items() if n != name), name


def test_alpha_one_asks_for_no_angle():
    state, model = XSAMState(), Classifier(dtype=torch.float64)
    arguments, data = XSAMArguments(**STALE, alpha=1.0), Points(8, torch.float64)

    def gradient():
        loss = model(data.x, data.y)["loss"]
        loss.backward()
        return loss.detach()

    for _ in range(2):
        update = xsam_gradient(model, gradient, gradient, arguments, state, measure=False)
    assert torch.isnan(update.angle)


def one_update(weights, state, factor=1.0, used=None, loss_scaling=False, **changes):
    used = weights if used is None else used

    def loss():
        return factor * sum((i + 1) * w.square().sum() for i, w in enumerate(used.values()))

    def gradient():
        for w in weights.values():
            w.grad = None
        value = loss()
        value.backward()
        return value.detach()

    arguments = XSAMArguments(perturbation="stale", rho=0.5, alpha=1.0, **changes)
    return xsam_gradient(weights, gradient, loss, arguments, state, loss_scaling=loss_scaling)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_counts_as_zero_and_is_forgotten(factor):
    weights, state = {"a": nn.Parameter(torch.tensor([1.0, 2.0]))}, XSAMState()
    assert not one_update(weights, state).fell_back
    average = state.average["a"].clone()
    assert torch.allclose(average, torch.tensor([1.0, 2.0]) / 5**0.5 / 2)
    update = one_update(weights, state, factor)
    assert update.fell_back and weights["a"].grad.tolist() == [0, 0]
    assert torch.equal(state.average["a"], average)
    # A scaler has to see it.
    update = one_update(weights, state, factor, loss_scaling=True)
    assert not update.fell_back and not torch.isfinite(weights["a"].grad).any()
    assert torch.equal(state.average["a"], average) and weights["a"].tolist() == [1, 2]


def test_an_excluded_weight_whose_gradient_is_not_finite_makes_all_zero():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(2)) for _ in range(2))

    model = Two()

    def gradient():
        model.a.grad, model.b.grad = torch.ones(2), torch.tensor([1.0, torch.nan])
        return torch.tensor(0.0)

    arguments = XSAMArguments(perturbation="stale", alpha=1.0, rho_exclude=["b"])
    update = xsam_gradient(model, gradient, gradient, arguments, XSAMState())
    assert update.fell_back and model.a.grad.tolist() == model.b.grad.tolist() == [0, 0]


def test_a_very_first_gradient_of_zero():
    weights, state = {"a": nn.Parameter(torch.zeros(2))}, XSAMState()
    for _ in range(2):
        update = one_update(weights, state)
        assert not update.fell_back and weights["a"].grad.tolist() == [0, 0] and state.average["a"].tolist() == [0, 0]


def test_a_weight_without_a_gradient_forgets_and_stays_without():
    a, b = (nn.Parameter(torch.tensor([float(i)])) for i in (3, 4))
    weights, state = {"a": a, "b": b}, XSAMState()
    one_update(weights, state)
    before = state.average["b"].clone()
    one_update(weights, state, used={"a": a})
    assert b.grad is None and torch.equal(state.average["b"], before / 2)
    assert state.average["a"].item() == pytest.approx(3 / 73**0.5 / 2 / 2 + 0.5)  # ∇ = (2a, 4b) at the first update


def test_weights_that_are_new_to_the_average_get_their_own_gradient():
    """Layers that are trained in turn: the average of the others spans no arc with theirs."""
    state, arguments = XSAMState(), XSAMArguments(perturbation="stale", rho=0.5, alpha=0.5)
    for name in "ab":
        weight = nn.Parameter(torch.tensor([3.0, 4.0]))

        def gradient(weight=weight):
            loss = weight.square().sum()
            loss.backward()
            return loss.detach()

        update = xsam_gradient({name: weight}, gradient, gradient, arguments, state)
        assert weight.grad.tolist() == [6, 8] and torch.isnan(update.angle)


def test_a_pass_that_fails_leaves_no_gradients():
    weight = nn.Parameter(torch.ones(2))

    def gradient():
        weight.grad = torch.ones(2)
        raise torch.OutOfMemoryError("here")

    with pytest.raises(torch.OutOfMemoryError):
        xsam_gradient({"a": weight}, gradient, gradient, XSAMArguments(perturbation="stale"), XSAMState())
    assert weight.grad is None and weight.tolist() == [1, 1]


def test_a_gradient_scaler_changes_nothing():
    """Gradients enter by their direction, whatever the scale is."""
    averages = []
    for factors in ((1, 1, 1), (2.0**10, 2.0**10, 2.0**9)):
        weights, state = {"a": nn.Parameter(torch.tensor([1.0, 2.0]))}, XSAMState()
        for factor in factors:
            one_update(weights, state, factor, loss_scaling=True)
        averages.append(state.average["a"])
    assert torch.allclose(*averages, rtol=1e-6)


# --- the Trainer -----------------------------------------------------------------------------------------------------

SETTINGS = {**STALE, "train_sampling_strategy": "sequential", "learning_rate": 0.1}
LAYOUTS = {"8×1": (8, 1), "4×2": (4, 2), "2×4": (2, 4)}


def run(directory, layout="8×1", trainer=XSAMTrainer, model=None, **changes):
    size, times = LAYOUTS[layout]
    layout = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times}
    model = Classifier(dtype=torch.float64) if model is None else model
    return train(directory, model, Points(32, torch.float64), trainer, **{**SETTINGS, **layout, **changes})


@pytest.mark.parametrize("alpha", [None, 1.0, 1.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trainer_agrees_with_the_hand_loop(tmp_path, layout, alpha):
    # The search of the first update, which has no average yet, is made up for in the second.
    done = run(tmp_path, layout, alpha=alpha, **({"alpha_search_steps": 100} if alpha is None else {}))
    theta = flat(Classifier(dtype=torch.float64)).numpy()
    wanted, losses, alphas = by_hand(batches(), theta, lambda t, g: t - 0.1 * g, alpha=alpha)
    assert np.abs(weights_of(done).numpy() - wanted).max() <= 1e-10
    logs = [entry for entry in done.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(losses, abs=1e-6)
    assert all(entry["xsam/passes"] == 1 for entry in logs)
    assert not any("xsam/sharpness" in entry or "xsam/grad_norm_first" in entry for entry in logs)
    assert all("xsam/grad_norm_last" in entry for entry in logs) and "xsam/angle" in logs[-1]
    assert [entry["xsam/alpha"] for entry in logs] == pytest.approx(alphas)
    assert (alphas[-1] != 1) == (alpha != 1)
    times = LAYOUTS[layout][1]
    assert done.model.backwards == 8 * times and done.model.forwards == (8 + 21 * (alpha is None)) * times


def test_weights_are_away_inside_the_pass_alone(tmp_path):
    seen = {"in": [], "out": []}

    class Watching(XSAMTrainer):
        def compute_loss(self, *args, **kwargs):
            seen["in"].append(weights_of(self))
            return super().compute_loss(*args, **kwargs)

    class Watch(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            seen["out"].append(flat(model).clone())

        on_pre_optimizer_step = on_step_begin = on_substep_end

    build_ = {**SETTINGS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "alpha": 1.0}
    trainer = build(tmp_path, Classifier(), Points(8), Watching, [Watch()], **{**build_, "num_train_epochs": 3})
    trainer.train()
    for update in range(3):
        start, *others = seen["out"][5 * update : 5 * update + 5]
        assert all(torch.equal(other, start) for other in others)
        moved = [(w - start).norm().item() for w in seen["in"][4 * update : 4 * update + 4]]
        assert moved == pytest.approx([RHO * (update > 0)] * 4, rel=1e-5)


@pytest.mark.parametrize("step", range(1, 8))
def test_resume_is_bitwise(tmp_path, step):
    model = lambda: Classifier(dropout=0.3, batch_norm=True, dtype=torch.float64)  # noqa: E731
    settings = {"layout": "4×2", "optim": "adamw_torch", "learning_rate": 0.01}
    whole = run(tmp_path / "a", model=model(), save_strategy="steps", save_steps=1, **settings)
    checkpoint = tmp_path / "a" / f"checkpoint-{step}"
    again = run(tmp_path / "b", model=model(), resume=str(checkpoint), **settings)
    assert torch.equal(weights_of(whole), weights_of(again))
    for name, part in whole._xsam_callback.xsam.average.items():
        assert torch.equal(part, again._xsam_callback.xsam.average[name])
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["XSAMCallback"]["attributes"]["averages"] == 6
    (checkpoint / "xsam_state.safetensors").unlink()
    with pytest.raises(ValueError, match="missing or lacks 6 of 6 averages"):
        run(tmp_path / "c", model=model(), resume=str(checkpoint), **settings)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [1, 2, 3, 21 * 2 + 2])
def test_a_pass_that_fails_leaves_the_weights_whole(tmp_path, error, number):
    class Failing(XSAMTrainer):
        seen, start = 0, None

        def training_step(self, *args, **kwargs):
            if self.state.global_step == 1 and self.start is None:
                self.start = weights_of(self)
            return super().training_step(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.start is not None:
                self.seen += 1
                if self.seen == number:
                    self.moved = weights_of(self)
                    raise error("here")
            return loss

    layout = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = build(tmp_path, Classifier(), Points(), Failing, **{**SETTINGS, **layout})
    with pytest.raises(error):
        trainer.train()
    assert trainer.seen == number and not torch.equal(trainer.moved, trainer.start)
    assert torch.equal(weights_of(trainer), trainer.start)


def test_an_interrupt_outside_the_pass_waits(tmp_path):
    """Ctrl-C between the pass and the restore: the weights are written back first."""
    from xsam_hf import weights as module

    original, pressed = module.copy_, []

    def press(destination, source):
        if len(pressed) < 1:
            pressed.append(signal.raise_signal(signal.SIGINT))
        original(destination, source)

    model, data = Classifier(), Points(8)
    start, state = (
        flat(model).clone(),
        XSAMState(average={"first.weight": torch.ones_like(model.first.weight)}, average_of="stale"),
    )

    def gradient():
        loss = model(data.x, data.y)["loss"]
        loss.backward()
        module.copy_ = press  # the next copy is the restore
        return loss.detach()

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            xsam_gradient(model, gradient, gradient, XSAMArguments(**STALE, alpha=1.0), state)
    finally:
        module.copy_ = original
        signal.signal(signal.SIGINT, handler)
    assert pressed and torch.equal(flat(model), start)


def test_switched_on_and_off(tmp_path):
    """`rho` 0 for some updates: they are plain, and the average waits."""

    class Switch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            args.rho = RHO if state.global_step % 4 < 2 else 0.0

    model = Classifier(dtype=torch.float64)
    trainer = build(tmp_path, model, Points(32, torch.float64), callbacks=[Switch()], **{**SETTINGS, "alpha": 1.0})
    trainer.train()
    method, theta = oracle.Stale(0.5), flat(Classifier(dtype=torch.float64)).numpy()
    for i, (x, y) in enumerate(batches()):
        loss, gradient = (lambda t, f=f, x=x, y=y: f(t, x, y) for f in (NETWORK.loss, NETWORK.gradient))
        g = method.update(theta, loss, gradient, RHO, alpha=1.0)[0] if i % 4 < 2 else gradient(theta)
        theta = theta - 0.1 * g
    assert np.abs(weights_of(trainer).numpy() - theta).max() <= 1e-10


def test_a_large_buffer_that_moves_costs_no_climb(tmp_path):
    """Other methods need a copy of it before the first pass; stale ascent repeats none, and only its search waits."""

    class Big(Classifier):
        def __init__(self):
            super().__init__(dtype=torch.float64)
            self.register_buffer("big", torch.zeros(300_000))

        def forward(self, x, labels=None):
            if self.training:
                self.big += 1
            return super().forward(x, labels)

    with_buffer = run(tmp_path / "a", model=Big(), alpha=1.0)
    assert torch.equal(weights_of(with_buffer), weights_of(run(tmp_path / "b", alpha=1.0)))
    assert with_buffer.model.big[0] == 8 == with_buffer.model.backwards
    searched = run(tmp_path / "c", model=Big(), alpha_search_steps=100)
    assert searched.model.big[0] == 8 and searched.model.forwards == 8 + 21


def test_a_search_waits_for_a_copy_of_what_begins_to_move(tmp_path):
    """The first search would be in update 2, in which the buffer, too large to be copied unseen, moves for the first time."""

    class Big(Classifier):
        def __init__(self):
            super().__init__(dtype=torch.float64)
            self.register_buffer("big", torch.zeros(300_000))
            self.passes, self.probes = 0, []

        def forward(self, x, labels=None):
            if torch.is_grad_enabled():
                self.passes += 1
            else:
                self.probes.append(float(self.big[0]))
            if self.passes > 1:
                self.big += 1
            return super().forward(x, labels)

    searched = run(tmp_path, model=Big(), alpha_search_steps=100)
    assert searched.model.big[0] == 7 and searched.model.passes == 8
    assert searched.model.probes == [1.0] * 21  # update 3 is searched, whose pass starts from what update 2 left


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"ascent_steps": 2}, "`ascent_steps` is 2, but stale .* set it to 1"),
        ({"ascent_scope": "micro"}, "`perturbation` is 'stale', .* set `ascent_scope` to `update`"),
        ({"direction": "lsam"}, "`direction` is 'lsam', .* set it to 'arc'"),
        ({"gradient_scale": "mean"}, "`gradient_scale` is 'mean', .* set it to 'last'"),
        ({"ascent_fraction": 0.5}, "`ascent_fraction` is 0.5, .* set it to 1.0"),
        ({"stale_decay": 1.0}, "`stale_decay` is 1.0: give a share from 0 to below 1"),
        ({"stale_decay": -0.1}, "`stale_decay` is -0.1: give a share"),
    ],
)
def test_what_it_cannot_be_combined_with(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        XSAMArguments(perturbation="stale", **changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_bit_for_bit(dtype):
    model, data, state = Classifier(dtype=dtype), Points(8, dtype), XSAMState()
    start = flat(model).clone()
    for rounding in ("weights", "stochastic"):
        for _ in range(3):
            model.zero_grad()

            def gradient():
                loss = model(data.x, data.y)["loss"]
                loss.backward()
                return loss.detach()

            arguments = XSAMArguments(**STALE, alpha=1.3, perturbation_dtype=rounding)
            xsam_gradient(model, gradient, gradient, arguments, state)
            assert torch.equal(flat(model), start)
            size = torch.cat([p.grad.reshape(-1).double() for p in model.parameters()]).norm()
            assert torch.isfinite(size) and size > 0
