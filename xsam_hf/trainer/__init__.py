"""XSAM inside the Transformers `Trainer`: all that imports transformers or accelerate."""

from .arguments import XSAMSeq2SeqTrainingArguments, XSAMTrainingArguments
from .trainer import XSAMMixin, XSAMSeq2SeqTrainer, XSAMTrainer


__all__ = ["XSAMMixin", "XSAMSeq2SeqTrainer", "XSAMSeq2SeqTrainingArguments", "XSAMTrainer", "XSAMTrainingArguments"]
