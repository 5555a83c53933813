"""
Which operations XSAM's arithmetic on GPT-2's 124 million weights spends its time in: one update whose passes cost nothing.

    scripts/run profile_arithmetic     # results/profile-124m.json, and a table
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from scripts.benchmark import copy_bandwidth, gpt2
from scripts.table import to_markdown
from tasks.command import Parser, run
from tasks.files import write_whole
from xsam_hf import XSAMArguments, XSAMState, xsam_gradient


ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str]) -> None:
    Parser(description=__doc__).parse_args(argv)
    torch.set_num_threads(1)
    model, _ = gpt2(1, 1)
    weights = list(model.parameters())
    gradients = [[torch.randn_like(weight) for weight in weights] for _ in range(2)]
    state, arguments = XSAMState(search_due=False), XSAMArguments(alpha=1.5)

    def update() -> None:
        prepared = [[part.clone() for part in gradient] for gradient in gradients]

        def gradient() -> torch.Tensor:
            for weight, part in zip(weights, prepared.pop(), strict=True):
                weight.grad = part
            return torch.tensor(1.0)

        with profile(activities=[ProfilerActivity.CPU]) as seen:
            xsam_gradient(model, gradient, lambda: torch.tensor(1.0), arguments, state)
        update.seen = seen
        model.zero_grad()

    for _ in range(3):  # the last one counts
        update()
    events = sorted(update.seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    rows = {event.key: {"ms": event.self_cpu_time_total / 1000, "calls": event.count} for event in events[:12]}
    result = {
        "parameters": sum(weight.numel() for weight in weights),
        "threads": 1,
        "copied_bytes_per_second": copy_bandwidth(),
        "versions": {"torch": version("torch")},
        "all_ms": sum(event.self_cpu_time_total for event in events) / 1000,
        "operations": rows,
    }
    write_whole(ROOT / "results" / "profile-124m.json", json.dumps(result, indent=1) + "\n")
    cells = [[name, f"{row['ms']:.0f}", str(row["calls"])] for name, row in rows.items()]
    print(to_markdown([["operation", "ms", "calls"], *cells, ["all", f"{result['all_ms']:.0f}", ""]]))


if __name__ == "__main__":
    run(main)
