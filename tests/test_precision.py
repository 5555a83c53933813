"""fp16's GradScaler with an overflow in every place, bfloat16 autocast, and gradient checkpointing with dropout."""

import math

import pytest
import torch
from torch import nn
from toys import Classifier, Points, Tokens, arguments, tiny_gpt2

from xsam_hf import XSAMArguments, XSAMState, XSAMTrainer, xsam_gradient


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


def train(directory, dropout=0.0, **changes):
    run = XSAMTrainer(model=tiny_gpt2(dropout), args=arguments(directory, **changes), train_dataset=Tokens(32))
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
