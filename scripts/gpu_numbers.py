"""What `gpu_check` asks of updates without a Trainer: the right numbers, and weights that come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scripts.checks import Expected, Found, Skip, at_most, each, exactly, needs_a_gpu
from xsam_hf import XSAMArguments, XSAMState, xsam_gradient
from xsam_hf.rounding import add_rounded


METHODS: dict[str, dict[str, Any]] = {
    "sam": {"alpha": 1.0},
    "alpha 1.5": {"alpha": 1.5},
    "xsam": {"alpha_search_steps": 1},
    "three steps": {"alpha": 1.5, "ascent_steps": 3},
    **{name: {"perturbation": name, "alpha": 1.3} for name in ("asam", "vasso", "fsam", "stale")},
    **{name: {"direction": name, "ascent_steps": 2} for name in ("lsam", "lsam+", "msam", "msam+")},
    **{f"{scale} norm": {"alpha": 1.3, "gradient_scale": scale} for scale in ("first", "mean", "max", "slope")},
    "slope_max norm": {"alpha": 1.3, "gradient_scale": "slope_max"},
}


def network(device: str, dtype: torch.dtype, width: int = 64, seed: int = 0) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A tanh network and its loss on 64 points: the same numbers on every device and, but for rounding, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    with torch.no_grad():
        for weight in model.parameters():
            fan = weight.shape[-1] if weight.ndim > 1 else width
            weight.copy_(torch.randn(weight.shape, generator=generator) * fan**-0.5)
    model.to(device, dtype)
    x = torch.randn(64, 20, generator=generator).to(device, dtype)
    y = torch.randint(10, (64,), generator=generator).to(device)
    return model, lambda: nn.functional.cross_entropy(model(x).float() if dtype.itemsize < 4 else model(x), y)


def updates(device: str, dtype: torch.dtype, number: int, width: int = 64, **method) -> tuple[Tensor, XSAMState]:
    """The gradient of the last of some updates with SGD, on a CPU in float64, and the state."""
    model, loss = network(device, dtype, width)
    arguments, state = XSAMArguments(**{"rho": 0.5, **method}), XSAMState()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def gradient() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    for _ in range(number):
        optimizer.zero_grad()
        xsam_gradient(model, gradient, lambda: loss().detach(), arguments, state)
        gradients = torch.cat([weight.grad.detach().reshape(-1) for weight in model.parameters()])
        optimizer.step()
    return gradients.cpu().double(), state


def distance(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


def changed(before: Sequence[Tensor], after: Sequence[Tensor]) -> int:
    """How many numbers are not the same, bit for bit or both NaN."""
    return sum(int((~((a == b) | (a.isnan() & b.isnan()))).sum()) for a, b in zip(before, after, strict=True))


def agreement_with_float64_on_a_cpu(device: str) -> Found:
    yield from each(_agreement, METHODS, device)


def _agreement(name: str, device: str) -> Found:
    right, kept = updates("cpu", torch.float64, 2, **METHODS[name])
    found, state = updates(device, torch.float32, 2, **METHODS[name])
    yield "gradient", distance(found, right), at_most(1e-5), "relative"
    if name == "xsam":
        yield "alpha", abs(state.alpha - kept.alpha), exactly(0), ""


def tf32(device: str) -> Found:
    needs_a_gpu(device)
    if torch.cuda.get_device_capability() < (8, 0):
        raise Skip("the device has no TF32")
    right, kept = updates(device, torch.float32, 2, width=1024, alpha_search_steps=1)
    torch.set_float32_matmul_precision("high")
    found, state = updates(device, torch.float32, 2, width=1024, alpha_search_steps=1)
    # Ten bits of mantissa; 0 would mean that it was not on.
    yield "gradient with TF32 and without", distance(found, right), Expected(1e-7, 2e-2), "relative"
    yield "alpha with TF32 and without", abs(state.alpha - kept.alpha), at_most(0.1001), ""


def weights_come_back(device: str) -> Found:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rounding in ("weights", "stochastic"):
            model, loss = network(device, dtype)
            before = [weight.detach().clone() for weight in model.parameters()]
            arguments = XSAMArguments(rho=0.5, ascent_steps=2, perturbation_dtype=rounding)
            lost = 0
            for fail_at in (0, 2, 3):
                calls = 0

                def gradient(model=model, loss=loss, fail_at=fail_at) -> Tensor:
                    nonlocal calls
                    calls += 1
                    if calls == fail_at:
                        raise InterruptedError
                    model.zero_grad()
                    value = loss()
                    value.backward()
                    return value.detach()

                try:
                    xsam_gradient(model, gradient, lambda loss=loss: loss().detach(), arguments, XSAMState())
                except InterruptedError:
                    pass
                lost += changed(before, list(model.parameters()))
            yield (
                f"{str(dtype)[6:]}, {rounding}: changed after an update, after raised passes",
                lost,
                exactly(0),
                "numbers",
            )


def rounding_at_random(device: str) -> Found:
    n = 2**26 if device == "cuda" else 2**20
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.ones(n, dtype=dtype, device=device)
        step = torch.full_like(weight, 1e-4)
        generator = torch.Generator(device).manual_seed(0)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        add_rounded([weight], [([step], 1.0)], generator)
        if device == "cuda":
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            yield f"{str(dtype)[6:]}: temporaries", peak, at_most(64), "MiB"
        mean = (weight.double().mean().item() - 1) / step[0].item()
        # Of n weights, each moved by a gap with a chance of p: the mean's standard deviation is gap √(p / n).
        yield f"{str(dtype)[6:]}: mean of a step that rounding loses", mean, Expected(0.9, 1.1), "of it"
