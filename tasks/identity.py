"""What makes a run the run that it is: which arguments matter, and in what two runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.methods import name_of
from tasks.secret import is_secret


# Tables are made without transformers, which takes seconds to import.
if TYPE_CHECKING:
    from transformers import TrainingArguments

    from tasks.arguments import TaskArguments


# What changes the scores of a training's weights, but not the weights.
SCORING = {
    *("average_checkpoints", "bf16_full_eval", "fp16_full_eval"),
    *("predict_with_generate", "generation_num_beams", "generation_max_length"),
}

# What does not change the weights that a training ends with: where files go, what is shown, how fast it is. All other fields are
# the run's identity, those included that a later transformers brings.
IMMATERIAL = {
    *SCORING,
    *("output_dir", "resume_from_checkpoint", "data_dir", "threads"),
    *("logging_dir", "logging_strategy", "logging_first_step", "logging_steps", "logging_nan_inf_filter", "log_level"),
    *("log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "skip_memory_metrics", "debug"),
    *(
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_on_each_node",
        "save_only_model",
        "enable_jit_checkpoint",
    ),
    *("restore_callback_states_from_checkpoint", "do_train", "do_eval", "do_predict", "eval_strategy", "eval_steps"),
    *("eval_delay", "eval_on_start", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"),
    *(
        "batch_eval_metrics",
        "per_device_eval_batch_size",
        "eval_splits",
        "prediction_loss_only",
        "include_for_metrics",
    ),
    *(
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
    ),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    *("use_cpu", "local_rank", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_find_unused_parameters", "ddp_static_graph", "fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
    *("accelerator_config", "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "dataloader_multiprocessing_context"),
    # Instead of these: how many micro-batches an update has, on all processes together.
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
}


def fingerprint(*parts: Iterable[int] | np.ndarray) -> str:
    """Twelve hexadecimal digits of the SHA-256 of some arrays of whole numbers."""
    digest = hashlib.sha256()
    for part in parts:
        array = np.ascontiguousarray(part)
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:12]


def fingerprint_of_model(folder: str | None) -> str | None:
    """A [`fingerprint`] of what a local model's folder says beside its weights: its config, and its tokenizer's files. `None` for others."""
    if folder is None or not Path(folder).is_dir():
        return None
    names = (
        "config.json",
        "tokenizer*.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "*.model",
    )
    files = sorted({file for name in names for file in Path(folder).glob(name)})
    return fingerprint(*(np.frombuffer(file.name.encode() + b"\n" + file.read_bytes(), np.uint8) for file in files))


def identity_of(
    name: str, task: TaskArguments, args: TrainingArguments, data: Mapping[str, str], **facts: Any
) -> dict:
    """
    What makes a run the run that it is, in the form in which it is kept: task, method, data and all arguments that matter.

    Args:
        name (`str`): the task's.
        task, args: its arguments and the Trainer's.
        data (`Mapping[str, str]`): a [`fingerprint`] of each split, which stands for where the data came from.
        facts: replace the arguments of the same names; `None` leaves one out.
    """
    arguments = {**asdict(task), **args.to_dict(), **facts}
    matter = {
        field: value
        for field, value in sorted(arguments.items())
        if not (field in IMMATERIAL or is_secret(field) or (field in facts and value is None))
    }
    prints = {f"{split}_data": digits for split, digits in data.items()}
    whole = {
        "task": name,
        "method": name_of(args),
        **prints,
        "seed": args.seed,
        **_batches(arguments, args.world_size),
    }
    if batches := _order_of_batches(args):
        whole["accelerator_config"] = batches
    # `accelerate launch` can ask for it where no argument does.
    if args.mixed_precision != "no" and not (args.bf16 or args.fp16):
        whole["mixed_precision"] = args.mixed_precision
    return json.loads(json.dumps({**whole, **matter}, default=str))


def _order_of_batches(args: TrainingArguments) -> dict[str, Any]:
    """What `accelerator_config` changes in which examples come together: the rest of it changes no weights."""
    given = args.accelerator_config
    usual = type(given)()
    names = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")
    return {name: getattr(given, name) for name in names if getattr(given, name) != getattr(usual, name)}


def _batches(arguments: Mapping[str, Any], processes: int) -> dict[str, int]:
    """How many examples an update has, and a micro-batch where that matters."""
    size = arguments["per_device_train_batch_size"]
    whole = {"update_batch": size * arguments["gradient_accumulation_steps"] * processes}
    return {**whole, "micro_batch": size} if arguments.get("ascent_scope") == "micro" else whole


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """
    Why two runs are not one training with two seeds.

    Args:
        one, other (`Mapping[str, Any]`): what stands in their `result.json`. Older ones have no [`identity_of`]; there the arguments
            that matter stand for it.

    Returns:
        `tuple`, *optional*: the first name in which they differ and the two values, what only the scores depend on included;
        nothing if the seed is all.
    """
    facts = [{name: result.get(name) for name in ("task", "dataset", "model", "method")} for result in (one, other)]
    if found := first_difference(*facts, {}):
        return found
    known = all(isinstance(result.get("identity"), dict) for result in (one, other))
    ours, theirs = (_what_matters(result, known) for result in (one, other))
    if ours.keys() == theirs.keys():
        return first_difference(ours, theirs, {})
    from xsam_hf import XSAMSeq2SeqTrainingArguments  # takes seconds

    texts = {name: _text(value) for name, value in defaults(XSAMSeq2SeqTrainingArguments).items()}
    for matter in (ours, theirs):  # made by another version
        matter |= {name: texts.get(name, "None") for name in (ours | theirs).keys() - matter.keys()}
    return first_difference(ours, theirs, {})


def _what_matters(result: Mapping[str, Any], known: bool) -> dict[str, str]:
    """All but the seed, as text: arguments are kept as text where they are neither text nor numbers."""
    arguments = result.get("arguments", {})
    matter = {name: arguments[name] for name in SCORING if name in arguments}
    if known:
        matter |= result["identity"]
    else:
        matter |= {name: value for name, value in arguments.items() if not (name in IMMATERIAL or is_secret(name))}
        if "per_device_train_batch_size" in arguments:
            matter |= _batches(arguments, result.get("processes", 1))
    return {name: _text(value) for name, value in matter.items() if name != "seed"}


def _text(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value)


def defaults(arguments: Any) -> dict[str, Any]:
    """What the fields of a dataclass are where nothing is given, by name."""
    return {field.name: field.default for field in fields(arguments)}


def first_difference(one: Mapping, other: Mapping, defaults: Mapping) -> tuple[str, Any, Any] | None:
    """The first name in which two mappings differ, with the two values; what one lacks has its default there."""
    for name in dict.fromkeys([*one, *other]):
        ours, theirs = (kept.get(name, defaults.get(name)) for kept in (one, other))
        if ours != theirs:
            return name, ours, theirs
    return None
