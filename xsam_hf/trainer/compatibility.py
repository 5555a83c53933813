"""What XSAM cannot work with, said when the trainer is built."""

from __future__ import annotations

import reprlib
from dataclasses import fields
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..arguments import XSAMArguments
from ..trainable import perturbed_and_excluded, refuse_unfit
from .deepspeed import check_deepspeed


logger = logging.get_logger(__name__)

# Each process holds the whole model and its own part of the batch.
_REPLICATED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_HPU,
    DistributedType.MULTI_MLU,
    DistributedType.MULTI_MUSA,
    DistributedType.MULTI_SDAA,
}
_GRAPH_MODES = ("reduce-overhead", "max-autotune")
_STEP_IN_BACKWARD = ("lomo", "adalomo", "layerwise")


def check_supported(trainer: Trainer, arguments: XSAMArguments) -> None:
    """
    Raises if the trainer's set-up cannot run XSAM; warns about trainable weights in half precision. `rho=0` always passes.

    Raises:
        `ValueError`: the model has no trainable weights, or a field of the method was set on arguments that have no such field.
        `NotImplementedError`: each message is one sentence with the way out.
    """
    if arguments.rho == 0:
        return
    check_plain_fields(trainer.args)
    _check_distribution(trainer, arguments)
    _check_compilation(trainer.args)
    _check_optimizer(trainer)
    rescaled = {"perturbation": arguments.perturbation, "gradient_scale": arguments.gradient_scale}
    for name, value in rescaled.items():
        if trainer.accelerator.scaler is not None and value in ("vasso", "fsam", "slope", "slope_max"):
            raise NotImplementedError(
                f"`{name}` {value!r} compares gradients with losses or with those of other updates, which a GradScaler "
                "scales differently: use `bf16=True` instead of `fp16=True`, or another value."
            )
    if getattr(trainer.args, "use_vllm", False):  # other generation is seen when it happens: see replay.py
        raise generates(trainer)
    _check_model(trainer.model, arguments)


def check_fields(trainer: Any) -> None:
    """
    Looks at where the method's fields are read from, whether XSAM is on or not.

    Raises:
        `TypeError`: `xsam_arguments` of the trainer's class is something else.
        `ValueError`: `args` has the method's fields too, with other values, which nothing would read.
    """
    read, args = trainer.xsam_arguments, trainer.args
    if not isinstance(read, XSAMArguments):
        raise TypeError(
            f"`xsam_arguments` of {type(trainer).__name__} is {reprlib.repr(read)}: give `xsam_arguments = XSAMArguments(rho=0.05)`."
        )
    for field in fields(XSAMArguments) if isinstance(args, XSAMArguments) else ():
        ours, theirs = getattr(read, field.name), getattr(args, field.name)
        if ours != theirs:
            raise ValueError(
                f"`args.{field.name}` is {theirs!r}, and `xsam_arguments` of {type(trainer).__name__}, which is read instead, has "
                f"{ours!r}: leave it out of the class, or give `args` of a class without the method's fields."
            )


def check_plain_fields(args: TrainingArguments) -> None:
    """
    Looks for fields of the method that were set on arguments that have none; a callback may do so in any update.

    Raises:
        `ValueError`: there is one, which nothing would read.
    """
    if isinstance(args, XSAMArguments):
        return
    own = {field.name for field in fields(args)}  # such as a distillation's `alpha`
    for field in fields(XSAMArguments):
        if field.name in vars(args) and field.name not in own:
            raise ValueError(
                f"`args.{field.name}` was set, and {type(args).__name__} has no such field, which XSAM would not read: give "
                f"XSAMTrainingArguments({field.name}={getattr(args, field.name)!r}, ...)."
            )


