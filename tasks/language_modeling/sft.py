"""
Fine-tunes a language model with trl's SFTTrainer, LoRA and XSAM: trl's own script with two classes of ours.

    python -m tasks.language_modeling.sft --model_name_or_path MODEL --dataset_name TEXTS --use_peft --rho 0.001
    python -m tasks.language_modeling.sft --model_name_or_path MODEL --dataset_name TEXTS --use_peft --rho 0.001 --method sam

`dataset_name` is a folder of .json, .csv or .parquet files in one of trl's formats, or a data set of the hub. --help lists all flags,
trl's among them. It needs `pip install trl peft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset
from transformers import set_seed

from tasks import recipes, runs
from tasks.arguments import CheckedArguments
from tasks.command import cut, needs, refusals, run, sentence
from tasks.identity import fingerprint, identity_of
from tasks.tables import refuse_misread
from xsam_hf import XSAMArguments, XSAMMixin


with needs("trl peft", __name__):
    from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config


class XSAMSFTTrainer(XSAMMixin, SFTTrainer):
    pass


@dataclass
class TrainingArguments(CheckedArguments, XSAMArguments, SFTConfig):
    pass


IGNORED = -100  # the label of a token that is not predicted
ARGUMENTS = (ScriptArguments, ModelConfig, TrainingArguments)


# What an evaluation measures, without `eval_`.
METRICS = ("loss", "mean_token_accuracy", "entropy", "num_tokens")


def load(script: ScriptArguments, args: TrainingArguments) -> DatasetDict:
    """
    The texts.

    Raises:
        `ValueError`: `datasets` cannot load them, a split that is needed is missing, or one of its rows has no text.
    """
    name, text = script.dataset_name, args.dataset_text_field
    try:
        data = load_dataset(name, name=script.dataset_config)
    except Exception as error:  # of the network, the hub's client and `datasets`
        raise ValueError(
            f"`dataset_name` is {name}, which `datasets` could not load: {sentence(error.__cause__ or error)}"
        ) from error
    wanted = {"dataset_train_split": script.dataset_train_split}
    if args.eval_strategy != "no":
        wanted["dataset_test_split"] = script.dataset_test_split
    for field, split in wanted.items():
        if split not in data:
            raise ValueError(f"`{field}` is {split}, and {name} has {', '.join(data)}: choose one of these.")
        columns = data[split].column_names
        refuse_misread(columns, {text, "messages", "prompt", "completion", "input_ids"}, name)
        if {text, "messages", "prompt", "input_ids"}.isdisjoint(columns):
            raise ValueError(
                f"{name}, {split} has the columns {cut(', '.join(columns))}: trl expects {text} (`dataset_text_field`), messages, or prompt "
                "and completion."
            )
        if args.completion_only_loss and {"completion", "completion_mask"}.isdisjoint(columns):
            raise ValueError(
                f"`completion_only_loss` is True, and {name}, {split} has no completions, but {cut(', '.join(columns))}: leave it out, or "
                "give texts with prompt and completion."
            )
        for number, value in enumerate(data[split][text] if text in columns else ()):
            if not isinstance(value, str):
                raise ValueError(f"{name}, {split}, row {number} has {cut(repr(value))} as {text}: expected text.")
    return data


def fingerprints(rows: Dataset) -> dict[str, str]:
    """
    Twelve digits that stand for the tokens, and for which of them are predicted.

    Raises:
        `ValueError`: none is.
    """
    columns = [rows[name] for name in ("input_ids", "labels") if name in rows.column_names]
    if not columns:  # pictures are read later
        return {}
    if not any(label != IGNORED for labels in columns[-1] for label in labels[1:]):  # the first is never predicted
        raise ValueError(
            "No token of the training texts is to be predicted: are they empty, or `max_length` too short for more than a prompt?"
        )
    return {"train": fingerprint(*(ids for column in columns for ids in column))}


def refuse_beyond_the_model(trainer: XSAMSFTTrainer, name: str) -> None:
    """
    Refuses texts that would end training at the first of them.

    Raises:
        `ValueError`: a token is beyond the model's table of tokens, or a text beyond its positions.
    """
    config = trainer.model.config.get_text_config()
    # Rotary embeddings are computed for any position.
    positions = None if getattr(config, "rope_parameters", None) else getattr(config, "max_position_embeddings", None)
    for kind, rows in (("training", trainer.train_dataset), ("evaluation", trainer.eval_dataset)):
        if rows is None or "input_ids" not in rows.column_names:  # pictures are read later
            continue
        highest = max((max(ids, default=0) for ids in rows["input_ids"]), default=0)
        if highest >= config.vocab_size:
            raise ValueError(
                f"The tokenizer of {name} makes token {highest} of a text, and the model knows {config.vocab_size}: they do not belong "
                "together."
            )
        # Packed texts have positions of their own.
        packed = "seq_lengths" in rows.column_names
        longest = max(chain(*rows["seq_lengths"]) if packed else map(len, rows["input_ids"]), default=0)
        if positions is not None and 0 < positions < longest:  # XLNet's is -1, for any
            raise ValueError(
                f"A {kind} text has {longest} tokens, and the model {positions} positions: give a `max_length` of {positions} or less."
            )


def train(script: ScriptArguments, model: ModelConfig, args: TrainingArguments) -> XSAMSFTTrainer:
    """Trains and saves the adapter, or the model without `use_peft`."""
    for name, value in (("dataset_name", script.dataset_name), ("model_name_or_path", model.model_name_or_path)):
        if value is None:
            raise ValueError(f"`{name}` is missing: give a folder, or a name of the hub.")
        if len(Path(value).parts) > 2 and not Path(value).exists():  # the hub's are one or two
            raise ValueError(f"`{name}` is {value}, which does not exist: give a folder, or a name of the hub.")
    for name in ("dataset_streaming", "ignore_bias_buffers"):
        if getattr(script, name):
            raise ValueError(f"`{name}` is True, and this script has no use for it: leave it out.")
    for field in fields(model):
        value = getattr(model, field.name)
        if (
            not model.use_peft
            and field.name.startswith(("lora_", "use_rslora", "use_dora"))
            and value != field.default
        ):
            raise ValueError(
                f"`{field.name}` is {value}, and `use_peft` is False, so that all weights would be trained: leave it out, or give --use_peft."
            )
    runs.check_output(args, METRICS)
    set_seed(args.seed)
    data = load(script, args)
    loading = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
    }
    with refusals():
        if (quantized := get_quantization_config(model)) is not None:
            loading["quantization_config"] = quantized
        args.model_init_kwargs = {**loading, **(args.model_init_kwargs or {})}
        trainer = XSAMSFTTrainer(
            model=model.model_name_or_path,
            args=args,
            train_dataset=data[script.dataset_train_split],
            eval_dataset=data[script.dataset_test_split] if args.eval_strategy != "no" else None,
            peft_config=get_peft_config(model),
        )
    refuse_beyond_the_model(trainer, model.model_name_or_path)
    # The tokens' fingerprint stands for where they came from.
    identity = identity_of(
        "sft", script, args, fingerprints(trainer.train_dataset), **asdict(model), dataset_name=None
    )
    trainer.add_callback(runs.RunIdentity(identity))
    runs.start(trainer, identity)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return trainer


def main(argv: Sequence[str]) -> None:
    train(*recipes.parse(ARGUMENTS, argv, __doc__, "runs/sft"))


if __name__ == "__main__":
    run(main)
