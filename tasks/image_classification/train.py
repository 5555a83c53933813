"""
Trains an image classifier and scores it.

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
from statistics import fmean

from torch import nn
from transformers import EvalPrediction, set_seed

from tasks import metric, recipes, runs
from tasks.arguments import CheckedArguments, TaskArguments
from tasks.command import refusals, run, sentence
from tasks.identity import identity_of
from tasks.image_classification import data, models, pixels
from tasks.image_classification.labelled_images import EpochCallback, Split
from tasks.image_classification.top_k_accuracy import TopKAccuracy
from tasks.results import CostMeter, write_result
from tasks.whole_scores import WholeScoresTrainer
from xsam_hf import XSAMTrainer, XSAMTrainingArguments


METRICS = ("accuracy", "top5_accuracy", "loss")
# The share of `wrong_labels` that a model gives back is the share that it has learnt.
EVAL_SPLITS = ("validation", "test", "wrong_labels")


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
    test_examples: int | None = field(
        default=None,
        metadata={"help": "Score so many test images only, with equal shares of every class. Default: all."},
    )
    cutout: int = field(default=0, metadata={"help": "Edge in pixels of the square blanked out in training images."})
    cutout_probability: float | None = field(
        default=None, metadata={"help": "Share of the training images that this happens to. Default: 1."}
    )
    random_erasing: float | None = field(
        default=None,
        metadata={"help": "Share of the training images in which a rectangle is blanked out. Default: 0."},
    )
    padding_mode: str | None = field(
        default=None,
        metadata={
            "help": "What images are padded with to be cropped: constant (black) or reflect. Default: the data set's."
        },
    )
    weight_decay_scope: str | None = field(
        default=None,
        metadata={"help": "all: every weight decays. Default: as in transformers, all but biases and LayerNorms."},
    )
    no_aug: bool = field(
        default=False,
        metadata={"help": "Train on the images as they are: no crops, no flips. A data set has its own by default."},
    )
    model: str = field(default="vit-small", metadata={"help": f"One of {', '.join(models.MODELS)}."})
    eval_splits: list[str] = field(
        default_factory=lambda: ["validation"],
        metadata={"help": f"What an evaluation during training scores: {', '.join(EVAL_SPLITS)}."},
    )

    def __post_init__(self):
        super().__post_init__()
        known = set(self.eval_splits) <= set(EVAL_SPLITS) and len(set(self.eval_splits)) == len(self.eval_splits)
        if not self.eval_splits or not known:
            raise ValueError(
                f"`eval_splits` is {' '.join(self.eval_splits)}: choose among {', '.join(EVAL_SPLITS)}, each once."
            )
        if self.weight_decay_scope not in (None, "all"):
            raise ValueError(f"`weight_decay_scope` is {self.weight_decay_scope}: give all, or leave it out.")


@dataclass
class TrainingArguments(CheckedArguments, XSAMTrainingArguments):
    pass


ARGUMENTS = (ImageArguments, TrainingArguments)


class AllDecayTrainer(WholeScoresTrainer):
    """A trainer under which every weight decays: those of BatchNorm and the biases too, as with torch's SGD alone."""

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name, _ in model.named_parameters()]


