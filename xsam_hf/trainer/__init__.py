"""XSAM inside the Transformers `Trainer`: all that imports transformers or accelerate."""

from .arguments import XSAMSeq2SeqTrainingArguments, XSAMTrainingArguments
from .range_test import RangeTest, find_rho
from .trainer import XSAMMixin, XSAMSeq2SeqTrainer, XSAMTrainer


__all__ = [
    "RangeTest",
    "XSAMMixin",
    "XSAMSeq2SeqTrainer",
    "XSAMSeq2SeqTrainingArguments",
    "XSAMTrainer",
    "XSAMTrainingArguments",
    "find_rho",
]
