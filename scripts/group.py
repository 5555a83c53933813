"""Reads a group of runs back, as `run_seeds.py` leaves them."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FinishedRun:
    command: list[str]
    result: dict
    history: list[dict]
    searches: list[dict]

    @classmethod
    def load(cls, folder: Path) -> "FinishedRun":
        state, searches = folder / "trainer_state.json", folder / "xsam_search.jsonl"
        return cls(
            command=json.loads((folder / "request.json").read_text())["command"],
            result=json.loads((folder / "result.json").read_text()),
            history=json.loads(state.read_text())["log_history"] if state.exists() else [],
            searches=[json.loads(line) for line in searches.read_text().splitlines()] if searches.exists() else [],
        )

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """A logged value against the backward passes made so far, the axis on which all methods are worth the same."""
        points = [(entry["step"], entry[key]) for entry in self.history if entry.get(key) is not None]
        passes_a_step = self.result["passes"]["backward"] / max(entry["step"] for entry in self.history)
        return [passes_a_step * step for step, _ in points], [value for _, value in points]


def load_group(group: Path) -> tuple[dict[str, list[FinishedRun]], list[str]]:
    """The finished runs of each method, by seed, and the names of the others."""
    runs: dict[str, list[FinishedRun]] = {}
    unfinished = []
    for request in sorted(group.glob("*/seed-*/request.json")):
        folder = request.parent
        if (folder / "result.json").exists():
            runs.setdefault(folder.parent.name, []).append(FinishedRun.load(folder))
        else:
            unfinished.append(f"{folder.parent.name} {folder.name.replace('-', ' ')}")
    for seeds in runs.values():
        seeds.sort(key=lambda run: run.result["seed"])
    return runs, unfinished