def generates(trainer: Trainer) -> NotImplementedError:
    """The refusal of a trainer whose training step makes its own data."""
    return NotImplementedError(
        f"{type(trainer).__name__} generates inside its training step, where every pass of an update, at other weights, would get "
        "other data: use XSAM with a supervised or preference trainer (SFTTrainer, DPOTrainer, RewardTrainer), or set `rho` to 0."
    )


def _check_distribution(trainer: Trainer, arguments: XSAMArguments) -> None:
    kind, ascent_scope = trainer.accelerator.distributed_type, arguments.ascent_scope
    if trainer.args.n_gpu > 1:
        raise NotImplementedError(
            f"The Trainer would spread each batch over {trainer.args.n_gpu} devices by DataParallel, whose dropout masks cannot "
            "be repeated: start with `torchrun` or `accelerate launch`, make one device visible, or set `rho` to 0."
        )
    if kind == DistributedType.DEEPSPEED:
        check_deepspeed(trainer, arguments)
    elif kind == DistributedType.FSDP:
        if trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise NotImplementedError(
                "XSAM moves weights shard by shard, which FSDP1's flat parameters do not allow: "
                "use FSDP2 (`fsdp_version: 2`), or set `rho` to 0."
            )
        if ascent_scope == "micro":
            raise NotImplementedError(
                "`ascent_scope='micro'` needs each process's own gradient, which FSDP2 never forms: "
                "use `ascent_scope='update'`, or DDP."
            )
    elif kind not in _REPLICATED:
        raise NotImplementedError(f"XSAM has not been made to work on {kind}: use DDP or FSDP2, or set `rho` to 0.")
    # Not every transformers 5 has the field.
    elif ascent_scope == "micro" and kind != DistributedType.NO and getattr(trainer.args, "ddp_static_graph", False):
        raise NotImplementedError(
            "`ascent_scope='micro'` never lets DDP reduce a gradient, which it must once to learn a static graph: "
            "set `ddp_static_graph` to False, or use `ascent_scope='update'`."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for part, name in (("cp", "context"), ("sp", "sequence")):
        if parallelism is not None and getattr(parallelism, f"{part}_enabled", False):
            raise NotImplementedError(
                f"XSAM runs a batch several times, and {name} parallelism cuts its sequences in place in the first pass: "
                "use DDP, FSDP2 or tensor parallelism, or set `rho` to 0."
            )
    loaded_in_parts = getattr(trainer, "is_distributed_loading_by_transformers", False)
    if loaded_in_parts or getattr(parallelism, "tp_enabled", False):
        _check_tensor_parallelism(trainer, ascent_scope)


def tensor_parallel_size(trainer: Trainer) -> int:
    """How many processes share the weights of one model and see the same batch."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    return max(getattr(parallelism, "tp_size", None) or 1, getattr(trainer.model, "tp_size", None) or 1)


def _check_tensor_parallelism(trainer: Trainer, ascent_scope: str) -> None:
    if ascent_scope == "micro":
        raise NotImplementedError(
            "`ascent_scope='micro'` adds up each process's own gradients, and with tensor parallelism a process has a part of one: "
            "use `ascent_scope='update'`, or DDP."
        )
    size, processes = tensor_parallel_size(trainer), trainer.accelerator.num_processes
    layout = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
    shards = getattr(layout, "fsdp_size", None) or 1
    if getattr(trainer, "is_distributed_loading_by_transformers", False) and shards > 1:
        size *= shards
        if getattr(layout, "ep_size", 1) > 1:
            raise NotImplementedError(
                "Experts that are dealt out to processes beside FSDP2's shards have not been tried with XSAM: leave `ep_size` out, or set "
                "`rho` to 0."
            )
    if size != processes:
        raise NotImplementedError(
            f"The model is shared by {size} of {processes} processes, and XSAM has not been tried with what the others do: load it with "
            "`DistributedConfig(tp_size=..., fsdp_size=...)`, whose product is the number of processes, or use FSDP2 alone, or set `rho` "
            "to 0."
        )
    for name, weight in cast(nn.Module, trainer.model).named_parameters():
        if weight.requires_grad and not isinstance(weight, DTensor) and _differs(weight):
            raise NotImplementedError(
                f"{name!r} is a part of a weight in each process, but no DTensor that says so (as the experts of a mixture): its norm "
                "would be that of the part. Use a `tp_plan` without it, or FSDP2, or set `rho` to 0."
            )


def _differs(weight: Tensor) -> bool:
    """Whether processes hold other values of a weight."""
    sums = weight.detach().double().sum().reshape(1)
    ends = torch.cat([sums, -sums])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    return bool(ends.sum() != 0)


def _check_compilation(args: TrainingArguments) -> None:
    for name, graphs in (("torch_compile_mode", _GRAPH_MODES), ("torch_compile_backend", ("cudagraphs",))):
        value = getattr(args, name, None)
        if args.torch_compile and value in graphs:
            raise NotImplementedError(
                f"`{name}` {value!r} replays CUDA graphs, whose gradients and losses are overwritten by the next pass, and XSAM "
                "compares those of several passes: use `torch_compile_mode='max-autotune-no-cudagraphs'`, or set `rho` to 0."
            )


def _check_optimizer(trainer: Trainer) -> None:
    names = [str(getattr(trainer.args.optim, "value", trainer.args.optim)).lower()]
    if trainer.optimizer is not None:
        names.append(type(trainer.optimizer).__name__.lower())
    if trainer.optimizer_cls_and_kwargs is not None:
        cls = trainer.optimizer_cls_and_kwargs[0]  # a class, or any callable that makes one
        names.append(getattr(cls, "__name__", type(cls).__name__).lower())
    for name in names:
        if any(part in name for part in _STEP_IN_BACKWARD):
            raise NotImplementedError(
                f"The optimizer {name} steps inside the backward pass, and XSAM needs several passes before the step: "
                "choose one that steps afterwards, such as `adamw_torch`, or set `rho` to 0."
            )
    groups = [*getattr(trainer.optimizer, "param_groups", ()), *(trainer.optimizer_cls_and_kwargs or ({},))[1:]]
    if any(isinstance(group, dict) and group.get("maximize") for group in groups):
        raise NotImplementedError(
            "The optimizer climbs (`maximize=True`), and XSAM looks for the highest loss nearby, as if it were to fall: leave it out and "
            "change the loss's sign in `compute_loss`, or set `rho` to 0."
        )


def _check_model(model: Any, arguments: XSAMArguments) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise ValueError(
            "The model has no trainable weights, so XSAM has none to perturb: unfreeze some, or set `rho` to 0."
        )
    perturbed_and_excluded(model, arguments.rho_exclude)
    devices = sorted({str(weight.device) for weight in weights})
    if len(devices) > 1:
        raise NotImplementedError(
            f"The model's weights are on several devices of one process ({', '.join(devices)}), whose random numbers and norms XSAM "
            "does not follow: load it without `device_map`, and train with DDP or FSDP2, or set `rho` to 0."
        )
    refuse_unfit({name: weight for name, weight in model.named_parameters() if weight.requires_grad})
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight._post_accumulate_grad_hooks:
            raise NotImplementedError(
                f"{name!r} has a hook that runs as soon as its gradient is there (`register_post_accumulate_grad_hook`), such as an "
                "optimizer's step: XSAM takes several gradients before the step. Remove the hook and let the optimizer step after "
                "the backward pass, or set `rho` to 0."
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise NotImplementedError(
                f"The embedding {name!r} has sparse gradients, which XSAM cannot take norms of: build it with "
                "`sparse=False`, or set `rho` to 0."
            )
    if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in weights):
        logger.warning(
            "Some trainable weights are in half precision: most of a small perturbation is lost in rounding. Load the model "
            "with `dtype=torch.float32` and set `bf16=True` (autocast) instead, or set `perturbation_dtype='stochastic'`."
        )
