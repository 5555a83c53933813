"""
What only a GPU can tell about XSAM, checked on the one that is here: numbers, waits, kernels, memory, speed.

    scripts/run gpu_check                  # at most ten minutes, no network; results/gpu-check-cuda.json, and a table
    scripts/run gpu_check --device cpu     # what a CPU can tell, under a minute

Models and data are made in memory. Every check runs in a process of its own and has a limit of time, so that none of them ends
the others. Lines come as JSON while they are found; the table at the end has them all, each with the figure that is expected, and the
file is written anew after every line. The status is 1 if a line failed or raised. What several GPUs or more memory would be
needed for is skipped.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from scripts.checks import Check, Line, run_checks, table
from scripts.gpu_launches import kernels_of_an_update, waits_for_the_device
from scripts.gpu_numbers import agreement_with_float64_on_a_cpu, rounding_at_random, tf32, weights_come_back
from scripts.gpu_speed import images, memory, own_time, speed_of_a_small_vit, speed_of_gpt2, speed_of_vit_large
from scripts.gpu_training import (
    compiled,
    half_precision,
    one_nccl_process,
    refusals,
    repeated_and_resumed_runs,
    the_same_dropout_in_every_pass,
    two_gloo_processes,
    two_gpus,
)
from tasks.command import Parser, run, sentence
from tasks.files import write_whole
from tasks.results import git_commit


ROOT = Path(__file__).resolve().parent.parent

CHECKS = [
    agreement_with_float64_on_a_cpu,
    tf32,
    weights_come_back,
    rounding_at_random,
    half_precision,
    the_same_dropout_in_every_pass,
    refusals,
    waits_for_the_device,
    kernels_of_an_update,
    memory,
    own_time,
    speed_of_a_small_vit,
    speed_of_gpt2,
    speed_of_vit_large,
    images,
    repeated_and_resumed_runs,
    two_gloo_processes,
    one_nccl_process,
    two_gpus,
    compiled,
]


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--checks", nargs="+", metavar="NAME", help="only these, as the table names them, with _ for spaces"
    )
    parser.add_argument("--output", type=Path, help="default: results/gpu-check-DEVICE.json")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no check begins or goes on")
    args = parser.parse_args(argv)
    known: dict[str, Check] = {check.__name__: check for check in CHECKS}
    for name in args.checks or ():
        if name not in known:
            parser.error(f"there is no check {name}; there are {', '.join(known)}")
    # A process that has asked the driver cannot be forked; this asks the management library.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch finds no CUDA device here: run it where one is, or with `--device cpu`.")
    path = args.output or ROOT / "results" / f"gpu-check-{args.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    gc.freeze()  # every training ends with a garbage collection, and what the imports have made takes it a third of a second
    lines: list[Line] = []

    def keep(facts: dict[str, Any]) -> None:
        result = {
            "device": args.device,
            **facts,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, **{p: version(p) for p in ("transformers", "accelerate")}},
            "git_commit": git_commit(),
            "seconds": round(time.monotonic() - begun, 1),
            "lines": [line.as_json() for line in lines],
        }  # fmt: skip
        write_whole(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")

    chosen = [known[name] for name in args.checks] if args.checks else CHECKS
    facts = _describe() if args.device == "cuda" else {}
    all_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    for check in chosen:
        if check is two_gpus and all_gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = all_gpus
        elif check is two_gpus:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:  # the Trainer would use all that it sees
            os.environ["CUDA_VISIBLE_DEVICES"] = (all_gpus or "0").split(",")[0]
        for line in run_checks([check], args.device, 150, begun + 60 * args.minutes):
            lines.append(line)
            print(json.dumps(line.as_json(), ensure_ascii=False), flush=True)
            keep(facts)
    print(f"\n{table(lines)}\n")
    counts = {
        status: sum(line.status == status for line in lines)
        for status in ("ok", "told", "skipped", "failed", "raised")
    }
    print(
        ", ".join(f"{n} {status}" for status, n in counts.items() if n), f"in {time.monotonic() - begun:.0f} s; {path}"
    )
    if counts["failed"] or counts["raised"]:
        sys.exit(1)


def _describe() -> dict[str, Any]:
    """
    The GPU's facts, asked for in another process; sets how processes are started here: the fast way, if CUDA works after it.

    Raises:
        `ValueError`: CUDA does not work.
    """
    for start in ("fork", "spawn"):
        multiprocessing.set_start_method(start, force=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start)) as pool:
            try:
                return pool.submit(_facts).result(timeout=120)
            except Exception as caught:
                error = caught
    raise ValueError(f"CUDA does not work here: {sentence(error)}.")


def _facts() -> dict[str, Any]:
    torch.zeros(1, device="cuda")
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    run(main)