def score(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy (top 1 and 5) and cross-entropy."""
    return metric.compute(TopKAccuracy, predictions=prediction.predictions, references=prediction.label_ids)


@dataclass
class Setup:
    """What a training is made of."""

    trainer: XSAMTrainer
    splits: dict[str, Split]
    meter: CostMeter
    identity: dict


def prepare(task: ImageArguments, args: TrainingArguments) -> Setup:
    """All that comes before the training itself."""
    task.use_threads()
    runs.check_output(args, METRICS)
    if task.eval_splits != ["validation"] and args.metric_for_best_model is not None:
        raise ValueError(
            f"`metric_for_best_model` is {args.metric_for_best_model}, and `eval_splits` is {' '.join(task.eval_splits)}: the "
            "best model is chosen by validation alone, so leave one of them out."
        )
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            f"`neftune_noise_alpha` is {args.neftune_noise_alpha}, and it is noise for the embeddings of words, which images have not: leave it out."
        )
    splits = data.load(
        task.dataset,
        task.data_dir,
        task.validation_share,
        task.cutout,
        args.seed,
        train_examples=task.train_examples,
        label_noise=task.label_noise,
        test_examples=task.test_examples,
        cutout_probability=task.cutout_probability,
        random_erasing=task.random_erasing,
        padding_mode=task.padding_mode,
        no_aug=task.no_aug,
    )
    watched = _watched(task, args, splits)
    set_seed(args.seed)
    model = models.build(task.model, task.dataset, task.dropout or 0.0)
    meter = CostMeter(model)
    prints = {name: splits[name].fingerprint for name in ("train", "validation", "test")}
    # Left out where it is not set: runs that are older than the field are the same runs.
    identity = identity_of(
        "image_classification",
        task,
        args,
        prints,
        dropout=task.dropout or 0.0,
        no_aug=task.no_aug or None,
        micro_batch=_micro_batch(model, args),
    )
    with refusals():
        trainer = (WholeScoresTrainer if task.weight_decay_scope is None else AllDecayTrainer)(
            model=model,
            args=args,
            train_dataset=splits["train"],
            eval_dataset=watched["validation"] if list(watched) == ["validation"] else watched,
            processing_class=pixels.processor(data.DATASETS[task.dataset]),  # written beside the weights
            compute_metrics=score,
            callbacks=[meter, EpochCallback(splits["train"]), runs.RunIdentity(identity)],
        )
    return Setup(trainer, splits, meter, identity)


def train(task: ImageArguments, args: TrainingArguments) -> Path:
    """Trains, scores all splits, and returns the path of `result.json`."""
    setup = prepare(task, args)
    trainer, splits = setup.trainer, setup.splits
    runs.start(trainer, setup.identity)

    scores = {}
    for split in EVAL_SPLITS:
        if len(splits.get(split, ())):
            found = trainer.evaluate(splits[split], metric_key_prefix=split)
            scores[split] = {name: found[f"{split}_{name}"] for name in METRICS}
            trainer.log_metrics(split, found)
    if best := best_epoch(trainer.state.log_history):
        scores["best_epoch"] = best
    if last := last_five_epochs(trainer.state.log_history):
        scores["last_five_epochs"] = last
    result = Path(args.output_dir) / runs.RESULT
    if trainer.is_world_process_zero():
        facts = {"task": "image_classification", "dataset": task.dataset, "model": task.model, "metrics": scores}
        result = write_result(trainer, setup.meter, task, setup.identity, **facts)
        print(result)
        try:
            trainer.create_model_card(dataset=task.dataset, tasks="image-classification")
        except (OSError, UnicodeError) as error:  # a folder's name, for instance, that the locale has no letters for
            print(f"There is no model card: {sentence(error)}.", file=sys.stderr)
    return result


def _micro_batch(model: nn.Module, args: TrainingArguments) -> int | None:
    """The size of a micro-batch where weights depend on it: where BatchNorm sees a part of an update's images."""
    whole = args.gradient_accumulation_steps * args.world_size == 1
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    return args.per_device_train_batch_size if normed and not whole else None


def _watched(task: ImageArguments, args: TrainingArguments, splits: dict[str, Split]) -> dict[str, Split]:
    """The splits that are scored during training."""
    watched = {name: splits[name] for name in task.eval_splits if len(splits.get(name, ()))}
    if args.eval_strategy != "no" and len(watched) < len(task.eval_splits):
        name = next(name for name in task.eval_splits if name not in watched)
        share = {"wrong_labels": "label_noise"}.get(name, "validation_share")
        raise ValueError(
            f"`{share}` is {getattr(task, share)}, so there is no {name} to evaluate on: change `eval_splits`, or set "
            "`eval_strategy` to `no`."
        )
    return watched


def _evaluated(history: Sequence[dict]) -> list[float]:
    """The epochs at which anything was evaluated: a run that is resumed with other `eval_splits` has test scores of a part of them."""
    return sorted({e["epoch"] for e in history if any(name.startswith("eval_") for name in e)})


def best_epoch(history: Sequence[dict]) -> dict[str, float]:
    """
    The test scores of the epoch with the highest test accuracy: early stopping with hindsight, which no one has before the end.

    Args:
        history (`Sequence[dict]`): the Trainer's log; without test scores of every evaluation in it there is no best epoch.
    """
    scored = [entry for entry in history if "eval_test_accuracy" in entry]
    if not scored or {entry["epoch"] for entry in scored} != set(_evaluated(history)):
        return {}
    best = max(scored, key=lambda entry: entry["eval_test_accuracy"])
    return {**{name: best[f"eval_test_{name}"] for name in METRICS}, "epoch": best["epoch"]}


def last_five_epochs(history: Sequence[dict]) -> dict[str, float]:
    """
    The mean of the test scores of the last five epochs, which the paper's code prints beside the best epoch's.

    Args:
        history (`Sequence[dict]`): the Trainer's log; without test scores of the last five whole epochs there is no such mean.
    """
    scored = {e["epoch"]: e for e in history if "eval_test_accuracy" in e}
    whole = [epoch for epoch in _evaluated(history) if float(epoch).is_integer()]
    last = [scored[epoch] for epoch in whole[-5:] if epoch in scored]
    return {name: fmean(e[f"eval_test_{name}"] for e in last) for name in METRICS} if len(last) == 5 else {}


def main(argv: Sequence[str]) -> None:
    train(*recipes.parse(ARGUMENTS, argv, __doc__, "runs/image_classification"))


if __name__ == "__main__":
    run(main)
