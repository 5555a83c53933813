"""The weights that move: gradients taken from them, steps added to them, and all of them back at θ_0 bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .arguments import XSAMArguments
from .arithmetic import add_, clone, copy_, subtract_
from .geometry import are_plain, local, norm
from .records import writes_into
from .rounding import add_rounded
from .seen import SeenAscent
from .trainable import Weights, perturbed_and_excluded, refuse_unfit


class MovableWeights:
    """
    θ: the weights that an update perturbs, and the excluded ones beside them.

    A weight takes part from the first pass on that gives it a gradient (layer drop, mixtures of experts); in passes that
    give it none its gradient is zero. One that never has any stays without, as in plain training, where the optimizer
    passes it over.

    Args:
        weights (`torch.nn.Module`, mapping of names to `torch.Tensor`, or iterable of `torch.Tensor`): see `xsam_gradient`.
        arguments ([`XSAMArguments`]): `rho_exclude`, `perturbation_dtype`.
        seed (`int`):
            For rounding at random: the number of the update, so that all processes round alike and no random stream moves.
        memory (`list[torch.Tensor]`, *optional*): of an earlier update's copy; see [`weights_kept`].
        seen ([`SeenAscent`], *optional*): measures the ascent, if it is due.

    Raises:
        `ValueError`: see [`perturbed_and_excluded`].
    """

    def __init__(
        self,
        weights: Weights,
        arguments: XSAMArguments,
        seed: int,
        memory: list[Tensor] | None = None,
        seen: SeenAscent | None = None,
    ):
        self.named, self.excluded = perturbed_and_excluded(weights, arguments.rho_exclude)
        # A list of weights, which may be made anew for each update, says nothing of the model.
        listed = isinstance(weights, nn.ParameterList | nn.ParameterDict)
        self.model = weights if isinstance(weights, nn.Module) and not listed else None
        self.names: list[str] = []
        self.weights: list[Tensor] = []  # those that had a gradient in some pass so far
        self._waiting = dict(self.named)  # the others
        self._all = list(self.named.values())
        self._origin: list[Tensor] = []
        self._memory = memory
        self._seen = seen if seen is not None and seen.is_due else None
        if self._seen is not None:
            self._seen.begin()
        self._seed = seed
        self._generator: torch.Generator | None = None
        if arguments.perturbation_dtype == "stochastic":
            self._generator = torch.Generator(self.device).manual_seed(seed)

    @property
    def device(self) -> torch.device:
        return self._all[0].device

    @property
    def _every(self) -> dict[str, Tensor]:
        return {**self.named, **{f"excluded weight {i}": weight for i, weight in enumerate(self.excluded)}}

    def refuse_unfit(self) -> None:
        """Refuses weights that cannot be moved and put back one by one; see the function."""
        for name, weight in self._every.items():
            if weight.is_meta:
                raise ValueError(f"{name!r} is on the meta device, where it has no numbers: load the model first.")
        refuse_unfit(self._every)

    def count_writes(self) -> dict[str, int]:
        """PyTorch's counts of writes into the weights, also into those that stay; a `DTensor` has none of its own."""
        return {name: writes_into(weight) for name, weight in self._every.items() if not isinstance(weight, DTensor)}

    def left_over(self) -> list[tuple[Tensor, Tensor]]:
        """The weights that have a gradient other than 0 already, and these gradients; waits for the device."""
        having = [(weight, weight.grad) for weight in (*self._all, *self.excluded) if weight.grad is not None]
        return [(weight, grad) for weight, grad in having if not grad.is_sparse and local([grad])[0].any()]

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """
        The gradients of the weights that take part, and those of the excluded weights.

        Raises:
            `ValueError`: no weight has a gradient, or none in this pass.
            `NotImplementedError`: a gradient is sparse.
        """
        for name, weight in list(self._waiting.items()):
            if weight.grad is not None:
                self.names.append(name)
                self.weights.append(self._waiting.pop(name))
        if not self.weights:
            raise ValueError(
                "No weight received a gradient: does the loss depend on the trainable weights, and does the pass call `backward`?"
            )
        gradients: list[Any] = [weight.grad for weight in self.weights]
        if all([gradient is None for gradient in gradients]):
            raise ValueError(
                "A later pass of the update gave no weight a gradient, and the first one did: let every pass go over the same batch "
                "(an iterator or a generator is at its end after the first), and call `backward`."
            )
        if not (are_plain(gradients) and all([gradient.layout == torch.strided for gradient in gradients])):
            gradients = [_dense_gradient(weight) for weight in self.weights]
        excluded = [weight.grad for weight in self.excluded if weight.grad is not None]
        if any([gradient.is_sparse for gradient in excluded]):
            _refuse_sparse()
        return gradients, excluded

    def drop_gradients(self) -> None:
        """Frees the gradients of all weights."""
        drop_gradients([*self._all, *self.excluded])

    @contextmanager
    def gradients_aside(self) -> Iterator[None]:
        """Puts all gradients back at the end of the block, in which a pass may leave others."""
        before = [(weight, weight.grad) for weight in (*self._all, *self.excluded)]
        self.drop_gradients()
        try:
            yield
        finally:
            for weight, gradient in before:
                weight.grad = gradient

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Copies the weights, which stand at θ_0, and writes them back at the end of the block; see [`weights_kept`]."""
        with weights_kept(self._all, self._memory) as self._origin:
            yield

    def climb(self, direction: list[Tensor], factor: Tensor) -> None:
        r"""
        $\theta_{i+1} = \theta_i + \varepsilon_i$; then frees the direction and all gradients, for the next pass to make its own.

        Args:
            direction (`list[torch.Tensor]`): used up.
            factor (`torch.Tensor`): makes the direction ε_i, 0-dim.
        """
        with self._watched(self.weights, direction, factor):
            if self._generator is not None:
                add_rounded(self.weights, [(direction, factor)], self._generator)
            else:
                add_(self.weights, direction, factor)
        direction.clear()
        self.drop_gradients()

    def climb_along(self, average: Mapping[str, Tensor], length: float) -> None:
        r"""
        $\theta \leftarrow \theta + \ell\, m/\|m\|$ for a vector m that is kept by name; weights without a part in it stay.

        Args:
            average (`Mapping[str, torch.Tensor]`): m, left as it is.
            length (`float`): ℓ, 2-norm of the step over all perturbed weights.
        """
        pairs = [(weight, average[name]) for name, weight in self._waiting.items() if name in average]
        if pairs:
            weights, parts = map(list, zip(*pairs, strict=True))
            size = norm(parts)
            factor = torch.where(size > 0, length / size, torch.zeros_like(size))
            with self._watched(weights, parts, factor):
                if self._generator is None:
                    add_(weights, parts, factor, keep=True)
                else:
                    add_rounded(weights, [(parts, factor)], self._generator)

    def _watched(
        self, weights: Sequence[Tensor], direction: Sequence[Tensor], factor: Tensor
    ) -> AbstractContextManager[None]:
        return nullcontext() if self._seen is None else self._seen.step(weights, direction, factor)

    def displacement(self, own_memory: bool) -> list[Tensor]:
        """
        θ_k − θ_0, in the weights' own storage, where no further buffer is needed, or in memory of its own.

        A search moves the weights, so that the displacement must not stand there.
        """
        subtract_(self._all, self._origin)
        return [weight.clone() for weight in self.weights] if own_memory else self.weights

    def move_to(self, *terms: tuple[Sequence[Tensor], float | Tensor]) -> None:
        r"""$\theta \leftarrow \theta_0 + \sum a x$."""
        copy_(self._all, self._origin)
        # Every point of one search is rounded alike, or α would follow the rounding; but not as the ascent was rounded, which
        # is in v_0 and would add to itself.
        if self._generator is not None:
            self._generator.manual_seed(2**31 + self._seed)
        add_rounded(self.weights, terms, self._generator)


def _dense_gradient(weight: Tensor) -> Tensor:
    gradient = weight.grad
    if gradient is None:
        gradient = torch.zeros_like(weight)
    elif gradient.is_sparse:
        _refuse_sparse()
    elif gradient.is_conj():
        gradient = gradient.resolve_conj()
    elif isinstance(weight, DTensor) and isinstance(gradient, DTensor) and gradient.placements != weight.placements:
        # Tensor parallelism leaves a vocabulary that is split over processes with a whole gradient on each.
        gradient = gradient.redistribute(weight.device_mesh, weight.placements)
    weight.grad = gradient
    return gradient


def _refuse_sparse() -> NoReturn:
    raise NotImplementedError(
        "A gradient is sparse and XSAM needs dense ones: build the embedding with `sparse=False`."
    )


def drop_gradients(weights: Iterable[Tensor]) -> None:
    """Frees the gradients."""
    for weight in weights:
        weight.grad = None


@contextmanager
def weights_kept(weights: Sequence[Tensor], memory: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """
    Gives a copy of the weights and writes it back at the end, bit for bit, also when an exception ends the block.

    The copy is written back in place (`copy_`): storage, and with it DDP's buckets, FSDP's shards, compiled graphs and tied
    weights, stays where it is. Subtracting the displacement again would not do: (w + e) − e is not w in floating point.

    Args:
        weights (`Sequence[torch.Tensor]`): all of them.
        memory (`list[torch.Tensor]`, *optional*):
            Where the copy stands, if it fits; made to fit otherwise, on a CPU. Fresh pages from the kernel take longer than the
            copy; the allocators of other devices keep their memory themselves.

    Yields:
        `list[torch.Tensor]`: the copy, this process's part of each weight. One parameter-sized buffer.
    """
    shards = local(weights)
    if memory is None or shards[0].device.type != "cpu":
        origin = clone(shards)
    else:
        if [(part.shape, part.dtype) for part in memory] != [(w.shape, w.dtype) for w in shards]:
            memory[:] = [torch.empty_like(shard) for shard in shards]
        origin = list(memory)
        copy_(origin, shards)
    try:
        yield origin
    finally:
        copy_(shards, origin)
