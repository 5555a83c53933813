"""
What of DeepSpeed XSAM works with, experimental: versions, settings, and the private names that zero.py reads.

What has not been tried is refused when the trainer is built; what only a running engine can show, before the first pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from transformers import Trainer

from ..arguments import XSAMArguments


TRIED = ("0.19.8",)  # the versions of DeepSpeed that tests/test_deepspeed.py has passed with

# All that DeepSpeed does not document, by the class that has it. Methods are looked up when the trainer is built, attributes
# when DeepSpeed has made them, before the first pass; those of parameters and of their parts at the end.
METHODS = {
    "runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "_wait_for_offload_copies",
        "get_param_id",
        "reset_cpu_buffers",
        "update_lp_params",
        "zero_grad",
    ),
    "runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": (
        "_get_fp32_grad_state_partition",
        "_get_fp32_opt_state_partition",
        "_reassign_or_swap_out_partitioned_parameters",
        "empty_partition_cache",
        "get_param_id",
        "reset_cpu_buffers",
        "zero_grad",
    ),
    "utils.tensor_fragment.tensor_fragment": ("get_lp_grad_fragment",),
}
ATTRIBUTES = {
    "DeepSpeedZeroOptimizer": ("averaged_gradients", "bit16_groups", "cpu_offload", "dp_process_group", "loss_scale"),
    "DeepSpeedZeroOptimizer_Stage3": (
        "dp_process_group",
        "fp16_groups",
        "grad_partitions_flat_buffer",
        "loss_scale",
        "offload_optimizer",
        "persistent_parameters",
    ),
}
OFFLOADED = {
    "DeepSpeedZeroOptimizer": ("accumulated_grads_in_cpu", "micro_step_id", "norm_for_param_grads"),
    "DeepSpeedZeroOptimizer_Stage3": ("norm_for_param_grads",),
}
OF_PARAMETERS = {
    "DeepSpeedZeroOptimizer": ("_hp_mapping", "_index_in_param_group"),
    "DeepSpeedZeroOptimizer_Stage3": ("all_gather", "ds_id", "ds_numel", "ds_shape", "partition_numel"),
}
OF_SLICES = ("hp_fragment",)
OF_ENGINES = ("has_moe_layers", "was_step_applied")

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
        "offload_optimizer",
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
    "zero_optimization.offload_optimizer": {"device", "pin_memory"},
}
_OPTIMIZERS = {"adam", "adamw"}  # of DeepSpeed's own; others compress gradients, or make another thing of them
WAY_OUT = "use FSDP2 (`fsdp_version: 2`), or set `rho` to 0."


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
            f"with {found}: install that version, {WAY_OUT}"
        )
    for path, names in METHODS.items():
        module, cls = f"deepspeed.{path}".rsplit(".", 1)
        look_up(getattr(importlib.import_module(module), cls), names)
    refused = {
        "ascent_scope": ("micro", "it needs each process's own gradient, which ZeRO does not keep"),
        "perturbation_dtype": ("stochastic", "DeepSpeed rounds the moved weights itself"),
    }
    for name, (value, reason) in refused.items():
        if getattr(arguments, name) == value:
            raise NotImplementedError(
                f"`{name}={value!r}` does not work under DeepSpeed: {reason}. Leave it out, {WAY_OUT}"
            )
    if arguments.perturbation not in ("sam", "asam"):
        raise NotImplementedError(
            f"`perturbation={arguments.perturbation!r}` keeps an average between updates, which is not written into DeepSpeed's "
            f"checkpoints: choose 'sam' or 'asam', {WAY_OUT}"
        )
    if trainer.args.torch_compile:
        raise NotImplementedError(
            f"`torch_compile` with DeepSpeed has not been tried with XSAM: leave it out, {WAY_OUT}"
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
            f"XSAM does not follow the loss scaling of DeepSpeed's fp16: use `bf16=True`, {WAY_OUT}"
        )
    zero = config.get("zero_optimization", {})
    stage, offload = zero.get("stage", 0), zero.get("offload_optimizer") or {}
    if stage not in (1, 2, 3):
        raise NotImplementedError(
            f"DeepSpeed without ZeRO (stage {stage!r}) has nothing that DDP has not: use DDP, or stage 1 to 3."
        )
    if stage == 1 and config.get("data_types"):
        raise NotImplementedError(
            "DeepSpeed takes norms of whole gradients for ZeRO-1 with `data_types`, and XSAM's direction is in parts: use stage 2 or 3, "
            f"leave `data_types` out, {WAY_OUT}"
        )
    device = offload.get("device", "none")
    if device not in ("cpu", "none"):
        raise NotImplementedError(
            f"`zero_optimization.offload_optimizer` puts the float32 weights on {device!r}, and XSAM moves them in memory: use the device "
            f"'cpu', {WAY_OUT}"
        )
    parts = {
        **config,
        "": {key: value for key, value in config.items() if key not in _KNOWN},
        "zero_optimization.offload_optimizer": {} if device == "none" else offload,
    }
    for part, known in _KNOWN.items():
        settings = parts.get(part, {})
        for name, value in settings.items():
            if name not in known and _is_on(value):
                setting = f"{part}.{name}".lstrip(".")
                raise NotImplementedError(
                    f"`{setting}` of DeepSpeed's configuration has not been tried with XSAM: leave it out, {WAY_OUT}"
                )
    optimizer = str(config.get("optimizer", {}).get("type", "AdamW"))
    if optimizer.lower() not in _OPTIMIZERS:
        raise NotImplementedError(
            f"DeepSpeed's optimizer {optimizer!r} has not been tried with XSAM: use AdamW or one of PyTorch's, {WAY_OUT}"
        )


def _is_on(value: Any) -> bool:
    """Whether a setting asks for something: `{"device": "none"}` and `{"enabled": false}` do not."""
    if isinstance(value, Mapping):
        return value.get("device") != "none" and value.get("enabled") is not False and any(map(_is_on, value.values()))
    return value if isinstance(value, bool) else value not in (None, 0, 1, "none", "")


def look_up(owner: Any, names: tuple[str, ...]) -> None:
    """Raises `NotImplementedError` unless a class or an object has all these attributes."""
    for name in names:
        if not hasattr(owner, name):
            kind = owner if isinstance(owner, type) else type(owner)
            raise NotImplementedError(
                f"DeepSpeed's {kind.__name__} has no {name!r}, which XSAM needs: install DeepSpeed {TRIED[-1]}, {WAY_OUT}"
            )
