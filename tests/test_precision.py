"""fp16's GradScaler with an overflow in every place, bfloat16 autocast, and gradient checkpointing with dropout."""

import math

import pytest
import torch
from torch import nn
from toys import Classifier, Points, Tokens, arguments, tiny_gpt2

from xsam_hf import SeenAscent, XSAMArguments, XSAMState, XSAMTrainer, xsam_gradient
from xsam_hf.rounding import add_rounded
from xsam_hf.trainer import trainer as trainer_module
from xsam_hf.trainer.precision import taken_in_half


def scaled_update(fail=None, probe_fails=False, **changes):
    """One update under a GradScaler; `fail` is the number of the pass whose gradient overflows."""
    model, data, scaler = Classifier(), Points(8), torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
    optimizer, state, passes = torch.optim.SGD(model.parameters(), lr=0.1), XSAMState(alpha=0.7), []

    def gradient():
        loss = model(data.x, data.y)["loss"]
        factor = math.inf if len(passes) == fail else 1.0
        passes.append(factor)
        scaler.scale(loss * factor).backward()
        return loss.detach()

    def probe():
        return model(data.x, data.y)["loss"] * (math.nan if probe_fails else 1.0)

    before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    update = xsam_gradient(
        model, gradient, probe, XSAMArguments(rho=0.5, ascent_steps=2, **changes), state, loss_scaling=True
    )
    scaler.step(optimizer)
    scaler.update()
    after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return before, after, scaler.get_scale(), state, update, len(passes)


def test_scaled_and_unscaled_gradients_give_the_same_update():
    before, after, scale, state, update, _ = scaled_update()
    model, data = Classifier(), Points(8)

    def gradient():
        loss = model(data.x, data.y)["loss"]
        loss.backward()
        return loss.detach()

    reference = XSAMState()
    xsam_gradient(
        model, gradient, lambda: model(data.x, data.y)["loss"], XSAMArguments(rho=0.5, ascent_steps=2), reference
    )
    step = -0.1 * torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert (after - before - step).abs().max() <= 1e-7 and step.abs().max() > 1e-2
    assert state.alpha == reference.alpha != 0.7 and scale == 2.0**14
    assert not update.fell_back


@pytest.mark.parametrize("direction", [{}, {"alpha": 1.0}, {"direction": "lsam+"}, {"gradient_scale": "mean"}])
@pytest.mark.parametrize("fail", [0, 1, 2])
def test_an_overflow_in_any_pass_skips_the_step_and_halves_the_scale(fail, direction):
    before, after, scale, state, update, passes = scaled_update(fail, **direction)
    assert torch.equal(before, after) and scale == 2.0**13 and passes == 3
    assert not update.fell_back  # the scaler's business
    assert state.alpha == 0.7  # not from losses at weights that an overflow moved


def test_a_probe_that_is_not_finite_does_not_stop_the_step():
    before, after, scale, state, _, _ = scaled_update(probe_fails=True)
    assert not torch.equal(before, after) and torch.isfinite(after).all()
    assert scale == 2.0**14 and state.alpha == 0.7


def train(directory, dropout=0.0, dtype=torch.float32, **changes):
    run = XSAMTrainer(
        model=tiny_gpt2(dropout).to(dtype), args=arguments(directory, **changes), train_dataset=Tokens(32)
    )
    run.train()
    return run


def weights_of(run):
    return torch.cat([p.detach().reshape(-1) for p in run.model.parameters()])


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = train(tmp_path / "a", dropout=0.1, rho=0.3)
    checkpointed = train(tmp_path / "b", dropout=0.1, rho=0.3, gradient_checkpointing=True)
    assert torch.equal(weights_of(plain), weights_of(checkpointed))
    other_masks = train(tmp_path / "c", dropout=0.1, rho=0.3, seed=1)
    assert not torch.equal(weights_of(plain), weights_of(other_masks))


def test_bfloat16_autocast_sees_the_moved_weights(tmp_path):
    # With one autocast region around all passes its cache would hand out the unmoved weights: no sharpness at all.
    whole = train(tmp_path / "a", rho=0.3)
    half = train(tmp_path / "b", rho=0.3, bf16=True)
    for key, tolerance in (("xsam/sharpness", 0.05), ("xsam/angle", 0.15), ("xsam/grad_norm_last", 0.05)):
        one, other = ([entry[key] for entry in run.state.log_history if key in entry] for run in (whole, half))
        assert one == pytest.approx(other, rel=tolerance) and one != other, key
        assert min(one) > 1e-2
    assert all(p.dtype == torch.float32 for p in half.model.parameters())


