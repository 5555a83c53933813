"""Tiny models and data that several test files share."""

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from xsam_hf import XSAMTrainer, XSAMTrainingArguments


INPUTS, HIDDEN, CLASSES = 5, 7, 3


class Points(Dataset):
    """`n` random points with random classes; the same for the same seed."""

    def __init__(self, n=32, dtype=torch.float32, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randint(CLASSES, (n,), generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


class Classifier(nn.Module):
    """A tanh network with two layers, and dropout or BatchNorm if wanted. Counts its forward and backward passes."""

    def __init__(self, dropout=0.0, batch_norm=False, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(INPUTS, HIDDEN, dtype=dtype)
        self.norm = nn.BatchNorm1d(HIDDEN, dtype=dtype) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(HIDDEN, CLASSES, dtype=dtype)
        self.forwards = self.backwards = 0

    def forward(self, x, labels=None):
        hidden = self.dropout(torch.tanh(self.norm(self.first(x))))
        logits = self.second(hidden)
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.cross_entropy(logits, labels)
        self.count(loss)
        return {"loss": loss, "logits": logits}

    def count(self, loss):
        if self.training:
            self.forwards += 1
            if loss.requires_grad:
                loss.register_hook(self._count_backward)

    def _count_backward(self, gradient):
        self.backwards += 1


class Tokens(Dataset):
    """`n` random sentences for a language model."""

    def __init__(self, n=64):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        ids = torch.randint(40, (9,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids.clone()}


def tiny_gpt2(dropout=0.0, layers=2):
    torch.manual_seed(0)
    dropouts = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], dropout)
    size = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": layers, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **size, **dropouts))


DEFAULTS = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 2,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def arguments(output_dir, cls=XSAMTrainingArguments, **changes):
    return cls(output_dir=str(output_dir), **{**DEFAULTS, **changes})


def train(output_dir, model=None, data=None, trainer=XSAMTrainer, resume=None, callbacks=(), **changes):
    """Trains and returns the trainer. `trainer=Trainer` drops the method's fields: the plain run to compare with."""
    run = build(output_dir, model, data, trainer, callbacks, **changes)
    run.train(resume_from_checkpoint=resume)
    return run


def build(output_dir, model=None, data=None, trainer=XSAMTrainer, callbacks=(), **changes):
    """A trainer that has not trained yet."""
    cls = XSAMTrainingArguments if issubclass(trainer, XSAMTrainer) else TrainingArguments
    return trainer(
        model=Classifier() if model is None else model,
        args=arguments(output_dir, cls, **changes),
        train_dataset=Points() if data is None else data,
        callbacks=list(callbacks),
    )


def weights_of(trainer):
    return torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
