"""
DeepSpeed's ZeRO, experimental: this process's parts of the float32 weights as DTensors, which the unchanged algorithm moves.

DeepSpeed keeps the float32 weights that its optimizer steps ("masters"), each process a part of them, beside the weights that
the model computes with. So a pass at other weights is: move the masters, let DeepSpeed write them into the model as it does
after a step ("push"), run the Trainer's pass with DeepSpeed's step held back, and copy the reduced gradients' parts out. At the
end the direction goes where the last gradients were, and DeepSpeed clips and steps as in plain training.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from transformers import Trainer

from ..arguments import XSAMArguments
from ..state import XSAMUpdate
from ..xsam import xsam_gradient
from .precision import HALF


TRIED = ("0.19.8",)  # the versions of DeepSpeed that tests/test_deepspeed.py has passed with

# All that DeepSpeed does not document, by the class that has it. Methods are looked up when the trainer is built, attributes
# when DeepSpeed has made them, before the first pass; those of parameters at the end.
METHODS = {
    "runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": ("update_lp_params", "zero_grad"),
    "runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "_get_fp32_grad_state_partition",
        "_get_fp32_opt_state_partition",
        "_reassign_or_swap_out_partitioned_parameters",
        "empty_partition_cache",
        "zero_grad",
    ),
    "utils.tensor_fragment.tensor_fragment": ("get_lp_grad_fragment",),
}
ATTRIBUTES = {
    "DeepSpeedZeroOptimizer": ("averaged_gradients", "bit16_groups", "dp_process_group", "loss_scale"),
    "DeepSpeedZeroOptimizer_Stage3": (
        "dp_process_group",
        "fp16_groups",
        "grad_partitions_flat_buffer",
        "loss_scale",
        "persistent_parameters",
    ),
}
OF_PARAMETERS = {
    "DeepSpeedZeroOptimizer": ("_hp_mapping", "_index_in_param_group"),
    "DeepSpeedZeroOptimizer_Stage3": ("all_gather", "ds_id", "ds_numel", "ds_shape", "partition_numel"),
}

# The settings that were tried, and those that no gradient depends on.
_KNOWN = {
    "": {
        "comms_logger",
        "csv_monitor",
        "flops_profiler",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "steps_per_print",
        "tensorboard",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    },
    "bf16": {"enabled"},
    "data_types": {"grad_accum_dtype"},
    "zero_optimization": {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        "stage",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
    },
}
_OPTIMIZERS = {"adam", "adamw"}  # of DeepSpeed's own; others compress gradients, or make another thing of them
_WAY_OUT = "use FSDP2 (`fsdp_version: 2`), or set `rho` to 0."


def check_deepspeed(trainer: Trainer, arguments: XSAMArguments) -> None:
    """
    Raises unless DeepSpeed is a version, and is set up in a way, that XSAM was tried with.

    Raises:
        `NotImplementedError`: the message names what has not been tried, and the way out.
    """
    found = version("deepspeed")
    if found not in TRIED:
        raise NotImplementedError(
            f"XSAM reads parts of DeepSpeed that have no public names and was tried with {', '.join(TRIED)}, not "
            f"with {found}: install that version, {_WAY_OUT}"
        )
    for path, names in METHODS.items():
        module, cls = f"deepspeed.{path}".rsplit(".", 1)
        _look_up(getattr(importlib.import_module(module), cls), names)
    refused = {
        "ascent_scope": ("micro", "it needs each process's own gradient, which ZeRO does not keep"),
        "perturbation_dtype": ("stochastic", "DeepSpeed rounds the moved weights itself"),
    }
    for name, (value, reason) in refused.items():
        if getattr(arguments, name) == value:
            raise NotImplementedError(
                f"`{name}={value!r}` does not work under DeepSpeed: {reason}. Leave it out, {_WAY_OUT}"
            )
    if arguments.perturbation not in ("sam", "asam"):
        raise NotImplementedError(
            f"`perturbation={arguments.perturbation!r}` keeps an average between updates, which is not written into DeepSpeed's "
            f"checkpoints: choose 'sam' or 'asam', {_WAY_OUT}"
        )
    if trainer.args.torch_compile:
        raise NotImplementedError(
            f"`torch_compile` with DeepSpeed has not been tried with XSAM: leave it out, {_WAY_OUT}"
        )
    check_settings(trainer.accelerator.state.deepspeed_plugin.deepspeed_config, trainer.accelerator.mixed_precision)


def check_settings(config: Mapping[str, Any], mixed_precision: str) -> None:
    """
    Raises if something in DeepSpeed's configuration has not been tried with XSAM.

    Args:
        config (`Mapping`): DeepSpeed's, `"auto"` allowed.
        mixed_precision (`str`): accelerate's.

    Raises:
        `NotImplementedError`: the message names it, and the way out.
    """
    if mixed_precision not in ("no", "bf16") or _is_on(config.get("fp16")):
        raise NotImplementedError(
            f"XSAM does not follow the loss scaling of DeepSpeed's fp16: use `bf16=True`, {_WAY_OUT}"
        )
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise NotImplementedError(
            f"DeepSpeed without ZeRO (stage {stage!r}) has nothing that DDP has not: use DDP, or stage 1 to 3."
        )
    if stage == 1 and config.get("data_types"):
        raise NotImplementedError(
            "DeepSpeed takes norms of whole gradients for ZeRO-1 with `data_types`, and XSAM's direction is in parts: use stage 2 or 3, "
            f"leave `data_types` out, {_WAY_OUT}"
        )
    for part, known in _KNOWN.items():
        settings = config.get(part, {}) if part else {key: value for key, value in config.items() if key not in _KNOWN}
        for name, value in settings.items():
            if name not in known and _is_on(value):
                setting = f"{part}.{name}".lstrip(".")
                raise NotImplementedError(
                    f"`{setting}` of DeepSpeed's configuration has not been tried with XSAM: leave it out, {_WAY_OUT}"
                )
    optimizer = str(config.get("optimizer", {}).get("type", "AdamW"))
    if optimizer.lower() not in _OPTIMIZERS:
        raise NotImplementedError(
            f"DeepSpeed's optimizer {optimizer!r} has not been tried with XSAM: use AdamW or one of PyTorch's, {_WAY_OUT}"
        )


def _is_on(value: Any) -> bool:
    """Whether a setting asks for something: `{"device": "none"}` and `{"enabled": false}` do not."""
    if isinstance(value, Mapping):
        return value.get("device") != "none" and value.get("enabled") is not False and any(map(_is_on, value.values()))
    return value if isinstance(value, bool) else value not in (None, 0, 1, "none", "")


def _look_up(owner: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if not hasattr(owner, name):
            kind = owner if isinstance(owner, type) else type(owner)
            raise NotImplementedError(
                f"DeepSpeed's {kind.__name__} has no {name!r}, which XSAM needs: install DeepSpeed {TRIED[-1]}, {_WAY_OUT}"
            )


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
        kind = type(optimizer).__name__
        if type(engine).__name__ != "DeepSpeedEngine" or kind not in ATTRIBUTES or engine.has_moe_layers:
            raise NotImplementedError(
                f"XSAM has not been tried with DeepSpeed's {type(engine).__name__} and {kind}"
                f"{', nor with its experts' if engine.has_moe_layers else ''}: {_WAY_OUT}"
            )
        _look_up(optimizer, ATTRIBUTES[kind])
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
                _look_up(parameter, OF_PARAMETERS[kind])
        if optimizer.loss_scale != 1:
            raise NotImplementedError(f"XSAM does not follow DeepSpeed's loss scaling: use `bf16=True`, {_WAY_OUT}")
        masters = {name: self._shards.master(parameter).detach() for name, parameter in self._parameters.items()}
        self._mesh = DeviceMesh.from_group(optimizer.dp_process_group, next(iter(masters.values())).device.type)
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
                    f"A loss that differentiates inside cannot be searched under DeepSpeed: fix `alpha`, {_WAY_OUT}"
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
            found = self._shards.gradient(parameter)
            found.copy_(direction.to_local().view_as(found))
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


class _Slices:
    """ZeRO-1 and 2: of all weights in a row each process steps a slice, and every model is whole."""

    def __init__(self, optimizer: Any):
        self._optimizer, self.groups = optimizer, optimizer.bit16_groups

    @staticmethod
    def size(parameter: Any) -> tuple[int, bool]:
        """The number of elements, and whether it is a matrix."""
        return parameter.numel(), parameter.ndim > 1

    @staticmethod
    def master(parameter: Any) -> Tensor:
        mapping = parameter._hp_mapping
        return torch.empty(0, device=parameter.device) if mapping is None else mapping.hp_fragment

    @staticmethod
    def gradient(parameter: Any) -> Tensor:
        """This process's part of the reduced gradient, where DeepSpeed's step will look for it."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return torch.empty(0, device=parameter.device)
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    def forget(self) -> None:
        """The next pass begins to add up anew."""
        self._optimizer.zero_grad()
        for group in self._optimizer.averaged_gradients:
            self._optimizer.averaged_gradients[group] = None

    def push(self) -> None:
        self._optimizer.update_lp_params()


class _Partitions:
    """ZeRO-3: each process has a part of every weight, padded to equal lengths, and gathers a layer when it is needed."""

    def __init__(self, optimizer: Any):
        self._optimizer, self.groups = optimizer, optimizer.fp16_groups
        self._rank = torch.distributed.get_rank(optimizer.dp_process_group)

    @staticmethod
    def size(parameter: Any) -> tuple[int, bool]:
        return parameter.ds_numel, len(parameter.ds_shape) > 1

    def master(self, parameter: Any) -> Tensor:
        return self._without_padding(parameter, self._optimizer._get_fp32_opt_state_partition(parameter, False)[0])

    def gradient(self, parameter: Any) -> Tensor:
        return self._without_padding(parameter, self._optimizer._get_fp32_grad_state_partition(parameter, False)[0])

    def _without_padding(self, parameter: Any, part: Tensor) -> Tensor:
        length = parameter.partition_numel()
        return part[: max(0, min(length, parameter.ds_numel - self._rank * length))]

    def forget(self) -> None:
        self._optimizer.zero_grad()
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
