"""
How XSAM's own cost of an update grows with weights, processes and accumulation: `benchmark`, over and over.

    scripts/run growth              # results/growth.json, docs/growth.svg, and a table
    scripts/run growth --draw       # the figure and the table again, from the file

Run it on a machine that does nothing else. Two processes take one thread each, as one does.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.table import to_markdown
from tasks.command import Parser, run
from tasks.files import write_whole
from xsam_hf.analysis import svg


ROOT = Path(__file__).resolve().parent.parent
RESULT, FIGURE = ROOT / "results" / "growth.json", ROOT / "docs" / "growth.svg"
SIZES = ["gpt2-1m", "gpt2-10m", "gpt2-40m", "gpt2-124m"]
# (configuration, processes, accumulation)
POINTS = [
    *((size, 1, 1) for size in SIZES),
    *((size, 2, 1) for size in SIZES),
    *((size, 1, accumulation) for size in SIZES[:2] for accumulation in (4, 16)),
]


def measure(configuration: str, processes: int, accumulation: int, steps: int) -> dict:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "result.json")
        command = [
            sys.executable, *(launcher if processes > 1 else []), "-m", "scripts.benchmark",
            *("--configuration", configuration, "--accumulation", str(accumulation), "--steps", str(steps)),
            *("--methods", "plain", "sam", "xsam, alpha kept", "--output", str(output)),
        ]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return json.loads(output.read_text())


def cells(results: list[dict]) -> list[list[str]]:
    """A row for each point: SAM's update and what of it is our own, against the plain Trainer's and AdamW's step."""
    rows = [["weights", "processes", "accumulation", "plain ms", "SAM to plain", "kept α to SAM", "own ms", "own share", "AdamW's step ms"]]  # fmt: skip
    for result in results:
        plain, sam, kept = (result["rows"][name] for name in ("plain", "sam", "xsam, alpha kept"))
        adamw = result["rows"]["AdamW's step alone"]["median_seconds"]
        rows.append(
            [
                f"{result['parameters'] / 1e6:.1f}M",
                str(result["processes"]),
                str(result["accumulation"]),
                f"{1000 * plain['median_seconds']:.1f}",
                f"{sam['median_ratio']:.2f}",
                f"{kept['median_ratio'] / sam['median_ratio']:.2f}",
                f"{1000 * sam['median_own_seconds']:.1f}",
                f"{sam['median_own_seconds'] / sam['median_seconds']:.0%}",
                f"{1000 * adamw:.1f}",
            ]
        )
    return rows


def draw(results: list[dict]) -> None:
    figure, (left, right) = svg.make(2, figsize=(10, 4))
    for processes, marker in ((1, "o-"), (2, "s--")):
        points = [r for r in results if r["processes"] == processes and r["accumulation"] == 1]
        sizes = [r["parameters"] for r in points]
        label = f"{processes} process{'es' * (processes > 1)}"
        own = [1000 * r["rows"]["sam"]["median_own_seconds"] for r in points]
        left.loglog(sizes, own, marker, label=f"SAM's own, {label}")
    points = [r for r in results if (r["processes"], r["accumulation"]) == (1, 1)]
    adamw = [1000 * r["rows"]["AdamW's step alone"]["median_seconds"] for r in points]
    left.loglog([r["parameters"] for r in points], adamw, "k:", label="AdamW's step")
    left.set(xlabel="weights", ylabel="ms an update", title="outside of the passes")
    left.legend()
    for size in SIZES[:2]:
        points = [r for r in results if r["configuration"] == size and r["processes"] == 1]
        shares = [100 * r["rows"]["sam"]["median_own_seconds"] / r["rows"]["sam"]["median_seconds"] for r in points]
        right.plot([r["accumulation"] for r in points], shares, "o-", label=size)
    right.set(xlabel="micro-batches an update", ylabel="% of SAM's update", title="share outside of the passes")
    right.set_xscale("log", base=2)
    right.set_ylim(bottom=0)
    right.legend()
    svg.save(figure, FIGURE)


def main(argv: Sequence[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10, help="rounds that count, at each point")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args(argv)
    if not args.draw:
        results = [measure(*point, args.steps) for point in POINTS]
        write_whole(RESULT, json.dumps(results, indent=1) + "\n")
    results = json.loads(RESULT.read_text(encoding="utf-8"))
    draw(results)
    print(to_markdown(cells(results)))


if __name__ == "__main__":
    run(main)
