"""
Trains a translation model and scores it.

    python tasks/translation/train.py tasks/translation/recipes/handbook-small.yaml
    python tasks/translation/train.py tasks/translation/recipes/handbook-small.yaml --alpha 1   # SAM
    python tasks/translation/train.py tasks/translation/recipes/handbook-small.yaml --rho 0     # AdamW

Every field of a recipe is a flag as well, and the command line comes before the recipe; --help lists them.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch


# As a script: imports start from the root of the repository, and not from this folder, whose fairseq.py would hide fairseq.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from transformers import set_seed  # noqa: E402

from tasks import recipes  # noqa: E402
from tasks.results import CostMeter, write_result  # noqa: E402
from tasks.translation import data, metrics  # noqa: E402
from tasks.translation import model as models  # noqa: E402
from tasks.translation.averaging import SavedSteps, average_checkpoints, check_averaging  # noqa: E402
from tasks.translation.trainer import TranslationTrainer  # noqa: E402
from xsam_hf import XSAMSeq2SeqTrainingArguments  # noqa: E402


@dataclass
class TranslationArguments(data.DataArguments):
    """Which text, which model."""

    model: str = field(
        default="transformer-small",
        metadata={"help": f"One of {', '.join(models.SIZES)}, or a folder that train.py or convert_fairseq wrote."},
    )
    dropout: float = field(default=0.3, metadata={"help": "Dropout of a new model."})
    average_checkpoints: int = field(
        default=0,
        metadata={"help": "Score the mean of so many last checkpoints. 0: the model that training ends with."},
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads. Default: torch's choice."})

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` is {self.dropout}: give a probability from 0 to below 1.")
        if self.average_checkpoints < 0:
            raise ValueError(f"`average_checkpoints` is {self.average_checkpoints}: give 0 or more.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"`threads` is {self.threads}: give 1 or more, or leave it out for torch's choice.")


@dataclass
class TrainingArguments(XSAMSeq2SeqTrainingArguments):
    output_dir: str = field(default="runs/translation", metadata={"help": "Where everything is written."})


def build_model(task: TranslationArguments, corpus: data.Corpus) -> models.TranslationTransformer:
    """
    A new model, or a saved one with the same vocabularies.

    Raises:
        `ValueError`: no such model, or its vocabularies are of another size.
    """
    sizes = len(corpus.source_vocabulary), len(corpus.target_vocabulary)
    if not Path(task.model).is_dir():
        return models.build(task.model, *sizes, dropout=task.dropout)
    model = models.TranslationTransformer.from_pretrained(task.model)
    saved = model.config.src_vocab_size, model.config.tgt_vocab_size
    if saved != sizes:
        raise ValueError(
            f"`model` {task.model} has {saved[0]} and {saved[1]} tokens, `dataset` {sizes[0]} and {sizes[1]}: give the data "
            "that the model was trained on."
        )
    return model


def train(task: TranslationArguments, args: TrainingArguments) -> Path:
    """Trains, translates the validation and the test split, prints the scores, and returns the path of `result.json`."""
    check_averaging(task.average_checkpoints, args)
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    corpus = data.load(task)
    set_seed(args.seed)
    model = build_model(task, corpus)
    output = Path(args.output_dir)
    writing = args.process_index == 0
    scorers = {name: metrics.Scorer(corpus, name, output if writing else None) for name in ("validation", "test")}
    meter, saved = CostMeter(model), SavedSteps()
    trainer = TranslationTrainer(
        model=model,
        args=args,
        train_dataset=corpus.splits["train"],
        eval_dataset=corpus.splits["validation"],
        compute_metrics=scorers["validation"],
        max_tokens=task.max_tokens,
        callbacks=[meter, saved],
    )
    # A flag's text, where the Trainer distinguishes a path from "the last checkpoint, wherever it is".
    resume = {"true": True, "false": None}.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    if writing:
        corpus.save(output, task.source_language, task.target_language)
    if task.average_checkpoints:
        # The first process may still be writing the last one.
        trainer.accelerator.wait_for_everyone()
        average_checkpoints(model, output, saved.steps, task.average_checkpoints)
        trainer.save_model()

    scores = {}
    for split, scorer in scorers.items():
        trainer.compute_metrics = scorer
        found = trainer.evaluate(corpus.splits[split], metric_key_prefix=split)
        scores[split] = {name: found[f"{split}_{name}"] for name in (*metrics.NAMES, "loss")}
    result = output / "result.json"
    if writing:
        copied = {split: scorer.copy_of_source() for split, scorer in scorers.items()}
        signatures = scorers["test"].signatures
        facts = {"task": "translation", "dataset": task.dataset, "model": task.model, "metrics": scores}
        result = write_result(trainer, meter, task, **facts, copied_source=copied, signatures=signatures)
        print(f"\nTen translations of the test set:\n\n{scorers['test'].samples(10)}")
        print(f"\n{metrics.table(scores, copied, signatures)}\n\n{result}")
    return result


if __name__ == "__main__":
    train(*recipes.parse((TranslationArguments, TrainingArguments), sys.argv[1:], __doc__))
