"""
DeepSpeed's ZeRO, experimental: this process's parts of the float32 weights as DTensors, which the unchanged algorithm moves.

DeepSpeed keeps the float32 weights that its optimizer steps ("masters"), each process a part of them, beside the weights that
the model computes with. So a pass at other weights is: move the masters, let DeepSpeed write them into the model as it does
after a step ("push"), run the Trainer's pass with DeepSpeed's step held back, and copy the reduced gradients' parts out. At the
end the direction goes where the last gradients were, and DeepSpeed clips and steps as in plain training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import Trainer

from ..state import XSAMUpdate
from ..xsam import xsam_gradient
from .deepspeed import ATTRIBUTES, OF_ENGINES, OF_PARAMETERS, OF_SLICES, OFFLOADED, WAY_OUT, look_up
from .precision import HALF


class ZeROWeights:
    """
    The weights of a DeepSpeed engine, and updates of XSAM on them.

    Each is a `DTensor` whose local part is the float32 part of DeepSpeed's optimizer: a view, no copy. A weight of two dimensions or
    more is a column, the others are flat, so that `asam_scope="weights"` can tell them apart.

    Args:
        engine (`deepspeed.DeepSpeedEngine`): after its checkpoint, if any, was loaded.

    Raises:
        `NotImplementedError`: the engine is of a kind that has not been tried, or does not step all trainable weights.
    """

    def __init__(self, engine: Any):
        self.engine, optimizer = engine, engine.optimizer
        look_up(engine, OF_ENGINES)
        kind = type(optimizer).__name__
        if type(engine).__name__ != "DeepSpeedEngine" or kind not in ATTRIBUTES or engine.has_moe_layers:
            raise NotImplementedError(
                f"XSAM has not been tried with DeepSpeed's {type(engine).__name__} and {kind}"
                f"{', nor with its experts' if engine.has_moe_layers else ''}: {WAY_OUT}"
            )
        look_up(optimizer, ATTRIBUTES[kind])
        self._parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self._shards: _Slices | _Partitions = _Partitions(optimizer) if "Stage3" in kind else _Slices(optimizer)
        stepped = {id(parameter) for group in self._shards.groups for parameter in group}
        if stepped - {id(parameter) for parameter in self._parameters.values()}:
            raise NotImplementedError(
                "DeepSpeed's optimizer steps weights outside the model, such as a loss's own, which XSAM would not move: make them a "
                "part of the model, or set `rho` to 0."
            )
        for name, parameter in self._parameters.items():
            if id(parameter) not in stepped:
                raise NotImplementedError(
                    f"DeepSpeed's optimizer does not step the trainable weight {name!r}: freeze it, or set `rho` to 0."
                )
            if getattr(parameter, "_hp_mapping", parameter) is not None:  # the others have no part in this process
                look_up(parameter, OF_PARAMETERS[kind])
        if optimizer.loss_scale != 1:
            raise NotImplementedError(f"XSAM does not follow DeepSpeed's loss scaling: use `bf16=True`, {WAY_OUT}")
        masters = {name: self._shards.master(parameter).detach() for name, parameter in self._parameters.items()}
        group, device = optimizer.dp_process_group, next(iter(masters.values())).device
        if self._shards.offloaded:  # NCCL adds up nothing in the host's memory
            group = dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
        self._mesh = DeviceMesh.from_group(group, device.type)
        self.weights = {name: self._spread(name, part).requires_grad_() for name, part in masters.items()}

    def _spread(self, name: str, part: Tensor) -> DTensor:
        n, matrix = self._shards.size(self._parameters[name])
        column, shape = (part.view(-1, 1), (n, 1)) if matrix else (part.view(-1), (n,))
        return DTensor.from_local(
            column, self._mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=(1,) * len(shape)
        )

    def taken_in_half(self) -> dict[Tensor, torch.dtype]:
        """What the model has these weights in, if it is half precision; see [`SeenAscent`]."""
        kinds = {self.weights[name]: parameter.dtype for name, parameter in self._parameters.items()}
        return {weight: dtype for weight, dtype in kinds.items() if dtype in HALF}

    @contextmanager
    def step_held(self) -> Iterator[None]:
        """Within the block, a pass of the Trainer ends without the step that accelerate lets DeepSpeed take."""
        object.__setattr__(self.engine, "step", lambda: None)
        try:
            yield
        finally:
            object.__delattr__(self.engine, "step")

    def update(
        self, weights: Any, gradient: Callable[[], Tensor], probe: Callable[[], Tensor], *args, **kwargs
    ) -> XSAMUpdate:
        """`xsam_gradient` on these weights, and DeepSpeed's step; `gradient` and `probe` are passes of the model."""
        first = True

        def gradient_of_parts() -> Tensor:
            nonlocal first
            if not first:
                self._shards.forget()
                self._push()
            first = False
            loss = gradient()
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    found = self._shards.gradient(parameter)
                    self.weights[name].grad = self._spread(name, found.detach().to(torch.float32, copy=True))
            return loss

        def probe_of_parts() -> Tensor:
            if torch.is_grad_enabled():
                raise NotImplementedError(
                    f"A loss that differentiates inside cannot be searched under DeepSpeed: fix `alpha`, {WAY_OUT}"
                )
            self._push()
            return probe()

        try:
            with self.step_held():
                update = xsam_gradient(weights, gradient_of_parts, probe_of_parts, *args, **kwargs)
            self._step()
        except BaseException:
            self._refuse_from_now_on()
            raise
        return update

    @torch.no_grad()
    def _push(self) -> None:
        """The masters as they stand into the model of every process."""
        self._shards.push()

    @torch.no_grad()
    def _step(self) -> None:
        for name, parameter in self._parameters.items():
            direction: Any = self.weights[name].grad
            self._shards.put(direction.to_local(), parameter)
            self.weights[name].grad = None
        self.engine.step()
        self._shards.forget()
        if not self.engine.was_step_applied():  # a gradient that is not finite: the model is where the last pass was
            self._push()

    def _refuse_from_now_on(self) -> None:
        """
        After an exception the masters are whole, but the model may stand elsewhere, and to push takes all processes.

        Nobody can tell whether the others come. So the model neither computes nor is saved.
        """

        def refuse(*args, **kwargs):
            raise RuntimeError(
                "An exception ended an update of XSAM while DeepSpeed's model stood at moved weights: start again from the last "
                "checkpoint."
            )

        self.engine.module.register_forward_pre_hook(refuse)
        self.engine.module.register_state_dict_pre_hook(refuse)


