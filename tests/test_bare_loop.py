"""`xsam_gradient` without the Trainer: a bare PyTorch loop and an Accelerate loop make the Trainer's updates."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from toys import Classifier, Points, train, weights_of

from xsam_hf import XSAMArguments, XSAMState, xsam_gradient


EPOCHS, ARGUMENTS = 2, XSAMArguments(rho=0.5)


def expected(tmp_path, **extra):
    return train(tmp_path, Classifier(**extra), rho=0.5, train_sampling_strategy="sequential")


def loop(model, optimizer, loader, backward):
    state, losses = XSAMState(), []
    for _ in range(EPOCHS):
        state.search_due = True
        for batch in loader:

            def loss(batch=batch):
                return model(**batch)["loss"]

            def gradient(loss=loss):
                value = loss()
                backward(value)
                return value.detach()

            losses.append(xsam_gradient(model, gradient, loss, ARGUMENTS, state).loss.item())
            optimizer.step()
            optimizer.zero_grad()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), losses


def test_bare_loop_equals_the_trainer(tmp_path):
    model = Classifier(batch_norm=True).train()
    weights, losses = loop(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(Points(), 8), torch.Tensor.backward
    )
    run = expected(tmp_path, batch_norm=True)
    assert (weights - weights_of(run)).abs().max() < 1e-6
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert max(abs(a - b) for a, b in zip(losses, logged, strict=True)) < 1e-5
    for ours, theirs in zip(model.buffers(), run.model.buffers(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_accelerate_loop_equals_the_trainer(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = Classifier().train()
    prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(Points(), 8))
    weights, _ = loop(*prepared, accelerator.backward)
    assert (weights - weights_of(expected(tmp_path))).abs().max() < 1e-6
