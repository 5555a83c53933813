"""The method's hyperparameters as fields of the Trainer's arguments, and so as command-line flags."""

from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..arguments import XSAMArguments


# XSAMArguments stands first so that `output_dir` stays the first positional argument: dataclass fields are collected from
# the last base backwards.
@dataclass
class XSAMTrainingArguments(XSAMArguments, TrainingArguments):
    """
    [`~transformers.TrainingArguments`] and the fields of [`XSAMArguments`], for [`XSAMTrainer`].

    Note that `max_grad_norm` (1.0 by default in Transformers) clips the final gradient, whose norm is ‖g_k‖: the direction
    stays, the magnitude is lost above 1. The paper does not clip; set it to 0 to reproduce it.
    """


@dataclass
class XSAMSeq2SeqTrainingArguments(XSAMArguments, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] and the fields of [`XSAMArguments`], for [`XSAMSeq2SeqTrainer`]."""
