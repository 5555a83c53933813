"""
How far apart bfloat16 trainings end that differ in the order of their sums alone: plain ones, SAM's and XSAM's.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/reduction_orders.py results/reduction-orders.json
    ... python tests/reduction_orders.py results/reduction-orders-alone.json --alone --methods plain XSAM --seeds 10 --orders 2

Each of `orders` trainings deals the examples of every update out to processes and micro-batches in another order, so that all
have the same gradient but for rounding. Spread: the root of the mean square distance of two of them over the distance moved. Each
of `seeds` draws another model and other data, and gives one ratio of a method's spread to the plain one; from these the interval.
Under ZeRO-2 in two processes, or `alone` in one without DeepSpeed (autocast, weights in float32).
"""

import argparse
import itertools
import json
import math
import tempfile
from pathlib import Path
from statistics import fmean, stdev

import torch
from deepspeed_worker import BF16, flat, main, result, run
from processes import in_ranks
from scipy.stats import t as student
from torch.utils.data import Dataset
from toys import Tokens, tiny_gpt2
from transformers import GPT2LMHeadModel


METHODS = {"plain": {"rho": 0.0}, "SAM": {"alpha": 1.0}, "XSAM": {"alpha": 1.5}}
UPDATE = 16  # examples


class Dealt(Dataset):
    """The sentences of `Tokens` that a seed picks, those of one update in the order that `order` says."""

    def __init__(self, seed, order, n=64):
        generator = torch.Generator().manual_seed(order)
        each = [torch.randperm(UPDATE, generator=generator) + start for start in range(0, n, UPDATE)]
        self.which, self.tokens = (torch.cat(each) + 1000 * seed).tolist(), Tokens()

    def __len__(self):
        return len(self.which)

    def __getitem__(self, i):
        return self.tokens[self.which[i]]


def model(seed):
    """Of weights that bfloat16 has, as DeepSpeed rounds the model before it copies the float32 weights from it."""
    config = tiny_gpt2(layers=1).config
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config).bfloat16().float()


def trained(directory, args):
    """The float32 weights at which each training ends."""
    found = {}
    for name, seed, order in itertools.product(args.methods, range(args.seeds), range(args.orders)):
        settings = {**BF16, **METHODS[name], "stage": None if args.alone else 2, "max_grad_norm": 0.0}
        trainer = run(directory, "run", model=model(seed), data=Dealt(seed, order), **settings)
        found[name, seed, order] = result(trainer)["weights"].float()
    return found


def spread(ends, start):
    pairs = [(one - other).norm().square().item() for one, other in itertools.combinations(ends, 2)]
    return math.sqrt(fmean(pairs)) / fmean((end - start).norm().item() for end in ends)


def compared(spreads, others):
    """The geometric mean of their ratios, and its 95 % interval by Student's t."""
    logs = [math.log(a / b) for a, b in zip(spreads, others, strict=True)]
    margin = student.ppf(0.975, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return [math.exp(fmean(logs) + sign * margin) for sign in (0, -1, 1)]


def command():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--orders", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.alone:
            ends = trained(folder, args)
        else:
            ended = in_ranks(lambda rank, report: main(rank, folder, lambda place: trained(place, args)), seconds=7200)
            assert ended == [(0, "")] * 2, ended
            ends = torch.load(folder / "rank0.pt")
    found = {
        name: [
            spread([ends[name, seed, order] for order in range(args.orders)], flat(model(seed).parameters()))
            for seed in range(args.seeds)
        ]
        for name in args.methods
    }
    ratios = {f"{name} / plain": compared(found[name], found["plain"]) for name in args.methods if name != "plain"}
    written = {"orders": args.orders, "spread": found, "ratio, 95 % interval": ratios}
    args.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    command()