class _Parts:
    """
    This process's parts of masters and gradients, whatever the stage.

    With offload both are in the host's memory. There DeepSpeed writes a pass's gradients over those of the pass before, so that a
    weight without a gradient keeps an old one. As it writes one it notes its norm, by which it clips.
    """

    def __init__(self, optimizer: Any, groups: Any, offloaded: bool):
        self._optimizer, self.groups, self.offloaded = optimizer, groups, offloaded
        if offloaded:
            look_up(optimizer, OFFLOADED[type(optimizer).__name__])

    def gradient(self, parameter: Any) -> Tensor:
        """This process's part of the reduced gradient of a pass."""
        part = self._gradient(parameter)
        if self.offloaded and part.numel():
            if self._optimizer.get_param_id(parameter) not in self._optimizer.norm_for_param_grads:
                part.zero_()
        return part

    def put(self, direction: Tensor, parameter: Any) -> None:
        """A direction where DeepSpeed's step will look for the gradient."""
        part = self._gradient(parameter)
        part.copy_(direction.view_as(part))
        if self.offloaded and part.numel():
            key = self._optimizer.get_param_id(parameter)
            self._optimizer.norm_for_param_grads[key] = torch.linalg.vector_norm(part)

    def forget(self) -> None:
        """The next pass begins to add up anew."""
        self._optimizer.zero_grad()
        if self.offloaded:
            self._optimizer.reset_cpu_buffers()

    def _gradient(self, parameter: Any) -> Tensor:
        raise NotImplementedError


