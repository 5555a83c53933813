"""Gradients that stand in `p.grad` before an update: the plain Trainer adds its own to them, and XSAM's is added too."""

import pytest
import torch
from toys import Classifier, train, weights_of
from transformers import Trainer, TrainerCallback

from xsam_hf import XSAMTrainer
from xsam_hf.trainer.earlier_gradients import EarlierGradients


START = torch.cat([p.detach().reshape(-1) for p in Classifier().parameters()])
METHODS = {
    "sam": {"alpha": 1.0},
    "xsam": {},
    "two_steps": {"ascent_steps": 2},
    "micro": {"alpha": 1.0, "ascent_scope": "micro"},
    "stale": {"perturbation": "stale", "alpha": 1.0},
    "part": {"ascent_fraction": 0.5},
}


class OwnLoss:
    """A backward pass of its own before the Trainer's, of three times its loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.accelerator.backward(3 * model(**inputs)["loss"])
        return super().training_step(model, inputs, num_items_in_batch)


class Twice:
    def training_step(self, model, inputs, num_items_in_batch=None):
        super().training_step(model, inputs, num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


class Penalty(TrainerCallback):
    """The gradient of half the weights' square, which is the weights."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        (sum((p**2).sum() for p in model.parameters()) / 2).backward()


def step(tmp_path, before=None, trainer=XSAMTrainer, **changes):
    """What one SGD step of a learning rate of 1 takes away from the weights: the gradient."""
    made = type("Made", (trainer,) if before is None else (before, trainer), {})
    run = train(tmp_path, trainer=made, max_steps=1, learning_rate=1.0, **changes)
    return START - weights_of(run)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_an_own_loss_is_added_to_xsams(tmp_path, method):
    plain = step(tmp_path, trainer=Trainer)
    alone, both = (step(tmp_path, before, rho=0.3, **METHODS[method]) for before in (None, OwnLoss))
    torch.testing.assert_close(both, alone + 3 * plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(step(tmp_path, OwnLoss, trainer=Trainer), 4 * plain, rtol=1e-5, atol=1e-6)
    if method != "stale":  # whose first update has nothing to climb along
        assert (alone - plain).norm() > 0.02 * plain.norm()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_penalty_before_the_step_is_added_and_bends_no_ascent(tmp_path, accumulation):
    settings = {"rho": 0.3, "gradient_accumulation_steps": accumulation}
    alone = step(tmp_path, **settings)
    torch.testing.assert_close(step(tmp_path, callbacks=[Penalty()], **settings), alone + START, rtol=1e-5, atol=1e-6)


def test_two_steps_on_a_batch_count_twice(tmp_path):
    alone = step(tmp_path, rho=0.3, alpha=1.0)
    torch.testing.assert_close(step(tmp_path, Twice, rho=0.3, alpha=1.0), 2 * alone, rtol=1e-5, atol=1e-6)


def test_gradients_of_zeros_change_nothing(tmp_path):
    class Zeros(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            for p in model.parameters():
                p.grad = torch.zeros_like(p)

    assert torch.equal(step(tmp_path, rho=0.3, callbacks=[Zeros()]), step(tmp_path, rho=0.3))


def test_a_gradient_that_is_changed_between_micro_batches_is_refused(tmp_path):
    words = "gradient was changed between two micro-batches of an update"
    with pytest.raises(NotImplementedError, match=words):
        step(tmp_path, OwnLoss, rho=0.3, gradient_accumulation_steps=2)

    class Zeroed(TrainerCallback):
        def on_substep_end(self, args, state, control, model=None, **kwargs):
            model.zero_grad()

    with pytest.raises(NotImplementedError, match=words):
        step(tmp_path, rho=0.3, gradient_accumulation_steps=2, callbacks=[Zeroed()])
    # In the micro scope every micro-batch is an update of its own.
    found = step(tmp_path, OwnLoss, rho=0.3, gradient_accumulation_steps=2, ascent_scope="micro")
    alone = step(tmp_path, rho=0.3, gradient_accumulation_steps=2, ascent_scope="micro")
    assert (found - alone).norm() > alone.norm()


def test_several_processes_refuse_a_gradient_that_nobody_would_average():
    weight = torch.zeros(3, requires_grad=True)
    for grad in (None, torch.zeros(3)):
        weight.grad = grad
        EarlierGradients().before_pass([weight], True, processes=2)
        assert weight.grad is None
    weight.grad = torch.tensor([0.0, 1.0, 0.0])
    EarlierGradients().before_pass([weight], True, processes=1)
    weight.grad = torch.tensor([0.0, 1.0, 0.0])
    with pytest.raises(NotImplementedError, match="had a gradient before the update, and XSAM would not average it"):
        EarlierGradients().before_pass([weight], True, processes=2)
