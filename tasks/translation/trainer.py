"""XSAMSeq2SeqTrainer with fairseq's batches, loss, weight decay and search."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch.nn.functional import cross_entropy
from transformers import Seq2SeqTrainingArguments

from tasks.translation.batches import TokenBatchLoader, TokenBatchSampler
from tasks.translation.corpus import collate
from xsam_hf import XSAMSeq2SeqTrainer


class LabelSmoothedLoss:
    """
    fairseq's label-smoothed cross entropy: summed, then divided by the target tokens of the whole update batch.

    fairseq spreads ε over the V − 1 wrong tokens, torch over all V: torch's ε·V/(V − 1) is fairseq's ε.

    Args:
        epsilon (`float`): share of the probability that goes to the other tokens.

    Source: `fairseq.criterions.label_smoothed_cross_entropy`, 0.12.2.
    """

    def __init__(self, epsilon: float):
        self.epsilon = epsilon

    def __call__(self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None):
        size = outputs.logits.shape[-1]
        smoothing = self.epsilon * size / (size - 1)
        loss = cross_entropy(
            outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing
        )
        return loss / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


class TranslationTrainer(XSAMSeq2SeqTrainer):
    """
    Trains and evaluates a [`TranslationTransformer`] as fairseq does; the gradient is XSAM's.

    Args:
        max_tokens (`int`): limit for a micro-batch of one process, padding counted; see [`TokenBatchSampler`].
        kwargs: [`XSAMSeq2SeqTrainer`]'s. `label_smoothing_factor` of the arguments is fairseq's epsilon.
    """

    def __init__(self, *, max_tokens: int, **kwargs):
        loss = LabelSmoothedLoss(kwargs["args"].label_smoothing_factor)
        super().__init__(data_collator=collate, compute_loss_func=loss, **kwargs)
        self.max_tokens = max_tokens

    def get_train_dataloader(self) -> TokenBatchLoader:
        sampler = TokenBatchSampler(
            [len(ids) for ids in self.train_dataset["input_ids"]],
            [len(ids) for ids in self.train_dataset["labels"]],
            max_tokens=self.max_tokens,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            num_processes=self.args.world_size,
            process_index=self.args.process_index,
        )
        return TokenBatchLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_decay_parameter_names(self, model) -> list[str]:
        """All of them: fairseq's Adam makes no exception for biases and normalisation layers."""
        return [name for name, _ in model.named_parameters()]

    @staticmethod
    def refuse_ignored(args: Seq2SeqTrainingArguments) -> None:
        """
        Refuses arguments that this trainer would pass over.

        Raises:
            `ValueError`: one was given; the message names it, its value and the way out.
        """
        if args.generation_num_beams is not None and args.generation_num_beams < 1:
            raise ValueError(
                f"`generation_num_beams` is {args.generation_num_beams}: give 1 for greedy search, or more (fairseq's is 5)."
            )
        if not args.predict_with_generate:
            raise ValueError("`predict_with_generate` is False, but the scores need translations: leave it out.")
        instead = {
            "per_device_train_batch_size": "`max_tokens` limits a batch",
            "generation_max_length": "a hypothesis may have 1.2 n + 10 tokens, as in fairseq",
            "generation_config": "the search is fairseq's",
            "auto_find_batch_size": "`max_tokens` limits a batch",
            "dataloader_drop_last": "every sentence comes once an epoch",
            "train_sampling_strategy": "batches hold sentences of like length already",
            "sortish_sampler": "batches hold sentences of like length already",
        }
        defaults = {field.name: field.default for field in fields(Seq2SeqTrainingArguments)}
        for name, why in instead.items():
            value = getattr(args, name, None)
            if name in defaults and value != defaults[name]:
                raise ValueError(f"`{name}` is {value}, but {why}: leave it out.")

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **kwargs):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, dict(inputs))
        if prediction_loss_only:
            return loss, None, None
        beams = 5 if self.args.generation_num_beams is None else self.args.generation_num_beams
        tokens = self.model.translate(inputs["input_ids"], inputs["attention_mask"], num_beams=beams)
        return loss, tokens, inputs["labels"]
