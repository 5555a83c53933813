"""Bit for bit back: weights, BatchNorm statistics, random numbers; and that none of the three comes for free."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from toys import Classifier, Points

from xsam_hf.perturbation import RandomState, buffers_kept, take_gradient, weights_kept


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


def test_batch_norm_statistics_stay_in_the_block_only():
    model, x = Classifier(batch_norm=True), Points().x
    model.train()
    before = [buffer.clone() for buffer in model.buffers()]
    with buffers_kept(model):
        model(x)
        assert not any(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    assert [name for name, _ in model.named_buffers()][-1].endswith("num_batches_tracked")


def test_random_numbers_repeat_after_restore_and_differ_without():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    state = RandomState.capture()
    first, other = draw(), draw()
    state.restore()
    assert draw() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_a_gradient_that_is_missing_in_a_later_pass_is_zero_and_one_that_never_was_stays_none():
    always, once, never = (nn.Parameter(torch.ones(2)) for _ in range(3))
    moved = {}
    always.grad, once.grad = torch.ones(2), torch.ones(2)
    assert len(take_gradient([always, once, never], moved)) == 2
    once.grad = None
    gradient = take_gradient([always, once, never], moved)
    assert gradient[0].tolist() == [1, 1] and gradient[1].tolist() == [0, 0]
    assert never.grad is None


def test_no_gradient_and_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="does the loss depend on"):
        take_gradient([nn.Parameter(torch.ones(2))], {})
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(NotImplementedError, match="sparse=False"):
        take_gradient(list(embedding.parameters()), {})
