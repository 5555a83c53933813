"""The range test for rho, against the closed form on a quadratic; and that it leaves no trace."""

import copy
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from toys import Classifier, Points, arguments, build, train, weights_of
from transformers import Trainer

from scripts import find_rho as find_rho_command
from scripts.run_seeds import ROOT
from xsam_hf import XSAMTrainer, find_rho
from xsam_hf.trainer.range_test import RangeTest


class Rows(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return {"x": torch.full((1,), float(i % 2), dtype=torch.float64)}


class Quadratic(nn.Module):
    """½ θᵀHθ + bᵀθ + 5, the same for every batch."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        self.hessian, self.slope = root @ root.T / 6, torch.randn(6, generator=generator, dtype=torch.float64)
        self.theta = nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return {"loss": 0.5 * self.theta @ self.hessian @ self.theta + self.slope @ self.theta + 5 + 0 * x.sum()}


def test_the_curvature_share_of_a_quadratic_has_a_closed_form(tmp_path):
    model = Quadratic()
    trainer = build(tmp_path, model, Rows(), per_device_train_batch_size=2)
    found = find_rho(trainer, batches=2, rhos=[0.01, 0.1, 1, 10])
    loss = model(torch.zeros(1))["loss"].item()
    g = (model.hessian @ model.theta + model.slope).detach()
    share = (g @ model.hessian @ g / (2 * g.norm() ** 3)).item()  # of ρ = 1
    assert found.grad_norm == pytest.approx(g.norm().item(), abs=1e-10) and found.loss == pytest.approx(
        loss, abs=1e-10
    )
    assert found.curvature_shares == pytest.approx([share * rho for rho in found.rhos], abs=1e-10)
    assert (found.forward, found.backward) == (2 * 5, 2)
    # The rise is ρ‖g‖(1 + c ρ); on a fine grid the suggestion solves for a quarter of the loss.
    fine = find_rho(trainer, batches=1, rhos=[10 ** (i / 50 - 3) for i in range(200)])
    slope, quarter = g.norm().item(), loss / 4
    root = (math.sqrt(slope**2 + 4 * slope * share * quarter) - slope) / (2 * slope * share)
    assert fine.rho == pytest.approx(root, rel=1e-4) and fine.band == pytest.approx((root / 3, 3 * root), rel=1e-4)
    assert find_rho(trainer, batches=1, rhos=[root * 2, root * 3]).rho is None


def test_the_log_has_the_share_that_the_ascent_met(tmp_path):
    changes = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "rho": 0.3}
    model = Quadratic()
    g = (model.hessian @ model.theta + model.slope).detach()
    expected = 0.3 * (g @ model.hessian @ g / (2 * g.norm() ** 3)).item()
    for alpha in (None, 1.0):
        logged = train(tmp_path, copy.deepcopy(model), Rows(), alpha=alpha, **changes).state.log_history[0]
        assert logged["xsam/curvature_share"] == pytest.approx(expected, rel=1e-5)
    # Of another ascent the angle tells something else.
    for other in ({"perturbation": "vasso"}, {"ascent_steps": 2}, {"ascent_fraction": 0.5}):
        logged = train(tmp_path, copy.deepcopy(model), Rows(), **changes, **other).state.log_history[0]
        assert "xsam/angle" in logged and "xsam/curvature_share" not in logged


@pytest.mark.parametrize("trained", [False, True])
def test_it_leaves_no_trace(tmp_path, trained):
    """Weights, gradients, buffers, modes, random numbers, what the trainer counts; and so a training after it is the same."""

    def make(folder):
        trainer = build(tmp_path / folder, Classifier(dropout=0.2, batch_norm=True), gradient_accumulation_steps=2)
        if trained:
            trainer.train()
        trainer.model.eval()
        trainer.model.first.weight.grad = torch.ones_like(trainer.model.first.weight)
        return trainer

    tested, plain = make("tested"), make("plain")
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    state = copy.deepcopy(tested.model.state_dict())
    accelerate = tested.accelerator
    loaders, drawn_from = list(accelerate._dataloaders), accelerate.gradient_state.dataloader_references
    found = find_rho(tested, batches=2)
    assert math.isfinite(found.rises[0]) and found.forward == 2 * 2 * 22 and tested.model.forwards > found.backward
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(value, state[name]) for name, value in tested.model.state_dict().items())
    assert torch.equal(tested.model.first.weight.grad, torch.ones_like(tested.model.first.weight))
    assert tested.model.second.weight.grad is None and not any(m.training for m in tested.model.modules())
    assert accelerate._dataloaders == loaders
    assert accelerate.gradient_state.dataloader_references == drawn_from
    assert find_rho(tested, batches=2) == find_rho(plain, batches=2)
    for trainer in (tested, plain):
        trainer.model.first.weight.grad = None
        torch.manual_seed(5)
        trainer.train()
    assert torch.equal(weights_of(tested), weights_of(plain))


def test_it_climbs_with_the_weights_that_training_perturbs(tmp_path):
    def optimizers(model):
        return torch.optim.SGD(model.second.parameters(), lr=0.1), None

    class OfTheHead(XSAMTrainer):
        def create_optimizer(self, *args):
            self.optimizer = optimizers(self.model)[0]
            return self.optimizer

    model, data = Classifier(), Points()
    model.first.requires_grad_(False)
    expected = find_rho(XSAMTrainer(model, arguments(tmp_path), train_dataset=data))
    model = Classifier()
    given = XSAMTrainer(model, arguments(tmp_path), train_dataset=data, optimizers=optimizers(model))
    made = OfTheHead(Classifier(), arguments(tmp_path), train_dataset=data)
    made.model.first.bias.grad = torch.ones(7)
    assert find_rho(given) == find_rho(made) == expected != find_rho(build(tmp_path))
    assert made.optimizer is None and made.model.first.weight.grad is None and made._xsam_optimizer is None
    assert torch.equal(made.model.first.bias.grad, torch.ones(7))
    made.train()
    assert find_rho(made).rho is not None


def test_micro_batches_that_climb_alone_are_measured_so(tmp_path):
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    found = find_rho(build(tmp_path, Classifier(), ascent_scope="micro", **cut), batches=2, rhos=[0.1, 1.0])
    trainer = build(tmp_path, Classifier(), **cut)
    rises = torch.zeros(2)
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(8), strict=False)]
    for batch in batches:  # by hand; an update's loss is the mean over its micro-batches
        model = Classifier()
        loss = model(**batch)["loss"]
        gradient = torch.autograd.grad(loss, list(model.parameters()))
        size = torch.cat([g.reshape(-1) for g in gradient]).norm()
        for i, rho in enumerate(found.rhos):
            moved = {n: w + rho * g / size for (n, w), g in zip(model.named_parameters(), gradient, strict=True)}
            rises[i] += torch.func.functional_call(model, moved, kwargs=batch)["loss"].detach() - loss.detach()
    assert found.rises == pytest.approx((rises / 8).tolist(), abs=1e-6)
    assert (found.forward, found.backward) == (8 * 3, 8)
    assert found.rises[1] > 1.05 * find_rho(trainer, batches=2, rhos=[0.1, 1.0]).rises[1]


def test_a_failing_pass_leaves_no_trace_either(tmp_path):
    trainer = build(tmp_path)
    before = weights_of(trainer)

    def fail(model, *_):
        if model.forwards == 5:
            raise RuntimeError("no memory")

    trainer.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        find_rho(trainer)
    assert torch.equal(weights_of(trainer), before) and trainer.model.first.weight.grad is None


def test_a_loss_that_is_not_finite_lies_beyond():
    test = RangeTest([0.1, 1, 10], [0.1, 0.2, math.inf], loss=1.0, grad_norm=1.0, forward=4, backward=1)
    assert test.rho == 1  # a quarter lies between 0.2 there and infinity at 10


def test_refusals(tmp_path, monkeypatch):
    plain = Trainer(model=Classifier(), args=arguments(tmp_path), train_dataset=Points())
    with pytest.raises(ValueError, match="^Trainer has no XSAM: give an XSAMTrainer"):
        find_rho(plain)
    trainer = build(tmp_path)
    for wrong, message in (
        ({"batches": 0}, "`batches` is 0: give a whole number, 1 or more"),
        ({"batches": 2.5}, "`batches` is 2.5: give a whole number"),
        ({"rhos": "0.1"}, r"`rhos` is \['0', '.', '1'\]: give numbers"),
        ({"rhos": 0.1}, r"`rhos` is 0.1: give two lengths or more, such as \[0.01"),
        ({"rhos": None}, "`rhos` is None: give two lengths"),
        ({"rhos": [1.0]}, "two lengths above 0 or more, in ascending order"),
        ({"rhos": [1.0, 0.1]}, "in ascending order"),
        ({"rhos": [0.0, 0.1]}, "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            find_rho(trainer, **wrong)
    with pytest.raises(ValueError, match="share of the weights' size"):
        find_rho(build(tmp_path, perturbation="asam"))
    diverged = build(tmp_path)
    diverged.model.first.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="The loss at the weights as they stand is nan"):
        find_rho(diverged)

    class Negative(Classifier):
        def forward(self, x, labels=None):
            return {"loss": super().forward(x, labels)["loss"] - 5}

    with pytest.raises(ValueError, match="The loss at the weights as they stand is -3.*needs a loss above 0"):
        find_rho(build(tmp_path, Negative()))
    with pytest.raises(ValueError, match="The training data give no update batch.*`dataloader_drop_last`"):
        find_rho(build(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=64))
    recipe = "tasks/image_classification/recipes/digits-noise-resnet-small.yaml"
    with pytest.raises(ValueError, match="leave out `resume_from_checkpoint`"):
        find_rho_command.main(
            [recipe, "--resume_from_checkpoint", "true", "--output_dir", str(tmp_path), "--use_cpu", "true"]
        )
    for flags in (["--rho", "3"], ["--rho=3"], ["--method", "asam"]):  # which would make its epochs no plain ones
        with pytest.raises(ValueError, match=f"{flags[0][:5]}.* stands there, and a range test trains with the base"):
            find_rho_command.main([recipe, *flags, "--output_dir", str(tmp_path)])
    trained = []
    monkeypatch.setattr(XSAMTrainer, "train", lambda self: trained.append(self))
    for flags, message in (
        (["--batches", "0"], "`batches` is 0: give a whole number"),
        (["--perturbation", "asam"], "share of the weights"),
    ):
        with pytest.raises(ValueError, match=message):
            find_rho_command.main([recipe, *flags, "--output_dir", str(tmp_path), "--use_cpu", "true"])
    assert not trained
    trainer.is_in_train = True
    with pytest.raises(ValueError, match="inside of a training"):
        find_rho(trainer)


def test_a_trainer_without_xsam_in_its_updates_can_ask_too(tmp_path):
    """`rho` 0, a part of the batch, a stale ascent: what is tested is SAM's ascent from the whole batch."""
    found = [
        find_rho(build(tmp_path, **fields), batches=1)
        for fields in ({}, {"rho": 0.0}, {"perturbation": "stale"}, {"ascent_fraction": 0.5})
    ]
    assert all(test == found[0] for test in found) and isinstance(build(tmp_path, rho=0.0), XSAMTrainer)


def test_the_command_draws_what_it_suggests(tmp_path, capsys):
    recipe = str(ROOT / "tasks" / "image_classification" / "recipes" / "digits-vit-small.yaml")
    flags = ["--train_examples", "64", "--per_device_train_batch_size", "32", "--output_dir", str(tmp_path)]
    find_rho_command.main([recipe, "--epochs", "1", "--batches", "1", "--threads", "1", *flags])
    kept = json.loads((tmp_path / "rho.json").read_text())
    assert kept["backward"] == 1 and kept["forward"] == 22 and kept["epochs"] == 1
    told = capsys.readouterr().out
    assert (
        f"rho {kept['rho']:.2g} (from {kept['rho'] / 3:.2g} to {3 * kept['rho']:.2g}); 22 forward and 1 backward passes"
        in told
    )
    assert f"suggestion {kept['rho']:.2g}" in (tmp_path / "rho.svg").read_text()
    with pytest.raises(
        ValueError, match="--epochs is 3, and the schedule ends after 2: give `--num_train_epochs` too"
    ):
        find_rho_command.main([recipe, "--epochs", "3", "--num_train_epochs", "2", "--threads", "1", *flags])
    with pytest.raises(ValueError, match="in no task's folder of recipes"):
        find_rho_command.main([str(tmp_path / "rho.yaml")])
