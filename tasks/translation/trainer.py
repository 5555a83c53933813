"""XSAMSeq2SeqTrainer with fairseq's batches, loss, weight decay and search."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from tasks.translation.batches import TokenBatchLoader, TokenBatchSampler
from tasks.translation.data import collate
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
        )

    def get_decay_parameter_names(self, model) -> list[str]:
        """All of them: fairseq's Adam makes no exception for biases and normalisation layers."""
        return [name for name, _ in model.named_parameters()]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **kwargs):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, dict(inputs))
        if prediction_loss_only:
            return loss, None, None
        beams = self.args.generation_num_beams or 5
        tokens = self.model.translate(inputs["input_ids"], inputs["attention_mask"], num_beams=beams)
        return loss, tokens, inputs["labels"]
