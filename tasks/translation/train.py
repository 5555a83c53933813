"""
Trains a translation model and scores it.

    python -m tasks.translation.train tasks/translation/recipes/handbook-small.yaml
    python -m tasks.translation.train tasks/translation/recipes/handbook-small.yaml --method sam
    python -m tasks.translation.train tasks/translation/recipes/handbook-small.yaml --method sgd   # AdamW

Every field of a recipe is a flag as well, and the command line comes before the recipe; --help lists them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from transformers import set_seed

from tasks import recipes, runs
from tasks.arguments import CheckedArguments, TaskArguments
from tasks.command import cut, refusals, run
from tasks.identity import fingerprint_of_model, identity_of
from tasks.results import CostMeter, write_result
from tasks.translation import checks, data, metrics
from tasks.translation import model as models
from tasks.translation.averaging import SavedSteps, average_checkpoints, check_averaging
from tasks.translation.corpus import Corpus
from tasks.translation.trainer import TranslationTrainer
from tasks.translation.vocabulary import Vocabulary
from xsam_hf import XSAMSeq2SeqTrainingArguments


@dataclass
class TranslationArguments(TaskArguments, data.DataArguments):
    """Which text, which model."""

    model: str = field(
        default="transformer-small",
        metadata={"help": f"One of {', '.join(models.SIZES)}, or a folder that train.py or convert_fairseq wrote."},
    )
    average_checkpoints: int = field(
        default=0,
        metadata={"help": "Score the mean of so many last checkpoints. 0: the model that training ends with."},
    )

    def __post_init__(self):
        TaskArguments.__post_init__(self)
        data.DataArguments.__post_init__(self)
        if self.average_checkpoints < 0:
            raise ValueError(f"`average_checkpoints` is {self.average_checkpoints}: give 0 or more.")


@dataclass
class TrainingArguments(CheckedArguments, XSAMSeq2SeqTrainingArguments):
    predict_with_generate: bool = field(default=True, metadata={"help": "Translate to score, which is always done."})


def build_model(task: TranslationArguments, corpus: Corpus) -> models.TranslationTransformer:
    """
    A new model, or a saved one with the same vocabularies.

    Raises:
        `ValueError`: no such model, its vocabularies are of another size, order or words, or a sentence is too long for it.
    """
    sizes = len(corpus.source_vocabulary), len(corpus.target_vocabulary)
    dropout = {} if task.dropout is None else {"dropout": task.dropout}
    if not Path(task.model).is_dir():
        return models.build(task.model, *sizes, **dropout)
    model = models.load(Path(task.model), **dropout)
    saved = model.config.src_vocab_size, model.config.tgt_vocab_size
    if saved != sizes:
        raise ValueError(
            f"`model` {task.model} has {saved[0]} and {saved[1]} tokens, `dataset` {sizes[0]} and {sizes[1]}: give the data "
            "that the model was trained on."
        )
    positions = model.config.max_position_embeddings
    longest = max(
        len(ids) for split in corpus.splits.values() for side in ("input_ids", "labels") for ids in split[side]
    )
    if longest > positions:
        raise ValueError(
            f"`model` {task.model} has {positions} positions, and `dataset` sentences of up to {longest} tokens: leave these out or cut them."
        )
    vocabularies = (corpus.source_vocabulary, corpus.target_vocabulary)
    for language, vocabulary in zip((task.source_language, task.target_language), vocabularies, strict=True):
        file = Path(task.model) / f"dict.{language}.txt"
        if not file.is_file():
            continue
        pairs = zip_longest(Vocabulary.read(file).counts, vocabulary.counts, fillvalue="")
        for line, (theirs, ours) in enumerate(pairs, start=1):
            if theirs != ours:
                raise ValueError(
                    f"`model` {task.model} has {cut(repr(theirs))} in line {line} of dict.{language}.txt, and `dataset` {cut(repr(ours))}: "
                    "give the data that the model was trained on."
                )
    return model


ARGUMENTS = (TranslationArguments, TrainingArguments)


@dataclass
class Setup:
    """What a training is made of."""

    trainer: TranslationTrainer
    corpus: Corpus
    scorers: dict[str, metrics.Scorer]
    meter: CostMeter
    saved: SavedSteps
    identity: dict


def prepare(task: TranslationArguments, args: TrainingArguments) -> Setup:
    """All that comes before the training itself."""
    check_averaging(task.average_checkpoints, args)
    TranslationTrainer.refuse_ignored(args)
    task.use_threads()
    runs.check_output(args, metrics.NAMES)
    corpus = data.load(task)
    checks.warn_of_repetitions(corpus.splits)
    languages = task.source_language, task.target_language
    checks.warn_of_lost(corpus.splits, languages)
    checks.warn_of_other_text(corpus.splits, languages)
    checks.refuse_copied_side(corpus.splits, languages)
    checks.refuse_swapped(corpus.splits, languages)
    beams = args.generation_num_beams
    if beams is not None and beams > len(corpus.target_vocabulary):
        raise ValueError(
            f"`generation_num_beams` is {beams}, and a hypothesis can begin with {len(corpus.target_vocabulary)} tokens only: give "
            "fewer (fairseq's is 5)."
        )
    set_seed(args.seed)
    model = build_model(task, corpus)
    # The data's fingerprints stand for where it came from.
    facts = {"dropout": model.config.dropout, "model_files": fingerprint_of_model(task.model)}
    identity = identity_of("translation", task, args, corpus.fingerprints, dataset=None, train_examples=None, **facts)
    output = Path(args.output_dir) if args.process_index == 0 else None
    scorers = {name: metrics.Scorer(corpus, name, output) for name in ("validation", "test")}
    meter, saved = CostMeter(model), SavedSteps()
    with refusals():
        trainer = TranslationTrainer(
            model=model,
            args=args,
            train_dataset=corpus.splits["train"],
            eval_dataset=corpus.splits["validation"],
            compute_metrics=scorers["validation"],
            max_tokens=task.max_tokens,
            callbacks=[meter, saved, runs.RunIdentity(identity)],
        )
    return Setup(trainer, corpus, scorers, meter, saved, identity)


def train(task: TranslationArguments, args: TrainingArguments) -> Path:
    """Trains, translates the validation and the test split, prints the scores, and returns the path of `result.json`."""
    setup = prepare(task, args)
    trainer, corpus, scorers = setup.trainer, setup.corpus, setup.scorers
    output, writing = Path(args.output_dir), args.process_index == 0
    runs.start(trainer, setup.identity)
    if writing:
        corpus.save(output, task.source_language, task.target_language)
    if task.average_checkpoints:
        # The first process may still be writing the last one.
        trainer.accelerator.wait_for_everyone()
        average_checkpoints(trainer.model, output, setup.saved.steps, task.average_checkpoints)
        trainer.save_model()

    scores = {}
    for split, scorer in scorers.items():
        trainer.compute_metrics = scorer
        found = trainer.evaluate(corpus.splits[split], metric_key_prefix=split)
        scores[split] = {name: found[f"{split}_{name}"] for name in (*metrics.NAMES, "loss")}
    result = output / runs.RESULT
    if writing:
        copied = {split: scorer.copy_of_source() for split, scorer in scorers.items()}
        signatures = scorers["test"].signatures
        facts = {"task": "translation", "dataset": task.dataset, "model": task.model, "metrics": scores}
        result = write_result(
            trainer, setup.meter, task, setup.identity, **facts, copied_source=copied, signatures=signatures
        )
        print(f"\nTen translations of the test set:\n\n{scorers['test'].samples(10)}")
        print(f"\n{metrics.table(scores, copied, signatures)}\n\n{result}")
    return result


def main(argv: Sequence[str]) -> None:
    train(*recipes.parse(ARGUMENTS, argv, __doc__, "runs/translation"))


if __name__ == "__main__":
    run(main)
