"""XSAM, explicit sharpness-aware minimization, for the Hugging Face Trainer."""

from .arguments import XSAMArguments
from .state import XSAMState
from .trainer import XSAMMixin, XSAMSeq2SeqTrainer, XSAMSeq2SeqTrainingArguments, XSAMTrainer, XSAMTrainingArguments
from .xsam import xsam_gradient


__version__ = "0.1.0"

__all__ = [
    "XSAMArguments",
    "XSAMMixin",
    "XSAMSeq2SeqTrainer",
    "XSAMSeq2SeqTrainingArguments",
    "XSAMState",
    "XSAMTrainer",
    "XSAMTrainingArguments",
    "xsam_gradient",
]
