"""
What XSAM costs as a multiple of SAM, by model: table 1 of the paper, by arithmetic from timed updates.

Both make the same passes. XSAM does more arithmetic on the weights, which takes as long for a small batch as for a large one, and a search
for α once an epoch, whose passes are over the batch as SAM's are.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from scripts.benchmark import CNNS, load
from scripts.paper import numbers
from scripts.run_seeds import ROOT
from scripts.table import to_markdown


UPDATES, BATCH = 400, 125  # of an epoch of CIFAR, and the images of each
SAM, KEPT, SEARCH = "sam", "xsam, alpha kept", "xsam, search"


@dataclass(frozen=True)
class Costs:
    """
    Of XSAM, in updates of SAM.

    Args:
        kept (`list[float]`): an update that keeps α, of each round, as it was timed.
        own (`float`): what XSAM's arithmetic takes longer than SAM's, as it was timed.
        search (`float`): a search.
        batch (`int`): images of a timed update.
    """

    kept: list[float]
    own: float
    search: float
    batch: int

    def epoch(self, updates: int = UPDATES, batch: int = BATCH) -> float:
        """An epoch, as a multiple of SAM's."""
        return 1 + self.own * self.batch / batch + self.search / updates


def costs(rows: dict, batch: int) -> Costs:
    """From what the benchmark found: medians over its rounds."""
    sam, kept, search = (rows[name]["seconds"] for name in (SAM, KEPT, SEARCH))
    return Costs(
        [k / s for s, k in zip(sam, kept, strict=True)],
        (rows[KEPT]["median_own_seconds"] - rows[SAM]["median_own_seconds"]) / rows[SAM]["median_seconds"],
        statistics.median((x - k) / s for s, k, x in zip(sam, kept, search, strict=True)),
        batch,
    )


def section() -> str:
    """A line for each model that was timed; empty if none was."""
    lines = [
        [
            "model",
            "images",
            "α kept",
            "of it more arithmetic",
            "a search",
            f"epoch of {UPDATES} × {BATCH} images",
            "paper",
        ]
    ]
    for name, batch in CNNS.items():
        path = ROOT / "results" / f"benchmark-{name}.json"
        if path.is_file():
            found = costs(load(path)["rows"], batch)
            paper = numbers("table-1", f"cifar10-{name.removesuffix('-mlp')}")
            kept = f"{statistics.median(found.kept):.2f} ({min(found.kept):.2f} to {max(found.kept):.2f})"
            said = f"{paper['XSAM'].mean / paper['SAM'].mean:.3f}"
            lines.append(
                [name, str(batch), kept, f"{found.own:.3f}", f"{found.search:.1f}", f"{found.epoch():.3f}", said]
            )
    return to_markdown(lines) if len(lines) > 1 else ""
