"""
Fine-tunes a language model with trl's SFTTrainer, LoRA and XSAM: trl's own script with two classes of ours.

    python -m tasks.language_modeling.sft --model_name_or_path MODEL --dataset_name TEXTS --use_peft --rho 0.001
    python -m tasks.language_modeling.sft --model_name_or_path MODEL --dataset_name TEXTS --use_peft --rho 0.001 --method sam

`dataset_name` is a folder of .json, .csv or .parquet files in one of trl's formats, or a data set of the hub. --help lists all flags,
trl's among them. It needs `pip install trl peft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import load_dataset
from transformers import set_seed

from tasks import recipes, runs
from tasks.arguments import CheckedArguments
from tasks.command import needs, refusals, run
from xsam_hf import XSAMArguments, XSAMMixin


with needs("trl peft", __name__):
    from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, get_peft_config


class XSAMSFTTrainer(XSAMMixin, SFTTrainer):
    pass


@dataclass
class TrainingArguments(CheckedArguments, XSAMArguments, SFTConfig):
    pass


ARGUMENTS = (ScriptArguments, ModelConfig, TrainingArguments)


def train(script: ScriptArguments, model: ModelConfig, args: TrainingArguments) -> XSAMSFTTrainer:
    """Trains and saves the adapter, or the model without `use_peft`."""
    for name, value in (("dataset_name", script.dataset_name), ("model_name_or_path", model.model_name_or_path)):
        if value is None:
            raise ValueError(f"`{name}` is missing: give a folder, or a name of the hub.")
    set_seed(args.seed)
    with refusals():
        data = load_dataset(script.dataset_name, name=script.dataset_config)
        args.model_init_kwargs = {"dtype": model.dtype, **(args.model_init_kwargs or {})}
        trainer = XSAMSFTTrainer(
            model=model.model_name_or_path,
            args=args,
            train_dataset=data[script.dataset_train_split],
            eval_dataset=data[script.dataset_test_split] if args.eval_strategy != "no" else None,
            peft_config=get_peft_config(model),
        )
    checkpoint = runs.resume_point(args.resume_from_checkpoint, Path(args.output_dir))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return trainer


def main(argv: Sequence[str]) -> None:
    train(*recipes.parse(ARGUMENTS, argv, __doc__, "runs/sft"))


if __name__ == "__main__":
    run(main)
