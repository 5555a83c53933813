"""
Times one update of the plain Trainer, of XSAMTrainer, and of another library's SAM, interleaved in one process.

    scripts/run benchmark --configuration vit-ti --steps 12 --threads 1

Every round makes one update with each of them, on the same batch and in another order, so that whatever slows the machine down
slows all of them; what is reported is the median over the rounds, and the median of each round's ratio to the plain Trainer. The
first rounds are left out. "own" is what XSAM takes outside of the passes: arithmetic on the weights, random-number states, bookkeeping. Writes
results/benchmark-CONFIGURATION.json. The peers, `pytorch_optimizer` and Composer (`mosaicml`), are timed where they are installed.

Under `torchrun` every process trains with DDP, and the first one reports.
"""

import json
import os
import platform
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from scripts.table import to_markdown
from tasks.command import Parser, run, sentence
from tasks.files import write_whole
from tasks.image_classification import models
from tasks.translation.model import build as build_translation
from xsam_hf import XSAMMixin, XSAMTrainingArguments


ROOT = Path(__file__).resolve().parent.parent

METHODS = {
    "plain": {"rho": None},
    "rho=0": {"rho": 0.0},
    "sam": {"rho": 0.05, "alpha": 1.0},
    "xsam, alpha kept": {"rho": 0.05, "alpha": 1.5},
    "xsam, search": {"rho": 0.05, "alpha_search_steps": 1},
}


def image_model(name: str, dataset: str, batch: int):
    model = models.build(name, dataset)
    size, channels = model.config.image_size, model.config.num_channels
    labels = torch.randint(model.config.num_labels, (batch,))
    return model, {"pixel_values": torch.randn(batch, channels, size, size), "labels": labels}


def gpt2(batch: int, length: int, **size):
    model = GPT2LMHeadModel(GPT2Config(use_cache=False, bos_token_id=0, eos_token_id=0, **size))
    ids = torch.randint(model.config.vocab_size, (batch, length))
    return model, {"input_ids": ids, "labels": ids.clone()}


def translation(batch: int, length: int):
    model = build_translation("transformer-small", 2000, 2000, dropout=0.1)
    ids = torch.randint(4, 2000, (batch, length))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids, "labels": ids}


# The CNNs of the XSAM paper, and the images of a batch: few, but enough to compare updates by.
CNNS = {"vgg-11-mlp": 8, "resnet-18": 8, "densenet-121": 4}

# GPT-2's have few tokens for their weights, so that arithmetic on the weights is what takes the time.
CONFIGURATIONS = {
    "vit-ti": lambda: image_model("vit-ti", "cifar100", 32),
    "vit-small": lambda: image_model("vit-small", "digits", 64),
    **{name: partial(image_model, name, "cifar10", images) for name, images in CNNS.items()},
    "translation-small": lambda: translation(32, 24),
    "gpt2-1m": lambda: gpt2(2, 16, n_embd=128, n_layer=4, n_head=4, vocab_size=2000),
    "gpt2-10m": lambda: gpt2(2, 16, n_embd=384, n_layer=5, n_head=6, vocab_size=2000),
    "gpt2-40m": lambda: gpt2(2, 16, n_embd=640, n_layer=8, n_head=10, vocab_size=2000),
    "gpt2-124m": lambda: gpt2(2, 16),
}


class TimedTrainer(Trainer):
    """Times its passes."""

    in_passes = 0.0

    def training_step(self, *args, **kwargs):
        start = time.perf_counter()
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self.in_passes += time.perf_counter() - start


class TimedXSAMTrainer(XSAMMixin, TimedTrainer):
    """XSAMTrainer, whose own part is what is left."""


class TrainerStep:
    """The Trainer's own loop without its data loading: one update a call. On a CPU, if `others` of its arguments do not say else."""

    def __init__(self, name: str, model: nn.Module, batch: dict, folder: str, accumulation: int, **others):
        settings = dict(
            output_dir=f"{folder}/{name}", use_cpu=True, report_to="none", max_grad_norm=0, learning_rate=1e-4,
            optim="adamw_torch", disable_tqdm=True, max_steps=10**6,
        ) | others  # fmt: skip
        method = {key: value for key, value in METHODS[name].items() if value is not None}
        if method:
            self.trainer = TimedXSAMTrainer(model=model, args=XSAMTrainingArguments(**settings, **method))
        else:
            self.trainer = TimedTrainer(model=model, args=TrainingArguments(**settings))
        self.trainer.create_optimizer_and_scheduler(10**6)
        self.trainer.state.max_steps = 10**6
        self.trainer.current_gradient_accumulation_steps = accumulation
        self.model = self.trainer.accelerator.prepare_model(model)
        self.batch = batch
        self.own: list[float] = []

    def __call__(self) -> None:
        accelerator, accumulation = self.trainer.accelerator, self.trainer.current_gradient_accumulation_steps
        self.trainer.in_passes, start = 0.0, time.perf_counter()
        for i in range(accumulation):
            last = i == accumulation - 1
            accelerator.gradient_state._set_sync_gradients(last)
            with nullcontext() if last else accelerator.no_sync(self.model):
                self.trainer.training_step(self.model, dict(self.batch), None)
        self.own.append(time.perf_counter() - start - self.trainer.in_passes)
        self.trainer.optimizer.step()
        self.model.zero_grad()
        self.trainer.state.global_step += 1


