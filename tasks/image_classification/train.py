"""
Trains a Vision Transformer and scores it.

    python tasks/image_classification/train.py tasks/image_classification/recipes/digits-vit-small.yaml
    python tasks/image_classification/train.py tasks/image_classification/recipes/digits-vit-small.yaml --alpha 1   # SAM
    python tasks/image_classification/train.py tasks/image_classification/recipes/digits-vit-small.yaml --rho 0     # AdamW

Every field of a recipe is a flag as well, and the command line comes before the recipe; --help lists them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import torch


# As a script: imports start from the root of the repository and mean the same as in `python -m` and in the tests.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from transformers import EvalPrediction, set_seed  # noqa: E402

from tasks import recipes  # noqa: E402
from tasks.image_classification import data, models  # noqa: E402
from tasks.results import CostMeter, write_result  # noqa: E402
from xsam_hf import XSAMTrainer, XSAMTrainingArguments  # noqa: E402


@dataclass
class ImageArguments:
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
    model: str = field(default="vit-small", metadata={"help": f"One of {', '.join(models.SIZES)}."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of the model."})
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: torch's choice."})

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is {self.dropout}: give a probability from 0 to below 1.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"`threads` is {self.threads}: give 1 or more, or leave it out for torch's choice.")


@dataclass
class TrainingArguments(XSAMTrainingArguments):
    output_dir: str = field(default="runs/image_classification", metadata={"help": "Where everything is written."})


def train(task: ImageArguments, args: TrainingArguments) -> Path:
    """Trains, scores the test split once, and returns the path of `result.json`."""
    if task.threads is not None:
        torch.set_num_threads(task.threads)
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
    model = models.build(task.model, task.dataset, task.dropout)
    metric = evaluate.load(str(Path(__file__).with_name("top_k_accuracy.py")), keep_in_memory=True)
    meter = CostMeter(model)

    def score(prediction: EvalPrediction) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    trainer = XSAMTrainer(
        model=model,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        compute_metrics=score,
        callbacks=[meter, data.EpochCallback(splits["train"])],
    )
    # A flag's text, where the Trainer distinguishes a path from "the last checkpoint, wherever it is".
    resume = {"true": True, "false": None}.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()

    scores = {}
    for split in ("validation", "test"):
        if len(splits[split]):
            found = trainer.evaluate(splits[split], metric_key_prefix=split)
            scores[split] = {name: found[f"{split}_{name}"] for name in ("accuracy", "top5_accuracy", "loss")}
            trainer.log_metrics(split, found)
    result = Path(args.output_dir) / "result.json"
    if trainer.is_world_process_zero():
        facts = {"task": "image_classification", "dataset": task.dataset, "model": task.model, "metrics": scores}
        result = write_result(trainer, meter, task, **facts)
        trainer.create_model_card(dataset=task.dataset, tasks="image-classification")
    return result


if __name__ == "__main__":
    train(*recipes.parse((ImageArguments, TrainingArguments), sys.argv[1:], __doc__))
