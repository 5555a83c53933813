"""
Trains a text classifier on local files and scores it.

    python -m tasks.text_classification.train tasks/text_classification/recipes/roberta-small.yaml --train_file TEXTS.csv
    python -m tasks.text_classification.train tasks/text_classification/recipes/roberta-small.yaml --train_file TEXTS.csv --method sam
    python -m tasks.text_classification.train --model_name_or_path FOLDER --train_file TRAIN.jsonl --test_file TEST.jsonl --rho 0.001

Every field of a recipe is a flag as well, and the command line comes before the recipe; --help lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import DataCollatorWithPadding, EvalPrediction, set_seed

from tasks import metric, recipes, runs
from tasks.arguments import CheckedArguments, TaskArguments
from tasks.command import refusals, run
from tasks.identity import fingerprint_of_model, identity_of
from tasks.image_classification.top_k_accuracy import TopKAccuracy
from tasks.results import CostMeter, write_result
from tasks.text_classification import data, models
from tasks.whole_scores import WholeScoresTrainer
from xsam_hf import XSAMTrainer, XSAMTrainingArguments


METRICS = ("accuracy", "loss")


@dataclass
class TextArguments(TaskArguments, data.DataArguments):
    """Which texts, which model."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A saved model, or its name on the hub. Default: a new RoBERTa of two layers."}
    )

    def __post_init__(self):
        TaskArguments.__post_init__(self)
        data.DataArguments.__post_init__(self)


@dataclass
class TrainingArguments(CheckedArguments, XSAMTrainingArguments):
    pass


ARGUMENTS = (TextArguments, TrainingArguments)


def score(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and cross-entropy."""
    found = metric.compute(TopKAccuracy, predictions=prediction.predictions, references=prediction.label_ids)
    return {name: found[name] for name in METRICS}


@dataclass
class Setup:
    """What a training is made of."""

    trainer: XSAMTrainer
    splits: dict[str, Dataset]
    meter: CostMeter
    identity: dict


def prepare(task: TextArguments, args: TrainingArguments) -> Setup:
    """All that comes before the training itself."""
    task.use_threads()
    runs.check_output(args, METRICS)
    corpus = data.load(task)
    if args.eval_strategy != "no" and "validation" not in corpus.splits:
        raise ValueError(
            f"`validation_share` is {task.validation_share}, so there is no validation to evaluate on: give a `validation_file`, or set "
            "`eval_strategy` to `no`."
        )
    set_seed(args.seed)
    with refusals():  # of what is in a saved model's folder
        tokenizer = models.tokenizer(task.model_name_or_path, corpus.splits["train"]["text"])
        corpus.names = models.order(task.model_name_or_path, corpus.names)
        model = models.build(task.model_name_or_path, tokenizer, corpus.names, task.max_seq_length, task.dropout)
    splits = corpus.encode(tokenizer, task.max_seq_length)
    # The data's fingerprints stand for where it came from.
    files = dict.fromkeys(["train_file", "validation_file", "test_file"])
    saved = fingerprint_of_model(task.model_name_or_path)
    identity = identity_of("text_classification", task, args, data.prints(splits), **files, model_files=saved)
    meter = CostMeter(model)
    with refusals():
        trainer = WholeScoresTrainer(
            model=model,
            args=args,
            train_dataset=splits["train"],
            eval_dataset=splits.get("validation"),
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=score,
            callbacks=[meter, runs.RunIdentity(identity)],
        )
    return Setup(trainer, splits, meter, identity)


def train(task: TextArguments, args: TrainingArguments) -> Path:
    """Trains, scores validation and test, and returns the path of `result.json`."""
    setup = prepare(task, args)
    trainer = setup.trainer
    models.check_tokens(trainer.model, task.model_name_or_path, setup.splits.values())
    runs.start(trainer, setup.identity)

    scores = {}
    for split in ("validation", "test"):
        if split in setup.splits:
            found = trainer.evaluate(setup.splits[split], metric_key_prefix=split)
            scores[split] = {name: found[f"{split}_{name}"] for name in METRICS}
            trainer.log_metrics(split, found)
    if trainer.is_world_process_zero():
        facts = {"task": "text_classification", "dataset": Path(task.train_file).stem, "metrics": scores}
        print(write_result(trainer, setup.meter, task, setup.identity, **facts, model=trainer.model.config.model_type))
    if args.push_to_hub:  # a second time, now with the scores
        trainer.push_to_hub(tasks="text-classification")
    elif trainer.is_world_process_zero():
        trainer.create_model_card(tasks="text-classification")
    return Path(args.output_dir) / runs.RESULT


def main(argv: Sequence[str]) -> None:
    train(*recipes.parse(ARGUMENTS, argv, __doc__, "runs/text_classification"))


if __name__ == "__main__":
    run(main)
