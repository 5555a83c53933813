#!/usr/bin/env python
"""
Times one update of the plain Trainer, of XSAMTrainer, and of another library's SAM, interleaved in one process.

    scripts/benchmark --configuration vit-ti --steps 12 --threads 1

Every round makes one update with each of them, on the same batch, so that whatever slows the machine down slows all of them;
what is reported is the median over the rounds, and the median of each round's ratio to the plain Trainer. The first rounds are
left out. Writes results/benchmark-CONFIGURATION.json. `pytorch_optimizer` is timed where it is installed.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from tasks.image_classification import models  # noqa: E402
from tasks.translation.model import build as build_translation  # noqa: E402
from xsam_hf import XSAMTrainer, XSAMTrainingArguments  # noqa: E402


METHODS = {
    "plain": {"rho": None},
    "rho=0": {"rho": 0.0},
    "sam": {"rho": 0.05, "alpha": 1.0},
    "xsam, alpha kept": {"rho": 0.05, "alpha": 1.5},
    "xsam, search": {"rho": 0.05, "alpha_search_steps": 1},
}


def vit(name: str, dataset: str, batch: int):
    model = models.build(name, dataset)
    size, channels = model.config.image_size, model.config.num_channels
    labels = torch.randint(model.config.num_labels, (batch,))
    return model, {"pixel_values": torch.randn(batch, channels, size, size), "labels": labels}


def gpt2(batch: int, length: int):
    model = GPT2LMHeadModel(GPT2Config(use_cache=False))
    ids = torch.randint(model.config.vocab_size, (batch, length))
    return model, {"input_ids": ids, "labels": ids.clone()}


def translation(batch: int, length: int):
    model = build_translation("transformer-small", 2000, 2000, dropout=0.1)
    ids = torch.randint(4, 2000, (batch, length))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids, "labels": ids}


# The last one has so few tokens for its 124 million weights that arithmetic on the weights is what takes the time.
CONFIGURATIONS = {
    "vit-ti": lambda: vit("vit-ti", "cifar100", 32),
    "vit-small": lambda: vit("vit-small", "digits", 64),
    "translation-small": lambda: translation(32, 24),
    "gpt2-124m": lambda: gpt2(2, 16),
}


class TrainerStep:
    """The Trainer's own loop without its data loading: one update a call."""

    def __init__(self, name: str, model: nn.Module, batch: dict, folder: str):
        settings = dict(
            output_dir=f"{folder}/{name}", use_cpu=True, report_to="none", max_grad_norm=0, learning_rate=1e-4,
            optim="adamw_torch", disable_tqdm=True, max_steps=10**6,
        )  # fmt: skip
        method = {key: value for key, value in METHODS[name].items() if value is not None}
        if method:
            self.trainer = XSAMTrainer(model=model, args=XSAMTrainingArguments(**settings, **method))
        else:
            self.trainer = Trainer(model=model, args=TrainingArguments(**settings))
        self.trainer.create_optimizer_and_scheduler(10**6)
        self.trainer.state.max_steps = 10**6
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.accelerator.gradient_state._set_sync_gradients(True)
        self.model, self.batch = model, batch

    def __call__(self) -> None:
        self.trainer.training_step(self.model, dict(self.batch), None)
        self.trainer.optimizer.step()
        self.model.zero_grad()
        self.trainer.state.global_step += 1


class PeerStep:
    """pytorch_optimizer's SAM around AdamW, in the loop that its documentation shows."""

    def __init__(self, model: nn.Module, batch: dict):
        from pytorch_optimizer import SAM

        self.model, self.batch = model.train(), batch
        self.optimizer = SAM(model.parameters(), base_optimizer=torch.optim.AdamW, rho=0.05, lr=1e-4)

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.first_step(zero_grad=True)
        self.model(**self.batch).loss.backward()
        self.optimizer.second_step(zero_grad=True)


class AdamWStep:
    """AdamW's own step on gradients that are there already: what arithmetic on the weights costs anyway."""

    def __init__(self, model: nn.Module, batch: dict):
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        model(**batch).loss.backward()

    def __call__(self) -> None:
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configuration", required=True, choices=CONFIGURATIONS)
    parser.add_argument("--steps", type=int, default=12, help="rounds that count")
    parser.add_argument("--warm_up", type=int, default=3, help="rounds before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def fresh():
        torch.manual_seed(0)
        return CONFIGURATIONS[args.configuration]()

    with tempfile.TemporaryDirectory() as folder:
        steps = {name: TrainerStep(name, *fresh(), folder) for name in args.methods}
        steps["AdamW's step alone"] = AdamWStep(*fresh())
        try:
            steps["pytorch_optimizer SAM"] = PeerStep(*fresh())
        except ImportError:
            print("pytorch_optimizer is not installed, and so not timed.")
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(args.warm_up + args.steps):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if round_ >= args.warm_up:
                    seconds[name].append(time.perf_counter() - start)

    model, _ = fresh()
    plain = seconds[args.methods[0]]
    rows = {
        name: {
            "median_seconds": statistics.median(times),
            "median_ratio": statistics.median(t / p for t, p in zip(times, plain, strict=True)),
            "seconds": times,
        }
        for name, times in seconds.items()
    }
    packages = ["torch", "transformers", "accelerate"]
    if "pytorch_optimizer SAM" in rows:
        packages.append("pytorch_optimizer")
    result = {
        "configuration": args.configuration,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "threads": args.threads,
        "machine": platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "rows": rows,
    }
    path = ROOT / "results" / f"benchmark-{args.configuration}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"| {args.configuration} | ms | to {args.methods[0]} |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {1000 * row['median_seconds']:.1f} | {row['median_ratio']:.2f} |")


if __name__ == "__main__":
    main()
