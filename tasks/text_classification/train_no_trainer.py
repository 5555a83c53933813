"""
Trains the text classifier without the Trainer, in a loop with Accelerate: SAM and XSAM are one call between loss and optimizer.

    python -m tasks.text_classification.train_no_trainer --train_file TEXTS.csv --rho 0.05
    accelerate launch -m tasks.text_classification.train_no_trainer --train_file TEXTS.csv --rho 0.05 --alpha 1     # SAM
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, get_scheduler

from tasks import runs
from tasks.arguments import check_ranges
from tasks.command import refusals, run
from tasks.recipes import DataclassParser
from tasks.text_classification import data, models
from tasks.text_classification.train import TextArguments
from xsam_hf import XSAMArguments, XSAMState, xsam_gradient


@dataclass
class LoopArguments(XSAMArguments):
    """What the Trainer's arguments of the same names are."""

    output_dir: str = "runs/text_classification/no_trainer"
    num_train_epochs: int = 3
    per_device_train_batch_size: int = 32
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 42

    def __post_init__(self):
        check_ranges(self)
        if self.lr_scheduler_type == "reduce_lr_on_plateau":
            raise ValueError(
                "`lr_scheduler_type` is reduce_lr_on_plateau, which follows a score, and this loop gives it none: choose another, or "
                "train with tasks.text_classification.train."
            )
        super().__post_init__()


def train(task: TextArguments, args: LoopArguments, accelerator: Accelerator) -> float:
    """Trains, saves the model and returns the accuracy on the validation texts after the last epoch."""
    task.use_threads()
    runs.check_folder(args.output_dir)
    if (Path(args.output_dir) / runs.RESULT).exists():
        raise ValueError(
            f"`output_dir` {args.output_dir} holds the {runs.RESULT} of another run: give another folder."
        )
    corpus = data.load(task)
    if "validation" not in corpus.splits:
        raise ValueError("`validation_share` is 0, and the loop scores validation: give a `validation_file`.")
    set_seed(args.seed)
    with refusals():
        tokenizer = models.tokenizer(task.model_name_or_path, corpus.splits["train"]["text"])
        corpus.names = models.order(task.model_name_or_path, corpus.names)
        model = models.build(task.model_name_or_path, tokenizer, corpus.names, task.max_seq_length, task.dropout)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    splits, collator = corpus.encode(tokenizer, task.max_seq_length), DataCollatorWithPadding(tokenizer)
    models.check_tokens(model, task.model_name_or_path, splits.values())
    size = args.per_device_train_batch_size
    loader = DataLoader(splits["train"], batch_size=size, shuffle=True, collate_fn=collator)
    eval_loader = DataLoader(splits["validation"], batch_size=size, collate_fn=collator)
    model, optimizer, loader, eval_loader = accelerator.prepare(model, optimizer, loader, eval_loader)
    with refusals():
        # A prepared scheduler steps once for each process.
        steps = args.num_train_epochs * len(loader) * accelerator.num_processes
        scheduler = accelerator.prepare(get_scheduler(args.lr_scheduler_type, optimizer, 0, steps))

    state, accuracy = XSAMState(), 0.0
    for epoch in range(args.num_train_epochs):
        model.train()
        state.search_due = True  # search α in the epoch's first update
        for batch in loader:

            def loss(batch=batch):
                return model(**batch).loss

            def gradient(loss=loss):
                value = loss()
                accelerator.backward(value)
                # The mean over processes, here and below, so that all of them choose the same α and fall back together.
                return accelerator.reduce(value.detach(), reduction="mean")

            def probe(loss=loss):
                return accelerator.reduce(loss(), reduction="mean")

            scaled = accelerator.scaler is not None
            seen = xsam_gradient(model, gradient, probe, args, state, loss_scaling=scaled)
            if args.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

        model.eval()
        right = []
        for batch in eval_loader:
            with torch.no_grad():
                logits = model(**batch).logits
            right.append(accelerator.gather_for_metrics(is_right(logits, batch["labels"])))
        accuracy = torch.cat(right).float().mean().item()
        sharpness = (seen.last_loss - seen.loss).item()
        accelerator.print(f"epoch {epoch}: accuracy {accuracy:.4f}, loss {seen.loss:.4f}, sharpness {sharpness:.4f}")

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
    return accuracy


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label's logit is above all others, (N,): a tie, or a logit that is not finite, counts as wrong."""
    own = logits.gather(1, labels[:, None])
    return ((logits >= own).sum(1) == 1) & logits.isfinite().all(1)


def main(argv: Sequence[str]) -> None:
    parser = DataclassParser((TextArguments, LoopArguments), description=__doc__)
    parser.parse_args(argv)  # which names an unknown flag, and the one that was meant
    with refusals():
        task, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[:2]
    train(task, args, Accelerator())


if __name__ == "__main__":
    run(main)
