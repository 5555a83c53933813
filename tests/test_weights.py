"""The weights that move: back bit for bit, with zeros for gradients that are missing, by name what is excluded."""

import pytest
import torch
from torch import nn
from toys import Classifier

from xsam_hf import XSAMArguments, XSAMState, xsam_gradient
from xsam_hf.trainable import perturbed_and_excluded
from xsam_hf.weights import MovableWeights, weights_kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_weights_come_back_bit_for_bit(dtype, error):
    weights = [torch.randn(50, dtype=torch.float64).to(dtype) for _ in range(3)]
    before, addresses = [w.clone() for w in weights], [w.data_ptr() for w in weights]
    offset = [torch.randn_like(w) for w in weights]
    try:
        with weights_kept(weights):
            torch._foreach_add_(weights, offset)
            assert not any(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
            subtracted = [w - o for w, o in zip(weights, offset, strict=True)]
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert [w.data_ptr() for w in weights] == addresses
    # Why there is a copy at all: taking the offset off again is not the same.
    assert not all(torch.equal(s, b) for s, b in zip(subtracted, before, strict=True))


def test_a_gradient_that_is_missing_in_a_later_pass_is_zero_and_one_that_never_was_stays_none():
    always, once, never, later = (nn.Parameter(torch.ones(2)) for _ in range(4))
    theta = MovableWeights([never, always, once, later], XSAMArguments(), seed=1)
    always.grad, once.grad = torch.ones(2), torch.ones(2)
    assert len(theta.gradients()[0]) == 2 and theta.names == ["1", "2"]
    once.grad, later.grad = None, torch.full((2,), 3.0)
    gradients, _ = theta.gradients()
    assert [g.tolist() for g in gradients] == [[1, 1], [0, 0], [3, 3]] and theta.names == ["1", "2", "3"]
    assert never.grad is None


def test_no_gradient_and_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="does the loss depend on"):
        MovableWeights([nn.Parameter(torch.ones(2))], XSAMArguments(), seed=1).gradients()
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse=False"):
        MovableWeights(embedding, XSAMArguments(), seed=1).gradients()


def test_every_pattern_excludes_and_what_is_frozen_is_nobodys():
    model = Classifier()
    model.first.weight.requires_grad_(False)
    perturbed, excluded = perturbed_and_excluded(model, ["first", r"second\.b"])
    assert list(perturbed) == ["second.weight"] and [w.shape for w in excluded] == [(7,), (3,)]
    with pytest.raises(ValueError, match="'first.weight', which no name of a trainable weight contains"):
        perturbed_and_excluded(model, ["first.weight"])
    named = dict(model.named_parameters())
    assert perturbed_and_excluded(named, ["first", r"second\.b"]) == (perturbed, excluded)


def test_gradients_of_a_pass_in_between_are_put_aside():
    w = nn.Parameter(torch.ones(2))
    theta = MovableWeights([w], XSAMArguments(), seed=1)
    w.grad = kept = torch.ones(2)
    with theta.gradients_aside():
        (w * 3).sum().backward()
        assert w.grad.tolist() == [3, 3]
    assert w.grad is kept and kept.tolist() == [1, 1]


@pytest.mark.parametrize("method", [{}, {"alpha": 1.0}, {"perturbation": "asam", "ascent_steps": 2}, {"perturbation": "vasso"}, {"direction": "msam+", "ascent_steps": 2}])  # fmt: skip
def test_a_complex_weight_counts_as_two_real_ones(method):
    torch.manual_seed(0)
    z = torch.randn(3, 4, dtype=torch.complex128)
    x = torch.randn(5, 3, dtype=torch.complex128)
    whole = [nn.Parameter(z.clone())]
    # ASAM scales weights of two dimensions or more, and these are.
    parts = [nn.Parameter(z.real.clone()), nn.Parameter(z.imag.clone())]

    def update(weights, weight):
        def loss():
            out = x @ weight()
            return (out.real.square() * out.imag.cos()).sum() + out.abs().sum()

        def gradient():
            value = loss()
            value.backward()
            return value.detach()

        state = XSAMState()
        for _ in range(2):
            state.search_due = True
            for w in weights:
                w.grad = None
            xsam_gradient(weights, gradient, loss, XSAMArguments(rho=0.3, **method), state)
        return state.alpha

    assert update(whole, lambda: whole[0]) == update(parts, lambda: torch.complex(*parts))
    assert torch.allclose(whole[0].grad, torch.complex(parts[0].grad, parts[1].grad), rtol=0, atol=1e-12)
    assert torch.equal(whole[0].detach(), z)