class PytorchOptimizerStep:
    """pytorch_optimizer's SAM around AdamW, in the loop that its documentation shows."""

    package = "pytorch_optimizer"

    def __init__(self, model: nn.Module, batch: dict):
        from pytorch_optimizer import SAM

        self.model, self.batch = model.train(), batch
        self.optimizer = SAM(model.parameters(), base_optimizer=torch.optim.AdamW, rho=0.05, lr=1e-4)

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.first_step(zero_grad=True)
        self.model(**self.batch).loss.backward()
        self.optimizer.second_step(zero_grad=True)


class ComposerStep:
    """Composer's SAM around AdamW, with the closure that its trainer would give it."""

    package = "mosaicml"

    def __init__(self, model: nn.Module, batch: dict):
        from composer.algorithms.sam import SAMOptimizer

        self.model, self.batch = model.train(), batch
        self.optimizer = SAMOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-4), rho=0.05)

    def __call__(self) -> None:
        def closure(**kwargs):
            self.model.zero_grad()
            loss = self.model(**self.batch).loss
            loss.backward()
            return loss

        self.optimizer.step(closure)


class AdamWStep:
    """AdamW's own step on gradients that are there already: what arithmetic on the weights costs anyway."""

    def __init__(self, model: nn.Module, batch: dict):
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        model(**batch).loss.backward()

    def __call__(self) -> None:
        self.optimizer.step()


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--configuration", choices=CONFIGURATIONS)
    parser.add_argument("--steps", type=int, default=12, help="rounds that count")
    parser.add_argument("--warm_up", type=int, default=3, help="rounds before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of an update; the peer has one")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--output", type=Path, help="default: results/benchmark-CONFIGURATION.json")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="time nothing: the table of such files")
    args = parser.parse_args(argv)
    if args.table:
        return print(table([load(path) for path in args.table]))
    if args.configuration is None:
        parser.error("give a --configuration, or files for a --table")
    for name in ("steps", "threads", "accumulation"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} starts at 1")
    if args.warm_up < 0:
        parser.error("--warm_up starts at 0")
    torch.set_num_threads(args.threads)
    processes = int(os.environ.get("WORLD_SIZE", 1))

    def fresh():
        torch.manual_seed(0)
        return CONFIGURATIONS[args.configuration]()

    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: TrainerStep(name, *fresh(), folder, args.accumulation) for name in args.methods}
        steps: dict[str, Callable[[], None]] = {**trainers, "AdamW's step alone": AdamWStep(*fresh())}
        if args.accumulation == processes == 1:
            for peer in (PytorchOptimizerStep, ComposerStep):
                try:
                    steps[f"{peer.package} SAM"] = peer(*fresh())
                except ImportError:
                    print(f"{peer.package} is not installed, and so not timed.")
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        faults: dict[str, list[int]] = {name: [] for name in steps}
        for round_ in range(args.warm_up + args.steps):
            # What one leaves in the caches and in the allocator is the next one's.
            for name in random.Random(round_).sample([*steps], len(steps)):
                pages, start = _page_faults(), time.perf_counter()
                steps[name]()
                if round_ >= args.warm_up:
                    seconds[name].append(time.perf_counter() - start)
                    faults[name].append(_page_faults() - pages)

    if int(os.environ.get("RANK", 0)) > 0:
        return
    plain = seconds[args.methods[0]]
    rows = {
        name: {
            "median_seconds": statistics.median(times),
            "median_ratio": statistics.median(t / p for t, p in zip(times, plain, strict=True)),
            # Memory that the allocator gave back to the kernel, and that comes back page by page.
            "median_page_faults": statistics.median(faults[name]),
            "seconds": times,
        }
        for name, times in seconds.items()
    }
    for name in set(args.methods) - {"plain", "rho=0"}:  # whose passes are the Trainer's own
        rows[name]["median_own_seconds"] = statistics.median(trainers[name].own[args.warm_up :])
    packages = ["torch", "transformers", "accelerate"]
    packages += [peer.package for peer in (PytorchOptimizerStep, ComposerStep) if f"{peer.package} SAM" in rows]
    result = {
        "configuration": args.configuration,
        "parameters": sum(p.numel() for p in fresh()[0].parameters() if p.requires_grad),
        "threads": args.threads,
        "processes": processes,
        "accumulation": args.accumulation,
        "copied_bytes_per_second": copy_bandwidth(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "rows": rows,
    }
    path = args.output or ROOT / "results" / f"benchmark-{args.configuration}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1) + "\n")
    print(table([result]))


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def load(path: Path) -> dict:
    """
    A file that this script wrote.

    Raises:
        `ValueError`: it is none.
    """
    try:
        result = json.loads(path.read_bytes())
        table([result])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a benchmark's result: {sentence(error)}.") from error
    return result


def table(results: list[dict]) -> str:
    """A row for each method and two columns for each configuration: milliseconds, and the ratio to the first method."""
    names = [name for name in results[0]["rows"] if all(name in result["rows"] for result in results)]
    cells = [["", *(f"{r['configuration']}, {r['parameters'] / 1e6:.1f}M" for r in results)]]
    for name in names:
        rows = [result["rows"][name] for result in results]
        cells.append([name, *(f"{1000 * row['median_seconds']:.1f} ms, {row['median_ratio']:.2f}" for row in rows)])
        if "median_own_seconds" in rows[0]:
            cells.append(["– of it own", *(f"{1000 * row['median_own_seconds']:.1f} ms" for row in rows)])
    return to_markdown(cells)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy too large for any cache: the floor of arithmetic on the weights."""
    source = torch.randn(30_000_000)
    target, times = torch.empty_like(source), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / statistics.median(times)


if __name__ == "__main__":
    run(main)
