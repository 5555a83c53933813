"""A model and its batches from files: a checkpoint's folder, and tensors or a Python function that says what it was trained on."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from .surface import batches_of


_PEFT = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}


def load(
    checkpoint: str, data: str | None, trainer: str | None, batch_size: int, batches: int
) -> tuple[Trainer | nn.Module, list[Mapping[str, Any]]]:
    """
    What to measure, and on what.

    Args:
        checkpoint (`str`): a folder that `save_pretrained` or a Trainer wrote, a LoRA adapter's too.
        data (`str`, *optional*):
            A safetensors file of tensors by the names of the model's arguments, such as `input_ids` and `labels`; their first
            dimension is the examples.
        trainer (`str`, *optional*):
            `FILE.py:FUNCTION`; the function takes the checkpoint's path and returns a [`~transformers.Trainer`] that has its weights.
        batch_size (`int`), batches (`int`): of `data`; a trainer has a batch size of its own.

    Raises:
        `ValueError`: one of them is missing, not what it should be, or too small, or `data` has ids that the model does not know.
    """
    if batch_size < 1 or batches < 1:
        raise ValueError(f"`batch_size` is {batch_size} and `batches` {batches}: both are 1 at least.")
    if not Path(checkpoint).is_dir():
        raise ValueError(f"There is no folder {checkpoint}: give one that `save_pretrained` or a Trainer wrote.")
    if (data is None) == (trainer is None):
        raise ValueError(
            "Say what to measure the loss on, in one way: `--data FILE.safetensors`, or `--trainer FILE.py:FUNCTION`."
        )
    if trainer is None and not list(Path(checkpoint).glob("*config.json")):
        inside = sorted(Path(checkpoint).glob("checkpoint-*"), key=lambda folder: (len(folder.name), folder.name))
        if inside:
            raise ValueError(f"{checkpoint} is no checkpoint but holds some: give one of them, such as {inside[-1]}.")
    if trainer is not None:
        built = _call(trainer, checkpoint)
        return built, batches_of(built, batches)
    model = load_model(Path(checkpoint))
    loaded = load_batches(Path(str(data)), batch_size, batches)
    _check_names(str(data), loaded[0], model)
    _check_ids(str(data), loaded, checkpoint, model)
    return model, loaded


def load_model(folder: Path) -> nn.Module:
    """
    The model of a checkpoint, in float32, its adapters trainable.

    Raises:
        `ValueError`: the folder says of no model in Transformers, or lacks weights of it.
    """
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if (folder / "adapter_config.json").is_file():
        import peft  # an adapter's checkpoint needs it anyway

        task = _config(folder, "adapter_config.json").get("task_type")
        cls = getattr(peft, f"AutoPeftModelFor{_PEFT.get(str(task), '')}", None)
        if cls is None:
            raise ValueError(
                f"{folder} is an adapter whose `task_type` is {task!r}: give one of {', '.join(_PEFT)} in its config, or `--trainer`."
            )
        with _readable(folder):
            adapted = cls.from_pretrained(str(folder), is_trainable=True, dtype=torch.float32)
            own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
            saved = folder / "adapter_model.safetensors"
            lost = sorted(own.keys() - load_file(saved).keys()) if saved.is_file() else []
        _refuse_lost(lost, folder, "the adapter")
        return adapted.to(device)
    named = _config(folder, "config.json").get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    cls = getattr(transformers, name, None)
    if cls is None:
        raise ValueError(
            f"{folder} is of {name or 'no named class'}, which is not in Transformers: give `--trainer` instead."
        )
    with _readable(folder):
        model, seen = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    _refuse_lost(sorted([*seen["missing_keys"], *(str(key) for key in seen["mismatched_keys"])]), folder, name)
    return model.to(device)


def _config(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no {name} that can be read ({error}), so that its model is not known: give `--trainer` instead."
        ) from error
    return config


def _refuse_lost(lost: Sequence[str], folder: Path, of: str) -> None:
    if lost:
        raise ValueError(
            f"{folder} lacks {len(lost)} of the weights of {of} ({lost[0]} ...), which would be random: give a whole one."
        )


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What Transformers and its libraries raise over damaged files, as one sentence."""
    try:
        yield
    except UnpicklingError as error:  # whose own advice is to run the code
        raise ValueError(
            f"{folder} holds a pickle with more than weights in it, and unpickling that may run code, or one that is damaged: give a whole "
            "one in safetensors."
        ) from error
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{folder} holds no checkpoint that can be loaded ({type(error).__name__}: {said[:200]}): give a whole one."
        ) from error


