"""The top of the Hessian's spectrum (Table 16 of the paper), by hessian-eigenthings; only the products H v are ours."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import logging

from .checked import check_count
from .surface import Surface, check_surface


METHODS = ("autograd", "finite_difference")
# Truncation falls with its square, rounding with its inverse; in float32 1e-3 lost least on small GPT-2s (5e-3: 0.3 % of λ_1).
_STEP = {torch.float64: 6e-6, torch.float32: 1e-3}


@dataclass
class HessianSpectrum:
    """
    Args:
        eigenvalues (`list[float]`): λ_1 … λ_k, the highest first.
        residuals (`list[float]`): ‖H v − λ v‖ of each; the true eigenvalue is no further away than that.
        trace (`float`, *optional*), trace_error (`float`, *optional*): estimate and its standard error (Hutch++).
        size (`int`): number of weights.
        method (`str`): how H v was taken: `"autograd"` or `"finite_difference"`.
        products (`int`): how many H v were taken, each over all batches.
    """

    eigenvalues: list[float]
    residuals: list[float]
    trace: float | None
    trace_error: float | None
    size: int
    method: str
    products: int

    @property
    def ratio(self) -> float:
        """λ_1/λ_5, or over the last one if there are fewer."""
        return self.eigenvalues[0] / self.eigenvalues[:5][-1]


@contextmanager
def hessian_operator(surface: Surface, method: str | None = None) -> Iterator[tuple[Any, str]]:
    """
    H = ∇²L(θ_0) as an operator for hessian-eigenthings' algorithms, while the block lasts, and the method that it takes.

    Args:
        surface ([`Surface`]): its weights that receive a gradient, flattened in their order, are the operator's vector.
        method (`str`, *optional*):
            `"autograd"` differentiates twice, with attention's kernels that can be; `"finite_difference"` takes
            (∇L(θ_0 + εv) − ∇L(θ_0 − εv))/2ε. By default the first where the model allows it.

    Raises:
        `ValueError`: there is no such method.
    """
    check_surface(surface)
    if method not in (None, *METHODS):
        raise ValueError(f"`method` is {method!r}: choose one of {', '.join(METHODS)}.")
    eigenthings = _eigenthings()
    with surface.moving() as theta, sdpa_kernel(SDPBackend.MATH):
        theta.back()
        shapes = [weight.shape for weight in theta.weights]
        sizes = [weight.numel() for weight in theta.weights]
        names, batches = set(theta.names), len(surface.batches)
        step = _STEP.get(theta.weights[0].dtype, 1e-3)

        def finite_difference(v: Tensor) -> Tensor:
            size = v.norm()
            direction = [part.view(shape) for part, shape in zip((v / size).split(sizes), shapes, strict=True)]
            up, down = (theta.gradient_at((direction, sign * step))[1] for sign in (1, -1))
            return torch.cat([(a - b).reshape(-1) for a, b in zip(up, down, strict=True)]) * (size / (2 * step))

        exact = eigenthings.HessianOperator(
            surface.model,
            range(batches),
            lambda model, i: surface.batch_loss(i) * batches,  # the operator takes the mean over batches
            param_filter=lambda name, weight: name in names,
        )
        approximate = eigenthings.LambdaOperator(finite_difference, exact.size, exact.device, exact.dtype)
        if method is None:
            method = "autograd" if _differentiates_twice(exact) else "finite_difference"
        with torch.enable_grad():
            yield (exact if method == "autograd" else approximate), method


def hessian_spectrum(
    surface: Surface,
    count: int = 5,
    method: str | None = None,
    trace_products: int = 30,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> HessianSpectrum:
    """
    The highest eigenvalues by Lanczos' algorithm, and the trace by Hutch++.

    Lanczos finds a multiple eigenvalue, such as the 0 of directions that change nothing, once. Where half of the spectrum is asked for,
    the whole matrix is taken, and its eigenvalues are as often there as they are in it.

    Args:
        surface ([`Surface`]): in evaluation mode, of several batches.
        count (`int`, *optional*, defaults to 5): how many eigenvalues.
        method (`str`, *optional*): see [`hessian_operator`].
        trace_products (`int`, *optional*, defaults to 30): products H v for the trace; 0: no trace.
        tolerance (`float`, *optional*, defaults to 0.01):
            Lanczos takes more steps, up to 80, until each residual is below this share of λ_1. A vector of the model's size is kept
            for each step.
        seed (`int`, *optional*): of the vectors that the algorithms start from; no other random stream moves.
    """
    check_count("count", count)
    check_count("trace_products", trace_products, least=0)
    with hessian_operator(surface, method) as (operator, taken):
        count, products = min(count, operator.size), 0
        if 2 * count >= operator.size:
            values, residuals = _of_whole_matrix(operator, count)
            products += operator.size
        else:
            for steps in (20, 40, 80):
                steps = min(max(steps, 2 * count), operator.size)
                found = _eigenthings().lanczos(
                    operator, k=count, max_iter=steps, which="LA", reorthogonalize=True, seed=seed
                )
                products += found.iterations
                if found.iterations < steps or found.residuals.max() <= tolerance * found.eigenvalues[0].abs():
                    break
            values, residuals = found.eigenvalues.tolist(), found.residuals.tolist()
        estimate = error = None
        if trace_products > 0:
            result = _eigenthings().trace(operator, num_matvecs=trace_products, seed=seed)
            estimate, error, products = result.estimate, result.stderr, products + trace_products
        if not all(map(math.isfinite, values)):
            raise ValueError("The Hessian at these weights is not finite: there is no spectrum.")
        return HessianSpectrum(values, residuals, estimate, error, operator.size, taken, products)


def _of_whole_matrix(operator: Any, count: int) -> tuple[list[float], list[float]]:
    """Eigenvalues, the highest first, and residuals, from a product with each unit vector; NaN if the matrix is not finite."""
    unit_vectors = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
    matrix = torch.stack([operator.matvec(vector) for vector in unit_vectors], dim=1)
    if not matrix.isfinite().all():
        return [math.nan] * count, [math.nan] * count
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    residuals = (matrix @ vectors - vectors * values).norm(dim=0)
    return values.flip(0)[:count].tolist(), residuals.flip(0)[:count].tolist()


def _eigenthings() -> Any:
    try:
        return importlib.import_module("hessian_eigenthings")
    except ImportError as error:
        raise ImportError(
            "The Hessian's spectrum needs hessian-eigenthings: `pip install 'xsam_hf[analysis]'`."
        ) from error


def _differentiates_twice(operator: Any) -> bool:
    try:
        with torch.enable_grad():
            operator.matvec(torch.ones(operator.size, dtype=operator.dtype, device=operator.device))
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logging.get_logger(__name__).warning(
            f"The model cannot be differentiated twice ({error}): taking finite differences of gradients."
        )
        return False
    return True
