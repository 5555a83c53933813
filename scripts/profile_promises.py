"""
What each of XSAMTrainer's promises takes of an update, outside of the passes.

    scripts/run profile_promises     # results/profile-promises.json, and a table

Processor time of one update of `vit-small`, its passes left out. The functions that keep a promise are timed where they are called.
"""

import functools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from scripts import benchmark
from scripts.table import to_markdown
from tasks.command import Parser, run
from tasks.files import write_whole
from xsam_hf import direction, module_state, pass_state, weights
from xsam_hf.trainer import micro_batch, replay, trainer


ROOT = Path(__file__).resolve().parent.parent
UPDATES = 60

# What is timed, and the promise that it keeps. None is called inside another one.
PROMISES = {
    "the weights come back bit for bit: copied, written back": [(weights, "copy_")],
    "norms of the gradients, and the step": [
        (direction.Trail, "add"),
        (weights.MovableWeights, "climb"),
        (weights.MovableWeights, "gradients"),
    ],
    "every pass draws the same random numbers": [
        (pass_state.RandomState, "capture"),
        (pass_state.RandomState, "restore"),
    ],
    "every pass finds the same buffers, teachers and attributes": [
        (module_state.StateFollower, "capture"),
        (module_state.StateFollower, "learn"),
        (module_state.ModuleState, "restore"),
    ],
    "every pass gets the same batch": [(replay, "copy_of"), (micro_batch, "copy_of")],
    "only what the optimizer steps is moved": [
        (trainer.XSAMMixin, "_xsam_weights"),
        (weights.MovableWeights, "__init__"),
    ],
    "the arc: θ_k − θ_0, its norm, the angle, Eq. 6 and 8": [
        (direction.Arc, "coefficients"),
        (direction.Arc, "combine"),
    ],
}


def main(argv: Sequence[str]) -> None:
    Parser(description=__doc__).parse_args(argv)
    torch.set_num_threads(1)
    taken: Counter[str] = Counter()
    inside: list[str] = []

    def timed(promise, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if inside:  # of another one, which counts it
                return function(*args, **kwargs)
            inside.append(promise)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                taken[promise] += time.process_time() - start
                inside.pop()

        return call

    for promise, functions in PROMISES.items():
        for owner, name in functions:
            function = vars(owner)[name]
            if isinstance(function, classmethod):
                setattr(owner, name, classmethod(timed(promise, function.__func__)))
            else:
                setattr(owner, name, timed(promise, function))
    benchmark.time.perf_counter = time.process_time
    result = {"threads": 1, "versions": {"torch": version("torch")}, "updates": UPDATES, "milliseconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        for method in ("plain", "sam", "xsam, alpha kept"):
            torch.manual_seed(0)
            step = benchmark.TrainerStep(method, *benchmark.CONFIGURATIONS["vit-small"](), folder, 1)
            for _ in range(10):
                step()
            taken.clear()
            step.own.clear()
            start = time.process_time()
            for _ in range(UPDATES):
                step()
            row = {"update": time.process_time() - start}
            if method != "plain":
                own = sum(step.own)
                row |= taken | {"the rest of our own": own - sum(taken.values()), "all of our own": own}
            result["milliseconds"][method] = {name: 1000 * seconds / UPDATES for name, seconds in row.items()}
    write_whole(ROOT / "results" / "profile-promises.json", json.dumps(result, indent=1) + "\n")
    rows = result["milliseconds"]
    names = [*PROMISES, "the rest of our own", "all of our own", "update"]
    cells = [[name, *(f"{row[name]:.2f}" if name in row else "" for row in rows.values())] for name in names]
    print(to_markdown([["ms of an update", *rows], *cells]))


if __name__ == "__main__":
    run(main)
