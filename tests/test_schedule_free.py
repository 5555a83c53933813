"""Schedule-free optimizers swap weights in place: XSAM climbs from those that are trained, and evaluation sees the average."""

import oracle
import pytest
import torch
from schedulefree import AdamWScheduleFree
from toys import CLASSES, HIDDEN, INPUTS, Classifier, Points, arguments, train, weights_of
from transformers import Trainer

from xsam_hf import XSAMTrainer


SETTINGS = {
    "optim": "schedule_free_adamw",
    "learning_rate": 0.05,
    "adam_epsilon": 1e-3,
    "warmup_steps": 2,
    "train_sampling_strategy": "sequential",
}
METHODS = {"xsam": {}, "sam": {"alpha": 1.0}, "two steps": {"ascent_steps": 2, "alpha": 1.7}}


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def by_hand(data, alpha=None, ascent_steps=1):
    """The average at the end of two epochs, each search's α, and losses: of the average and of the weights it is made from."""
    network = oracle.TanhNetwork(INPUTS, HIDDEN, CLASSES)
    start = torch.cat([p.detach().reshape(-1) for p in Classifier(dtype=torch.float64).parameters()])
    theta = torch.nn.Parameter(start.clone())
    optimizer = AdamWScheduleFree([theta], lr=0.05, eps=1e-3, warmup_steps=2)
    found, evaluated, steps = [], [], 0
    for _ in range(2):
        for i in range(0, len(data), 8):
            optimizer.train()
            x, y = data.x[i : i + 8].numpy(), data.y[i : i + 8].numpy()
            search = alpha is None and i == 0
            direction, used, _ = oracle.xsam_direction(
                theta.detach().numpy(),
                lambda t, x=x, y=y: network.loss(t, x, y),
                lambda t, x=x, y=y: network.gradient(t, x, y),
                rho=0.5,
                k=ascent_steps,
                alpha=None if search else (found[-1] if alpha is None else alpha),
            )
            found += [used] if search else []
            theta.grad = torch.from_numpy(direction)
            optimizer.step()
            steps += 1
            if steps in (3, 6, 8):  # every third, and the last
                whole = data.x.numpy(), data.y.numpy()
                trained = network.loss(theta.detach().numpy(), *whole)
                optimizer.eval()
                evaluated.append((network.loss(theta.detach().numpy(), *whole), trained))
    return theta.detach(), found, evaluated


@pytest.mark.parametrize("name", METHODS)
def test_training_and_evaluation_agree_with_a_loop_of_flat_vectors(tmp_path, name):
    data = Points(32, torch.float64)
    args = arguments(tmp_path, rho=0.5, eval_strategy="steps", eval_steps=3, **SETTINGS, **METHODS[name])
    run = XSAMTrainer(model=Classifier(dtype=torch.float64), args=args, train_dataset=data, eval_dataset=data)
    run.train()
    weights, found, evaluated = by_hand(data, **METHODS[name])
    assert (weights_of(run) - weights).abs().max() < 1e-10
    if name == "xsam":
        assert history(run, "xsam/alpha") == pytest.approx([alpha for alpha in found for _ in range(4)])
    assert len(evaluated) == 3
    for seen, (average, trained) in zip(history(run, "eval_loss"), evaluated, strict=True):
        assert seen == pytest.approx(average, abs=1e-6)
        assert abs(seen - trained) > 1e-4


def test_off_is_the_plain_trainer_bit_for_bit(tmp_path):
    plain = train(tmp_path / "plain", trainer=Trainer, **SETTINGS)
    off, on = (train(tmp_path / str(rho), rho=rho, **SETTINGS) for rho in (0.0, 0.5))
    assert torch.equal(weights_of(off), weights_of(plain))
    assert (weights_of(on) - weights_of(plain)).abs().max() > 1e-3


def test_resume_is_bitwise(tmp_path):
    whole = train(tmp_path / "whole", rho=0.5, save_strategy="steps", save_steps=1, **SETTINGS)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = train(tmp_path / "resumed", rho=0.5, resume=checkpoint, **SETTINGS)
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_stale_ascent_climbs_after_an_evaluation_as_without_one(tmp_path):
    data, found = Points(32, torch.float64), []
    for strategy in ("no", "steps"):
        args = arguments(
            tmp_path / strategy,
            rho=0.5,
            perturbation="stale",
            alpha=1.0,
            eval_strategy=strategy,
            eval_steps=3,
            **SETTINGS,
        )
        run = XSAMTrainer(model=Classifier(dtype=torch.float64), args=args, train_dataset=data, eval_dataset=data)
        run.train()
        run.optimizer.eval()  # the average, as the last evaluation leaves it
        found.append(weights_of(run))
    assert (found[0] - found[1]).abs().max() < 1e-12