class _Slices(_Parts):
    """ZeRO-1 and 2: of all weights in a row each process steps a slice, and every model is whole."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer, optimizer.bit16_groups, optimizer.cpu_offload)

    @staticmethod
    def size(parameter: Any) -> tuple[int, bool]:
        """The number of elements, and whether it is a matrix."""
        return parameter.numel(), parameter.ndim > 1

    def master(self, parameter: Any) -> Tensor:
        mapping = parameter._hp_mapping
        if mapping is None:
            return self._nothing(parameter)
        look_up(mapping, OF_SLICES)
        return mapping.hp_fragment

    def _gradient(self, parameter: Any) -> Tensor:
        mapping = parameter._hp_mapping
        if mapping is None:
            return self._nothing(parameter)
        if self.offloaded:
            self._optimizer._wait_for_offload_copies()
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def _nothing(self, parameter: Any) -> Tensor:
        return torch.empty(0, device="cpu" if self.offloaded else parameter.device)

    def forget(self) -> None:
        super().forget()
        for group in self._optimizer.averaged_gradients:
            self._optimizer.averaged_gradients[group] = None
        if self.offloaded:
            # As after a step: a first micro-batch begins anew, and a single one is not kept in the host's memory as well.
            self._optimizer.micro_step_id = -1
            for sums in self._optimizer.accumulated_grads_in_cpu.values():
                sums.zero_()  # a weight that only later micro-batches use is added to what is here

    def push(self) -> None:
        self._optimizer.update_lp_params()


class _Partitions(_Parts):
    """ZeRO-3: each process has a part of every weight, padded to equal lengths, and gathers a layer when it is needed."""

    def __init__(self, optimizer: Any):
        super().__init__(optimizer, optimizer.fp16_groups, optimizer.offload_optimizer)
        self._rank = dist.get_rank(optimizer.dp_process_group)

    @staticmethod
    def size(parameter: Any) -> tuple[int, bool]:
        return parameter.ds_numel, len(parameter.ds_shape) > 1

    def master(self, parameter: Any) -> Tensor:
        return self._without_padding(parameter, self._optimizer._get_fp32_opt_state_partition(parameter, False)[0])

    def _gradient(self, parameter: Any) -> Tensor:
        return self._without_padding(parameter, self._optimizer._get_fp32_grad_state_partition(parameter, False)[0])

    def _without_padding(self, parameter: Any, part: Tensor) -> Tensor:
        length = parameter.partition_numel()
        return part[: max(0, min(length, parameter.ds_numel - self._rank * length))]

    def forget(self) -> None:
        super().forget()
        # Weights without a gradient in the next pass keep what is here.
        self._optimizer.grad_partitions_flat_buffer.zero_()

    def push(self) -> None:
        # A forward pass without a backward leaves weights gathered, which the next one would take for current.
        self._optimizer.empty_partition_cache()
        for group in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if kept_whole := self._optimizer.persistent_parameters:
            kept_whole[0].all_gather(kept_whole)


def engine_of(trainer: Trainer) -> Any:
    """The engine that accelerate has made; `None` without DeepSpeed, and before a training."""
    if trainer.accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return getattr(trainer.accelerator.deepspeed_engine_wrapped, "engine", None)


def is_deepspeeds_own(name: str, value: Any) -> bool:
    """Whether ZeRO-3 moves a parameter's memory about as it gathers and releases it, or counts passes in a module's attribute."""
    if isinstance(value, Tensor):
        return hasattr(value, "ds_id")
    return name in ("applied_pre_backward_ref_cnt", "ds_grads_remaining")