def test_embedding_noise_is_the_same_in_every_pass(tmp_path):
    class Noted(XSAMTrainer):
        seen: list[float] = []

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if not torch.is_grad_enabled():
                self.seen.append(float(loss))
            return loss

    args = arguments(tmp_path, rho=1e-6, rho_max=1e-6, max_steps=1, neftune_noise_alpha=5.0)
    Noted(model=tiny_gpt2(layers=1), args=args, train_dataset=Tokens(32)).train()
    # 21 probes at next to the same weights: what differs is the noise, if anything.
    assert len(Noted.seen) == 21 and max(Noted.seen) - min(Noted.seen) < 1e-5


def test_tied_weights_are_one_weight(tmp_path):
    run = train(tmp_path, rho=0.3, alpha=1.0, max_steps=1)
    assert run.model.lm_head.weight is run.model.transformer.wte.weight
    weights = [p for p in run.model.parameters() if isinstance(p, nn.Parameter)]
    assert len(weights) == len({id(p) for p in weights})


# --- weights in half precision ---------------------------------------------------------------------------------------


RHO = 0.01


class Wide(nn.Module):
    """Weights of the size that layers are initialised with, many enough for shares of them to be exact to a per cent."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 256, dtype=dtype)
        self.second = nn.Linear(256, 8, dtype=dtype)
        self.x = torch.randn(64, 32, dtype=dtype)
        self.y = torch.randint(8, (64,))

    def forward(self):
        return nn.functional.cross_entropy(self.second(torch.tanh(self.first(self.x))).float(), self.y)


def flat(tensors):
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def ascent(dtype=torch.bfloat16, k=1, model=None, seen=None, updates=1, **changes):
    """One update, or the last of some; returns the positions θ_0 ... θ_k, the gradients there, and the state."""
    model, state, places, gradients = model or Wide(dtype), XSAMState(), [], []

    def gradient():
        places.append(flat(model.parameters()))
        loss = model()
        loss.backward()
        gradients.append(flat(p.grad for p in model.parameters()))
        return loss.detach()

    method = XSAMArguments(**{"rho": RHO, "ascent_steps": k, **changes})
    for _ in range(updates):
        places.clear()
        gradients.clear()
        model.zero_grad()
        xsam_gradient(model, gradient, lambda: model().detach(), method, state, seen=seen)
    return places, gradients, state, flat(p.grad for p in model.parameters())


def share_along(displacement, wanted):
    return float(displacement @ wanted / wanted.square().sum())


@pytest.mark.parametrize("dtype", ["weights", "stochastic"])
def test_rounding_at_random_leaves_all_of_the_first_step(dtype):
    (start, moved), (g, _), _, _ = ascent(perturbation_dtype=dtype, alpha=1.0)
    left = share_along(moved - start, RHO * g / g.norm())
    assert abs(left - 1) < 0.03 if dtype == "stochastic" else left < 0.9
    assert (moved != start).double().mean() < 0.6  # most weights have no number near enough to go to


def test_small_steps_are_not_lost_one_by_one_when_they_are_rounded_at_random():
    left = {}
    for dtype in ("weights", "stochastic"):
        (start, *_, last), gradients, _, _ = ascent(k=8, perturbation_dtype=dtype, alpha=1.0)
        left[dtype] = share_along(last - start, sum(RHO / 8 * g / g.norm() for g in gradients[:8]))
    assert left["weights"] < 0.6 and left["stochastic"] == pytest.approx(1, abs=0.05)


def test_the_arc_starts_at_the_displacement_as_it_was_rounded():
    # At α = 0 the update is ‖g_k‖ v_0.
    (start, moved), (g, last), _, update = ascent(alpha=0.0)
    cosine = float(update @ (moved - start) / update.norm() / (moved - start).norm())
    assert cosine > 0.9999 > float(update @ g / update.norm() / g.norm())


@pytest.mark.parametrize("alpha", [1.7, None])
def test_in_full_precision_there_is_nothing_to_round(alpha):
    whole, *_, state, update = ascent(torch.float64, k=3, alpha=alpha)
    places, *_, same, other = ascent(torch.float64, k=3, alpha=alpha, perturbation_dtype="stochastic")
    assert max((a - b).abs().max() for a, b in zip(places, whole, strict=True)) <= 1e-15
    assert (other - update).abs().max() <= 1e-12 and other.abs().max() > 1e-3
    assert same.alpha == state.alpha


def test_rounding_at_random_is_a_function_of_the_update_and_moves_no_random_stream():
    torch.manual_seed(3)
    first = ascent(perturbation_dtype="stochastic")
    stream = torch.rand(3)
    torch.manual_seed(3)
    ascent(perturbation_dtype="weights")
    assert torch.equal(torch.rand(3), stream)
    second = ascent(perturbation_dtype="stochastic")
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[2].alpha == second[2].alpha and torch.equal(first[3], second[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.001, -1.001, 3.1415, -2.0, 0.0, 255.3, 1e-3])
def test_rounding_at_random_is_exact_on_average(dtype, value):
    n = 100_000
    weights = [torch.zeros(n, dtype=dtype)]
    weights[0].fill_(value)
    nearest = weights[0][0].item()
    step = (0.3 * torch.finfo(dtype).eps * abs(value)) / 2
    add_rounded(weights, [([torch.full((n,), step)], 1.0)], torch.Generator().manual_seed(0))
    spacing = torch.finfo(dtype).eps * abs(value)
    assert weights[0].double().mean().item() == pytest.approx(nearest + step, abs=4 * spacing / n**0.5 + 1e-12)
    assert len(weights[0].unique()) == (1 if value == 0 else 2)
    weights[0].fill_(value)
    add_rounded(weights, [([torch.full((n,), step)], 1.0)])
    assert (weights[0] == nearest).all()  # to the nearest number all of it is lost


def probed_at_random():
    """θ_0, v_0, and what two probes of one point (α = 0 and next to it) see in each of two updates."""
    torch.manual_seed(0)
    seen, places, weight = [], [], nn.Parameter(torch.randn(4096, dtype=torch.bfloat16))
    before, state = weight.detach().clone(), XSAMState()
    target = torch.randn(4096, dtype=torch.bfloat16)

    def gradient():
        places.append(weight.detach().double())
        loss = (weight * target).float().sum()
        loss.backward()
        return loss.detach()

    def probe():
        seen.append(weight.detach().clone())
        return weight.float().square().sum()

    two_points = XSAMArguments(rho=0.01, alpha_max=1e-12, alpha_samples=2, perturbation_dtype="stochastic")
    for _ in range(2):
        state.search_due, weight.grad = True, None
        xsam_gradient([weight], gradient, probe, two_points, state)
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


# --- what the forward pass sees --------------------------------------------------------------------------------------


def compare(seen, epsilon):
    """The measure, by its definition."""
    whole = float(epsilon.square().sum())
    found = {"length": float(seen.norm() / epsilon.norm()), "share": float(seen @ epsilon) / whole}
    return found | {"cosine": found["share"] / found["length"] if found["length"] else 0.0}


@pytest.mark.parametrize("changes", [{}, {"k": 3}, {"perturbation": "asam", "rho": 0.1}, {"rho": 1e-4}, {"rho": 3.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_the_pass_sees_agrees_with_a_direct_computation(dtype, changes):
    model = Wide(torch.float32)
    measure = SeenAscent(dict.fromkeys(model.parameters(), dtype))
    (start, *_, last), _, _, _ = ascent(model=model, seen=measure, alpha=1.0, **changes)
    found = measure.read()
    seen = last.to(dtype).double() - start.to(dtype).double()
    assert found == pytest.approx(compare(seen, last - start), rel=2e-3)  # θ + ε is itself rounded, to float32
    if dtype == torch.float32:
        assert found == pytest.approx({"length": 1, "share": 1, "cosine": 1}, abs=1e-3)
    elif changes.get("rho") == 1e-4:
        assert found["length"] > 1.3 and found["cosine"] < 0.8
    elif changes.get("rho") == 3.0:
        assert found["cosine"] > 0.999
    assert not measure.is_due and measure.read() is None  # once


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("rounding", ["weights", "stochastic"])
def test_of_weights_in_half_precision_the_pass_sees_what_rounding_left(rounding, k):
    model = Wide(torch.bfloat16)
    measure = SeenAscent(dict.fromkeys(model.parameters(), torch.bfloat16))
    (start, *_, last), gradients, _, _ = ascent(model=model, k=k, seen=measure, alpha=1.0, perturbation_dtype=rounding)
    found = measure.read()
    epsilon = sum(RHO / k * g / g.norm() for g in gradients[:k])
    assert found == pytest.approx(compare(last - start, epsilon), rel=1e-4)
    assert found["share"] < 0.9 if rounding == "weights" else found["share"] == pytest.approx(1, abs=0.05)
    assert found["cosine"] < 0.95


def test_a_stale_ascent_is_seen_in_the_second_update():
    model = Wide(torch.float32)
    measure = SeenAscent(dict.fromkeys(model.parameters(), torch.bfloat16))
    settings = {"perturbation": "stale", "alpha": 1.0, "seen": measure}
    (start,), _, _, _ = ascent(model=model, **settings)
    assert measure.is_due and measure.read() is None
    (last,), _, _, _ = ascent(model=model, updates=2, **settings)
    seen = last.bfloat16().double() - start.bfloat16().double()
    assert measure.read() == pytest.approx(compare(seen, last - start), rel=2e-3)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_short_ascent_over_many_weights_is_buried(fresh):
    """2^21 weights of size .02 and ρ .05 over 10^8 of them; fresh from a bfloat16 checkpoint they stand on its numbers."""
    torch.manual_seed(0)
    weight = torch.randn(2**21) * 0.02
    weight = nn.Parameter(weight.bfloat16().float() if fresh else weight)
    direction, places = torch.randn(2**21), []
    measure = SeenAscent({weight: torch.bfloat16})

    def gradient():
        places.append(weight.detach().clone())
        weight.grad = direction.clone()
        return torch.tensor(0.0)

    xsam_gradient(
        [weight],
        gradient,
        gradient,
        XSAMArguments(rho=0.05 * (2**21 / 1e8) ** 0.5, alpha=1.0),
        XSAMState(),
        seen=measure,
    )
    found, (start, last) = measure.read(), (place.double() for place in places)
    whole = compare(places[1].bfloat16().double() - places[0].bfloat16().double(), last - start)
    assert found == pytest.approx(whole, rel=0.05) and found != whole  # of half of the weights
    if fresh:
        assert found["share"] == pytest.approx(0.14, abs=0.02)
    else:
        expected = {"length": 3.8, "share": 1.0, "cosine": 0.26}
        assert found == pytest.approx(expected, rel=0.05)


def test_an_ascent_that_is_not_finite_is_not_the_one_that_is_measured():
    model = Wide(torch.float32)
    measure = SeenAscent(dict.fromkeys(model.parameters(), torch.bfloat16))
    model.x[0, 0] = math.nan
    ascent(model=model, seen=measure, alpha=1.0)
    assert not measure.is_due and measure.read() is None and measure.is_due
    model.x[0, 0] = 0.0
    ascent(model=model, seen=measure, alpha=1.0)
    assert measure.read()["length"] > 0


def seen_in(run):
    return [{key: value for key, value in entry.items() if "seen" in key} for entry in run.state.log_history]


def test_a_training_logs_once_what_the_pass_sees_and_warns_where_the_ascent_is_buried(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    settings = {"max_steps": 3, "alpha": 1.0, "max_grad_norm": 0}
    assert not any(seen_in(train(tmp_path / "a", rho=1e-3, **settings)))
    first, *later = seen_in(train(tmp_path / "b", rho=0.3, bf16=True, **settings))
    assert first["xsam/seen_cosine"] > 0.99 and len(first) == 3 and not any(later) and not said
    short = train(tmp_path / "c", rho=4e-4, bf16=True, **settings)
    first, *later = seen_in(short)
    assert first["xsam/seen_length"] > 3 and first["xsam/seen_cosine"] < 0.25 and not any(later)
    assert len(said) == 1 and f"{first['xsam/seen_length']:.1f} times as long (xsam/seen_length)" in said[0]
    # The way out: norm layers stay in float32 under autocast.
    norms = {"rho_exclude": [r"^(?!.*\bln_)"]}
    assert not any(seen_in(train(tmp_path / "d", rho=4e-4, bf16=True, **norms, **settings)))
    assert len(said) == 1
    # Fresh from a checkpoint in bfloat16.
    fresh = tiny_gpt2().to(torch.bfloat16).float()
    args = arguments(tmp_path / "e", rho=4e-4, bf16=True, **settings)
    XSAMTrainer(model=fresh, args=args, train_dataset=Tokens(32)).train()
    assert len(said) == 2 and "lost in rounding to half precision" in said[1]


def test_which_weights_autocast_takes_in_half_precision(tmp_path):
    run = XSAMTrainer(model=tiny_gpt2(), args=arguments(tmp_path, bf16=True), train_dataset=Tokens(8))
    found = taken_in_half(run)
    names = {name: name for name, weight in run.model.named_parameters() if weight in found}
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"} <= set(
        names
    )  # the former is the output layer too
    assert not any("ln_" in name or "wpe" in name or "bias" in name for name in names)
    assert set(found.values()) == {torch.bfloat16}
    run.model.to(torch.float16)
    assert taken_in_half(run)[run.model.transformer.ln_f.weight] == torch.float16


def test_a_climb_that_float32_loses_is_warned_of(tmp_path, caplog):
    for rho, lost in ((1e-9, True), (5e-5, False), (0.05, False)):
        caplog.clear()
        run = train(tmp_path, rho=rho, alpha=2.0, max_steps=2)
        told = [message for message in caplog.messages if "lost in rounding to float32. Use a longer `rho`" in message]
        assert len(told) == lost
        seen = [entry["xsam/seen_share"] for entry in run.state.log_history if "xsam/seen_share" in entry]
        assert len(seen) == (rho < 1e-4) and all((share < 0.5) == lost for share in seen)
