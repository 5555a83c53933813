"""XSAM, explicit sharpness-aware minimization, for the Hugging Face Trainer."""

from .arguments import XSAMArguments
from .seen import SeenAscent
from .state import XSAMState
from .trainer import (
    RangeTest,
    XSAMMixin,
    XSAMSeq2SeqTrainer,
    XSAMSeq2SeqTrainingArguments,
    XSAMTrainer,
    XSAMTrainingArguments,
    find_rho,
)
from .xsam import xsam_gradient


__version__ = "0.1.0"

__all__ = [
    "RangeTest",
    "SeenAscent",
    "XSAMArguments",
    "XSAMMixin",
    "XSAMSeq2SeqTrainer",
    "XSAMSeq2SeqTrainingArguments",
    "XSAMState",
    "XSAMTrainer",
    "XSAMTrainingArguments",
    "find_rho",
    "xsam_gradient",
]
