"""Runs every scenario of test_distributed.py in each of two processes and saves what each of them ended with."""

import gc
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from toys import Classifier, Points, train, weights_of
from transformers import Trainer

from xsam_hf import XSAMTrainer


COMMON = {"rho": 0.5, "train_sampling_strategy": "sequential"}


class NotFiniteOnOneRank(Classifier):
    """The second pass of the first update is NaN in process 1 only: its loss and its gradient, or its loss alone."""

    loss_alone = False

    def forward(self, x, labels=None):
        outputs = super().forward(x, labels)
        if self.training and self.forwards == 2 and dist.is_initialized() and dist.get_rank() == 1:
            outputs["loss"] = outputs["loss"] + math.nan if self.loss_alone else outputs["loss"] * math.nan
        return outputs


class LossNotFiniteOnOneRank(NotFiniteOnOneRank):
    loss_alone = True


class PartlyUsed(Classifier):
    """A weight that process 1 never uses and one that no process does."""

    def __init__(self):
        super().__init__()
        self.once = torch.nn.Parameter(torch.ones(3))
        self.never = torch.nn.Parameter(torch.ones(3))

    def forward(self, x, labels=None):
        outputs = super().forward(x, labels)
        if labels is not None and dist.get_rank() == 0:
            outputs["loss"] = outputs["loss"] + 0.1 * outputs["logits"].mean() * self.once.sum()
        return outputs


class Counting(Classifier):
    """Its loss is a sum over the labels that count, divided by their number in the update batch, as language models' is."""

    def forward(self, x, labels, num_items_in_batch, **kwargs):
        logits = super().forward(x)["logits"]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
        self.count(loss)
        return {"loss": loss, "logits": logits}


class FirstPoints(Dataset):
    """The first `points` of 64 points, and these again from the beginning up to `n`."""

    def __init__(self, points, n):
        self.points, self.n, self.data = points, n, Points(64)

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.data[i % self.points]


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter([FirstPoints(61, self.n)[i] for i in range(self.n)])


def nothing_to_learn_from():
    """Process 1's micro-batches of the first and the third update have no label that counts."""
    points = Points(64)
    points.y[8:16] = points.y[40:48] = -100
    return points


class OfManyLengths(Points):
    """Every point is as long as none of the others. The model does not take `input_ids`, and the Trainer drops it."""

    def __getitem__(self, i):
        return {**super().__getitem__(i), "input_ids": [0] * (1 + 29 * i % 64)}


# name: (model, arguments in two processes); the single-process counterparts stand in test_distributed.py.
SCENARIOS = {
    "xsam": (Classifier, {}),
    "sam": (Classifier, {"alpha": 1.0}),
    "three steps": (Classifier, {"ascent_steps": 3}),
    "accumulation": (Classifier, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    "adamw": (Classifier, {"optim": "adamw_torch", "learning_rate": 0.01, "adam_epsilon": 1e-3}),
    "used": (Classifier, {"ddp_find_unused_parameters": False}),
    "micro": (Classifier, {"ascent_scope": "micro", "alpha": 1.7}),
    "micro accumulation": (
        Classifier,
        {"ascent_scope": "micro", "alpha": 1.7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ),
    "micro search": (Classifier, {"ascent_scope": "micro"}),
    "micro partly used": (
        PartlyUsed,
        {"ascent_scope": "micro", "optim": "adamw_torch", "weight_decay": 0.1, "ddp_find_unused_parameters": True},
    ),
    "vasso": (Classifier, {"perturbation": "vasso", "alpha": 1.7}),
    "stale": (
        Classifier,
        {
            "perturbation": "stale",
            "alpha_search_steps": 3,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
        },
    ),
    "msam+": (Classifier, {"direction": "msam+", "ascent_steps": 2, "gradient_scale": "slope"}),
    "slope_max": (Classifier, {"perturbation": "asam", "gradient_scale": "slope_max"}),
    "every other": (Classifier, {"sharpness_every": 2, "rho_exclude": ["^first.bias$"]}),
    "fraction": (Classifier, {"ascent_fraction": 0.5}),
    "not finite": (NotFiniteOnOneRank, {"alpha": 1.7}),
    "loss not finite": (LossNotFiniteOnOneRank, {"alpha": 1.7}),
    "batch norm": (lambda: Classifier(batch_norm=True), {}),
    "dropout": (lambda: Classifier(dropout=0.3), {}),
    "static graph": (Classifier, {"ddp_static_graph": True, "ddp_find_unused_parameters": False}),
    "padded": (Classifier, {}),
    "unequal batches": (Classifier, {"accelerator_config": {"even_batches": False}}),
    "nothing to learn from": (Counting, {}),
    "micro, nothing to learn from": (Counting, {"ascent_scope": "micro", "alpha": 1.7}),
    "mean of nothing": (Classifier, {"max_steps": 1}),
    "dispatched stream": (Classifier, {"max_steps": 8}),
    "sharded stream": (Classifier, {"max_steps": 8, "accelerator_config": {"dispatch_batches": False}}),
    "dispatched": (Classifier, {"accelerator_config": {"dispatch_batches": True}}),
    "split": (Classifier, {"per_device_train_batch_size": 16, "accelerator_config": {"split_batches": True}}),
    "grouped by length": (Classifier, {"train_sampling_strategy": "group_by_length"}),
    "rebalanced": (Counting, {"train_sampling_strategy": "batch_rebalance"}),
}
# name: the data in two processes, if not 64 points.
DATA = {
    "padded": lambda: FirstPoints(61, 61),
    "unequal batches": lambda: FirstPoints(61, 61),
    "nothing to learn from": nothing_to_learn_from,
    "micro, nothing to learn from": nothing_to_learn_from,
    "mean of nothing": nothing_to_learn_from,
    "dispatched stream": lambda: Stream(61),
    "sharded stream": lambda: Stream(61),
    "grouped by length": lambda: OfManyLengths(64),
    "rebalanced": lambda: OfManyLengths(64),
}


def data(name):
    return DATA.get(name, lambda: Points(64))()


def run(directory, name, trainer=XSAMTrainer, **changes):
    model, settings = SCENARIOS[name]
    settings = {**COMMON, **settings, **changes}
    if trainer is Trainer:
        settings = {key: value for key, value in settings.items() if key == "train_sampling_strategy"}
    return train(directory / name, model(), data(name), trainer=trainer, **settings)


def result(trainer):
    keys = ("xsam/alpha", "xsam/sharpness", "xsam/grad_norm_last", "xsam/fallbacks", "loss")
    history = {key: [e[key] for e in trainer.state.log_history if key in e] for key in keys}
    passes = (trainer.model.forwards, trainer.model.backwards)
    return {
        "weights": weights_of(trainer),
        "history": history,
        "passes": passes,
        "alpha": trainer._xsam_callback.xsam.alpha,
    }


def main(directory):
    results = {name: result(run(directory, name)) for name in SCENARIOS}

    # The random stream of every process ends where the plain Trainer's does.
    streams = []
    for kind in (Trainer, XSAMTrainer):
        torch.manual_seed(7)
        run(directory / kind.__name__, "dropout", trainer=kind)
        streams.append(torch.rand(3))
    results["streams"] = streams

    saved = run(directory / "saved", "dropout", save_strategy="steps", save_steps=1)
    checkpoint = str(directory / "saved" / "dropout" / "checkpoint-3")
    resumed = run(directory / "resumed", "dropout", resume=checkpoint)
    results["resume"] = (weights_of(saved), weights_of(resumed))

    torch.save(results, directory / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # see conftest.py
    main(Path(sys.argv[1]))
