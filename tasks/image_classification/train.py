"""
Trains a Vision Transformer and scores it.

    python -m tasks.image_classification.train tasks/image_classification/recipes/digits-vit-small.yaml
    python -m tasks.image_classification.train tasks/image_classification/recipes/digits-vit-small.yaml --method sam
    python -m tasks.image_classification.train tasks/image_classification/recipes/digits-vit-small.yaml --method sgd   # AdamW

Every field of a recipe is a flag as well, and the command line comes before the recipe; --help lists them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import EvalPrediction, set_seed

from tasks import metric, recipes, runs
from tasks.arguments import CheckedArguments, TaskArguments
from tasks.command import refusals, run, sentence
from tasks.image_classification import data, models
from tasks.image_classification.top_k_accuracy import TopKAccuracy
from tasks.results import CostMeter, write_result
from xsam_hf import XSAMTrainer, XSAMTrainingArguments


@dataclass
class ImageArguments(TaskArguments):
    """Which images, which model."""

    dataset: str = field(default="digits", metadata={"help": f"One of {', '.join(data.DATASETS)}."})
    data_dir: str | None = field(default=None, metadata={"help": "A local copy of the data set. Default: the hub."})
    validation_share: float = field(
        default=0.1,
        metadata={"help": "Share of the training images that is held out. 0: train on all, no validation."},
    )
    train_examples: int | None = field(
        default=None,
        metadata={"help": "Train on so many images only, with equal shares of every class. Default: all."},
    )
    label_noise: float = field(
        default=0.0, metadata={"help": "Share of the training labels that are replaced by another class's."}
    )
    cutout: int = field(default=0, metadata={"help": "Edge in pixels of the square blanked out in training images."})
    model: str = field(default="vit-small", metadata={"help": f"One of {', '.join(models.MODELS)}."})


@dataclass
class TrainingArguments(CheckedArguments, XSAMTrainingArguments):
    pass


def score(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy (top 1 and 5) and cross-entropy."""
    return metric.compute(TopKAccuracy, predictions=prediction.predictions, references=prediction.label_ids)


def train(task: ImageArguments, args: TrainingArguments) -> Path:
    """Trains, scores the test split once, and returns the path of `result.json`."""
    task.use_threads()
    runs.check_output(args, ("accuracy", "top5_accuracy"))
    if task.validation_share == 0 and args.eval_strategy != "no":
        raise ValueError("`validation_share` is 0, so there is nothing to evaluate on: set `eval_strategy` to `no`.")
    splits = data.load(
        task.dataset,
        task.data_dir,
        task.validation_share,
        task.cutout,
        args.seed,
        train_examples=task.train_examples,
        label_noise=task.label_noise,
    )
    set_seed(args.seed)
    model = models.build(task.model, task.dataset, task.dropout or 0.0)
    meter = CostMeter(model)
    prints = {name: split.fingerprint for name, split in splits.items()}
    identity = runs.identity("image_classification", task, args, prints, dropout=task.dropout or 0.0)
    with refusals():
        trainer = XSAMTrainer(
            model=model,
            args=args,
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            compute_metrics=score,
            callbacks=[meter, data.EpochCallback(splits["train"]), runs.RunIdentity(identity)],
        )
    runs.start(trainer, identity)

    scores = {}
    for split in ("validation", "test"):
        if len(splits[split]):
            found = trainer.evaluate(splits[split], metric_key_prefix=split)
            scores[split] = {name: found[f"{split}_{name}"] for name in ("accuracy", "top5_accuracy", "loss")}
            trainer.log_metrics(split, found)
    result = Path(args.output_dir) / runs.RESULT
    if trainer.is_world_process_zero():
        facts = {"task": "image_classification", "dataset": task.dataset, "model": task.model, "metrics": scores}
        result = write_result(trainer, meter, task, identity, **facts)
        print(result)
        try:
            trainer.create_model_card(dataset=task.dataset, tasks="image-classification")
        except (OSError, UnicodeError) as error:  # a folder's name, for instance, that the locale has no letters for
            print(f"There is no model card: {sentence(error)}.", file=sys.stderr)
    return result


def main(argv: Sequence[str]) -> None:
    train(*recipes.parse((ImageArguments, TrainingArguments), argv, __doc__, "runs/image_classification"))


if __name__ == "__main__":
    run(main)