def load_batches(file: Path, batch_size: int, batches: int) -> list[Mapping[str, Any]]:
    """
    The first batches of a safetensors file.

    Raises:
        `ValueError`: there is no such file, its tensors have no or different numbers of examples, or too few, or numbers that are not finite.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read as safetensors ({error}).") from error
    lengths = {name: len(tensor) if tensor.ndim else 0 for name, tensor in tensors.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"The tensors of {file} must have the same number of examples, above 0, and have {lengths}.")
    if unfit := [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]:
        raise ValueError(f"{file} has numbers that are not finite in {unfit[0]!r}: mend it first.")
    count = next(iter(lengths.values()))
    if count < batch_size * batches:
        raise ValueError(
            f"{file} has {count} examples, and {batches} batches of {batch_size} are asked for: lower `--batches` or `--batch_size`."
        )
    return [
        {name: tensor[start : start + batch_size] for name, tensor in tensors.items()}
        for start in range(0, batches * batch_size, batch_size)
    ]


def _check_names(file: str, batch: Mapping[str, Any], model: Any) -> None:
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    taken = [name for name, of in inspect.signature(model.forward).parameters.items() if of.kind != of.VAR_KEYWORD]
    if unknown := sorted(set(batch) - set(taken)):
        raise ValueError(
            f"{file} has {unknown[0]!r}, which is no argument of {type(model).__name__}: leave it out. There are {', '.join(taken)}."
        )


def _check_ids(file: str, batches: Sequence[Mapping[str, Any]], checkpoint: str, model: Any) -> None:
    known: dict[str, tuple[int, str]] = {}
    if "input_ids" in batches[0] and isinstance(embedding := model.get_input_embeddings(), nn.Embedding):
        known["input_ids"] = embedding.num_embeddings, "tokens in its vocabulary"
    if "labels" in batches[0] and not batches[0]["labels"].is_floating_point():
        if "Classification" in type(model).__name__:
            known["labels"] = model.config.num_labels, "labels"
        elif (head := model.get_output_embeddings()) is not None:
            known["labels"] = len(head.weight), "tokens in its vocabulary"
    for name, (count, what) in known.items():
        ids = torch.cat([batch[name].reshape(-1) for batch in batches])
        if name == "labels":
            ids = ids[ids != -100]  # which the loss leaves out
        wrong = ids[(ids < 0) | (ids >= count)]
        if len(wrong):
            raise ValueError(
                f"{file} has the id {wrong[0]} in `{name}`, and {checkpoint} has {count} {what}, from 0 to {count - 1}: give a file that was "
                "made for this model."
            )


def fingerprint(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> str:
    """Of weights, buffers and batches: what was measured on others is not taken for theirs."""
    digest = hashlib.sha256()
    tensors = [*model.state_dict().values(), *(value for batch in batches for value in batch.values())]
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(tensor).encode())
    return digest.hexdigest()[:16]


def _call(where: str, checkpoint: str) -> Trainer:
    file, _, name = where.rpartition(":")
    spec = importlib.util.spec_from_file_location("trainer_to_analyse", file)  # none if it is no .py file
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise ValueError(
            f"`--trainer` is {where!r}: give FILE.py:FUNCTION, a file that is there and a function in it."
        )
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(file).resolve().parent))  # as for a script that is run
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r}.")
    try:
        inspect.signature(function).bind(checkpoint)
    except TypeError as error:
        raise ValueError(f"{where} has to take one argument, the checkpoint's path: {error}.") from error
    built = function(checkpoint)
    if not isinstance(built, Trainer):
        raise ValueError(f"{where} returned {type(built).__name__}, not a Trainer.")
    return built
